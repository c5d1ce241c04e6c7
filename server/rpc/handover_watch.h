// Ends a connection that keeps the acceptor's thread inside gRPC.

#ifndef SYNCBN_SERVER_RPC_HANDOVER_WATCH_H_
#define SYNCBN_SERVER_RPC_HANDOVER_WATCH_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

#include "absl/time/time.h"
#include "server/rpc/connections.h"
#include "server/rpc/flood_watch.h"

namespace syncbn::rpc {

// The progress of the acceptor's thread.
struct Handover {
  uint64_t number = 0;  // Of the connection that is being handed to gRPC.
  int descriptor = -1;  // That connection; negative if there is none.
  absl::Duration cpu;   // CPU time of the thread since its start.
};

// gRPC begins to read a connection on the thread that hands it over, and goes on for as long as there are bytes. While
// one peer sends small frames as fast as gRPC handles them, nobody else can connect. Which connection it is, is known
// here; the measure is FloodWatch's.
//
// Thread safety: none.
class HandoverWatch {
 public:
  // `handover` may be called on the thread that calls Look. `connections` must outlive this object.
  HandoverWatch(Connections* connections, std::function<Handover()> handover)
      : connections_(connections), handover_(std::move(handover)) {}

  // Ends the connection that is being handed over, if it has been read at a high price for each byte since an earlier
  // call. To be called as often as FloodWatch::Look.
  void Look();

 private:
  struct Count {
    absl::Duration cpu;
    uint64_t read = 0;  // Bytes.
  };

  Connections* const connections_;
  const std::function<Handover()> handover_;
  Handover seen_;                 // When its number was first seen.
  std::optional<Count> counted_;  // Some time after that.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_HANDOVER_WATCH_H_
