// The interface that the round benchmark measures: one way for a worker to exchange moments with the others.

#ifndef SYNCBN_TESTS_BENCHMARKS_ROUND_EXCHANGE_H_
#define SYNCBN_TESTS_BENCHMARKS_ROUND_EXCHANGE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "tests/benchmarks/round/round_data.h"

namespace syncbn::benchmarks {

class Exchange {
 public:
  virtual ~Exchange() = default;
  // Before the first round of `layers` layers of `channels` channels each; not timed.
  virtual absl::Status Prepare(uint32_t channels, uint32_t layers) = 0;
  // One synchronous round of the layers `first` to `first + contributions.size() - 1`, in one message each way. Returns
  // when all results are there. They stay valid until the next call.
  virtual absl::Status Run(uint32_t first, absl::Span<const Contribution* const> contributions,
                           std::vector<MergedView>* results) = 0;
};

}  // namespace syncbn::benchmarks

#endif  // SYNCBN_TESTS_BENCHMARKS_ROUND_EXCHANGE_H_
