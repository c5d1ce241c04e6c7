#include "tests/benchmarks/round/syncbn_exchange.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace syncbn::benchmarks {

absl::StatusOr<std::unique_ptr<SyncbnExchange>> SyncbnExchange::Join(Worker::Options options) {
  auto worker = Worker::Join(std::move(options));
  if (!worker.ok()) return worker.status();
  if (absl::Status status = (*worker)->WaitForMembers(absl::Seconds(30)); !status.ok()) return status;
  return std::unique_ptr<SyncbnExchange>(new SyncbnExchange(*std::move(worker)));
}

absl::Status SyncbnExchange::Prepare(uint32_t channels, uint32_t layers) {
  names_.clear();
  for (uint32_t i = 0; i < layers; ++i) {
    LayerOptions layer;
    layer.name = names_.emplace_back(absl::StrCat("stage", i, ".bn", channels));
    layer.channels = channels;
    layer.eps = 1e-5;
    if (worker_->FindLayer(layer.name) != nullptr) continue;
    if (absl::Status status = worker_->DeclareLayer(layer); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status SyncbnExchange::Run(uint32_t first, absl::Span<const Contribution* const> contributions,
                                 std::vector<MergedView>* results) {
  rounds_.clear();
  for (size_t i = 0; i < contributions.size(); ++i) {
    const Contribution& own = *contributions[i];
    auto round = worker_->StartForward(names_[first + i], Worker::kNextSequence, own.count, own.mean, own.m2,
                                       BackwardRole::kNone);
    if (!round.ok()) return round.status();
    rounds_.push_back(*std::move(round));
  }
  results->clear();
  for (Round& round : rounds_) {
    if (absl::Status status = round.Wait(); !status.ok()) return status;
    results->push_back({round.result().count, round.result().first, round.result().second});
  }
  return absl::OkStatus();
}

}  // namespace syncbn::benchmarks
