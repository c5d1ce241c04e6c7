// Ends connections that keep the loop's threads, or gRPC's own, inside gRPC.

#ifndef SYNCBN_SERVER_RPC_FLOOD_WATCH_H_
#define SYNCBN_SERVER_RPC_FLOOD_WATCH_H_

#include <array>
#include <cstdint>
#include <optional>

#include "absl/time/time.h"
#include "server/rpc/connections.h"
#include "server/rpc/loop_progress.h"

namespace syncbn::rpc {

// CPU time in one call of gRPC after which bytes are counted, and CPU time over which they are counted.
constexpr absl::Duration kLongCall = absl::Milliseconds(4);
constexpr absl::Duration kObserved = absl::Milliseconds(8);

// gRPC reads a connection for as long as it has bytes, without returning to the loop. A peer that sends small HTTP/2
// frames faster than gRPC handles them (calls that it resets, settings, pings) keeps the thread for as long as it
// likes: no round proceeds unless there is another thread, and each reset call stays in memory until the loop has taken
// it.
//
// Time is CPU time, so that a busy machine makes nobody a culprit, and gRPC's alone: while the loop merges long
// vectors, nobody keeps it from anything. Bytes of messages take a hundredth of the time that is suspicious here, and
// those of TLS a tenth.
//
// Thread safety: none.
class FloodWatch {
 public:
  // `connections` must outlive this object.
  explicit FloodWatch(Connections* connections) : connections_(connections) {}

  // Ends the connection that the threads have been reading, at a high price for each byte, since an earlier call.
  // Settles floods once the loop has taken the calls that they have left behind: a new connection would only bring more
  // of them. To be called every few milliseconds while there are connections: see ConnectionWatch.
  void Look(const LoopProgress& progress);

 private:
  // A thread in a long call of gRPC.
  struct Call {
    LoopTurn seen;                           // When its number was first seen.
    std::optional<absl::Duration> observed;  // The thread's CPU time when the connections' bytes were counted.
  };

  // Ends a connection, if calls have been too long for what they have read.
  void EndFlood(const LoopProgress& progress);
  // Counts the connections' bytes if a call has become long and none is observed.
  void BeginToObserve(const LoopProgress& progress);

  Connections* const connections_;
  // One for each thread, gRPC's own last.
  std::array<Call, LoopProgress::kMostThreads + LoopProgress::kMostExecutors> calls_of_grpc_;
  uint64_t calls_ = 0;   // Workers' calls, at the last call of Look.
  uint64_t floods_ = 0;  // At the last call.
  int clearing_ = 0;     // Calls of Look until the loop has taken all calls of a flood.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_FLOOD_WATCH_H_
