#include "server/rpc/flood_watch.h"

#include <cstddef>
#include <utility>

namespace syncbn::rpc {
namespace {

// Calls of Look without a new call after which the loop has taken all that a flood has left behind.
constexpr int kClearance = 5;

const LoopTurn& TurnOf(const LoopProgress& progress, size_t thread) {
  return thread < LoopProgress::kMostThreads ? progress.turns[thread]
                                             : progress.executors[thread - LoopProgress::kMostThreads];
}

}  // namespace

void FloodWatch::Look(const LoopProgress& progress) {
  for (size_t i = 0; i < calls_of_grpc_.size(); ++i) {
    Call& call = calls_of_grpc_[i];
    const LoopTurn& turn = TurnOf(progress, i);
    if (turn.there != call.seen.there || turn.number != call.seen.number) call = {turn, std::nullopt};
  }
  EndFlood(progress);
  BeginToObserve(progress);
  const bool calls_came = progress.calls != std::exchange(calls_, progress.calls);
  const uint64_t floods = connections_->floods();
  if (floods != std::exchange(floods_, floods)) {
    clearing_ = kClearance;
  } else if (clearing_ > 0) {
    clearing_ = calls_came ? kClearance : clearing_ - 1;
    if (clearing_ == 0) connections_->SettleFloods(floods);
  }
}

void FloodWatch::EndFlood(const LoopProgress& progress) {
  absl::Duration spent;
  for (size_t i = 0; i < calls_of_grpc_.size(); ++i) {
    const std::optional<absl::Duration>& observed = calls_of_grpc_[i].observed;
    if (observed.has_value()) spent += TurnOf(progress, i).cpu - *observed;
  }
  if (spent < kObserved) return;
  for (Call& call : calls_of_grpc_) call.observed.reset();
  connections_->EndFlood(spent);
}

void FloodWatch::BeginToObserve(const LoopProgress& progress) {
  const auto is_long = [&](size_t i) {
    return TurnOf(progress, i).in_grpc && TurnOf(progress, i).cpu - calls_of_grpc_[i].seen.cpu >= kLongCall;
  };
  bool begins = false;
  bool observes = false;
  for (size_t i = 0; i < calls_of_grpc_.size(); ++i) {
    begins = begins || (is_long(i) && !calls_of_grpc_[i].observed.has_value());
    observes = observes || calls_of_grpc_[i].observed.has_value();
  }
  if (!begins) return;
  // A call that becomes long later is observed from then on, and what was counted before stands: a flood that keeps
  // thread after thread would begin anew with each of them.
  if (!observes) connections_->CountBytes();
  for (size_t i = 0; i < calls_of_grpc_.size(); ++i) {
    Call& call = calls_of_grpc_[i];
    if (is_long(i) && !call.observed.has_value()) call.observed = TurnOf(progress, i).cpu;
  }
}

}  // namespace syncbn::rpc
