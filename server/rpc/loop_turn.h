// The progress of the loop's thread, as others see it.

#ifndef SYNCBN_SERVER_RPC_LOOP_TURN_H_
#define SYNCBN_SERVER_RPC_LOOP_TURN_H_

#include <cstdint>

#include "absl/time/time.h"

namespace syncbn::rpc {

struct LoopTurn {
  uint64_t number = 0;  // Grows with each event that gRPC returns, and with the end of its handling.
  bool in_grpc = true;  // The thread is in gRPC, and handles no event.
  uint64_t calls = 0;   // Workers' calls that have come.
  absl::Duration cpu;   // CPU time of the thread since its start.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LOOP_TURN_H_
