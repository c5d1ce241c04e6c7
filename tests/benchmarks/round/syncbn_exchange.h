// The round over gRPC, through the public client.

#ifndef SYNCBN_TESTS_BENCHMARKS_ROUND_SYNCBN_EXCHANGE_H_
#define SYNCBN_TESTS_BENCHMARKS_ROUND_SYNCBN_EXCHANGE_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cc/worker.h"
#include "tests/benchmarks/round/exchange.h"

namespace syncbn::benchmarks {

class SyncbnExchange final : public Exchange {
 public:
  static absl::StatusOr<std::unique_ptr<SyncbnExchange>> Join(Worker::Options options);

  absl::Status Prepare(uint32_t channels, uint32_t layers) override;
  absl::Status Run(uint32_t first, absl::Span<const Contribution* const> contributions,
                   std::vector<MergedView>* results) override;

 private:
  explicit SyncbnExchange(std::unique_ptr<Worker> worker) : worker_(std::move(worker)) {}

  std::unique_ptr<Worker> worker_;
  std::vector<std::string> names_;
  std::vector<Round> rounds_;
};

}  // namespace syncbn::benchmarks

#endif  // SYNCBN_TESTS_BENCHMARKS_ROUND_SYNCBN_EXCHANGE_H_
