// Ends connections that keep the loop's thread inside gRPC.

#ifndef SYNCBN_SERVER_RPC_FLOOD_WATCH_H_
#define SYNCBN_SERVER_RPC_FLOOD_WATCH_H_

#include <cstdint>
#include <functional>
#include <optional>

#include "absl/time/time.h"
#include "server/rpc/connections.h"
#include "server/rpc/loop_turn.h"

namespace syncbn::rpc {

// CPU time in one call of gRPC after which bytes are counted, and CPU time over which they are counted.
constexpr absl::Duration kLongCall = absl::Milliseconds(4);
constexpr absl::Duration kObserved = absl::Milliseconds(8);

// gRPC reads a connection for as long as it has bytes, without returning to the loop. A peer that sends small HTTP/2
// frames faster than gRPC handles them (calls that it resets, settings, pings) keeps the thread for as long as it
// likes: no round proceeds meanwhile, and each reset call stays in memory until the loop has taken it.
//
// Time is CPU time, so that a busy machine makes nobody a culprit, and gRPC's alone: while the loop merges long
// vectors, nobody keeps it from anything. Bytes of messages take a hundredth of the time that is suspicious here, and
// those of TLS a tenth.
//
// Thread safety: none.
class FloodWatch {
 public:
  // `turn` may be called on the thread that calls Look. `connections` must outlive this object.
  FloodWatch(Connections* connections, std::function<LoopTurn()> turn)
      : connections_(connections), turn_(std::move(turn)) {}

  // Ends the connection that the loop's thread has been reading, at a high price for each byte, since an earlier call.
  // Settles floods once the loop has taken the calls that they have left behind: a new connection would only bring more
  // of them. To be called every few milliseconds while there are connections: see ConnectionWatch.
  void Look();

 private:
  // Ends a connection, if the turn has been too long for what it has read.
  void EndFlood(const LoopTurn& turn);

  Connections* const connections_;
  const std::function<LoopTurn()> turn_;
  LoopTurn seen_;                          // When its number was first seen.
  uint64_t calls_ = 0;                     // At the last call.
  uint64_t floods_ = 0;                    // At the last call.
  int clearing_ = 0;                       // Calls of Look until the loop has taken all calls of a flood.
  std::optional<absl::Duration> counted_;  // The thread's CPU time when the connections' bytes were counted.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_FLOOD_WATCH_H_
