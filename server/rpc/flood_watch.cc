#include "server/rpc/flood_watch.h"

#include <utility>

namespace syncbn::rpc {
namespace {

// Calls of Look without a new call after which the loop has taken all that a flood has left behind.
constexpr int kClearance = 5;

}  // namespace

void FloodWatch::Look() {
  const LoopTurn turn = turn_();
  EndFlood(turn);
  const bool calls_came = turn.calls != std::exchange(calls_, turn.calls);
  const uint64_t floods = connections_->floods();
  if (floods != std::exchange(floods_, floods)) {
    clearing_ = kClearance;
  } else if (clearing_ > 0) {
    clearing_ = calls_came ? kClearance : clearing_ - 1;
    if (clearing_ == 0) connections_->SettleFloods(floods);
  }
}

void FloodWatch::EndFlood(const LoopTurn& turn) {
  if (turn.number != seen_.number) {
    seen_ = turn;
    counted_.reset();
    return;
  }
  if (!turn.in_grpc) return;
  if (turn.cpu - seen_.cpu < kLongCall) return;
  if (!counted_.has_value()) {
    connections_->CountBytes();
    counted_ = turn.cpu;
    return;
  }
  const absl::Duration spent = turn.cpu - *counted_;
  if (spent < kObserved) return;
  counted_.reset();
  connections_->EndFlood(spent);
}

}  // namespace syncbn::rpc
