// Asks for another thread while gRPC keeps those that drive the completion queue.

#ifndef SYNCBN_SERVER_RPC_RELIEF_WATCH_H_
#define SYNCBN_SERVER_RPC_RELIEF_WATCH_H_

#include <array>
#include <functional>
#include <utility>

#include "absl/time/time.h"
#include "server/rpc/loop_progress.h"

namespace syncbn::rpc {

// CPU time in one call of gRPC after which it keeps the thread.
constexpr absl::Duration kKeptCall = absl::Milliseconds(2);

// A flood is known only after tens of milliseconds (FloodWatch), and that of a worker is never ended. Rounds should
// wait for neither. It does no harm to be wrong about this: a thread is added for a while.
//
// Thread safety: none.
class ReliefWatch {
 public:
  // `relieve` as QueueThreads::Relieve.
  explicit ReliefWatch(std::function<void(bool add)> relieve) : relieve_(std::move(relieve)) {}

  // Calls `relieve` if gRPC has kept a thread since an earlier call, so that one is added if it has kept all. To be
  // called every few milliseconds.
  void Look(const LoopProgress& progress);

 private:
  const std::function<void(bool add)> relieve_;
  std::array<LoopTurn, LoopProgress::kMostThreads> seen_;  // When their numbers were first seen.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_RELIEF_WATCH_H_
