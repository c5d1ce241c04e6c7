// The threads on which gRPC goes on with a connection that several of its callers want at once.

#ifndef SYNCBN_SERVER_RPC_EXECUTOR_THREADS_H_
#define SYNCBN_SERVER_RPC_EXECUTOR_THREADS_H_

#include <sys/types.h>

#include <array>

#include "absl/time/time.h"
#include "plumbing/clock.h"
#include "server/rpc/loop_progress.h"

namespace syncbn::rpc {

// If a thread reads a connection without an end, and another one writes to it, gRPC hands both tasks to its executor. A
// flood then keeps a thread there, and all other connections that are handed over wait behind it. gRPC tells nothing of
// the executor but its threads' name and, as the system does of every thread, their CPU time.
//
// Thread safety: none.
class ExecutorThreads {
 public:
  using Turns = std::array<LoopTurn, LoopProgress::kMostExecutors>;

  // Returns where the threads are. A thread is in the same call of gRPC as long as it has not slept.
  Turns turns();

 private:
  // Looks for new threads of that name.
  void Find();

  const Clock clock_{};
  absl::Time found_at_ = absl::InfinitePast();
  std::array<pid_t, LoopProgress::kMostExecutors> threads_ = {};  // 0: none.
  Turns turns_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_EXECUTOR_THREADS_H_
