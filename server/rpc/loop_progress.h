// The progress of the threads that drive the completion queue, as others see it.

#ifndef SYNCBN_SERVER_RPC_LOOP_PROGRESS_H_
#define SYNCBN_SERVER_RPC_LOOP_PROGRESS_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace syncbn::rpc {

// One of the threads.
struct LoopTurn {
  bool there = false;    // The thread runs. It is in the same place of the array for as long as it does.
  uint64_t number = 0;   // Grows with each event that gRPC returns, and with the end of its handling.
  bool in_grpc = false;  // The thread is in gRPC, and handles no event.
  absl::Duration cpu;    // CPU time of the thread since its start.
};

struct LoopProgress {
  static constexpr size_t kMostThreads = 4;
  static constexpr size_t kMostExecutors = 4;

  uint64_t calls = 0;  // Workers' calls that have come.
  std::array<LoopTurn, kMostThreads> turns;
  std::array<LoopTurn, kMostExecutors> executors;  // gRPC's own threads, which handle no events.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LOOP_PROGRESS_H_
