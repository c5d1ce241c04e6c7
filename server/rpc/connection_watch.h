// Looks at the master's connections, and ends those that keep others from going on; adds threads meanwhile.

#ifndef SYNCBN_SERVER_RPC_CONNECTION_WATCH_H_
#define SYNCBN_SERVER_RPC_CONNECTION_WATCH_H_

#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/clock.h"
#include "plumbing/monotonic_condition.h"
#include "server/rpc/check_schedule.h"
#include "server/rpc/connections.h"
#include "server/rpc/executor_threads.h"
#include "server/rpc/flood_watch.h"
#include "server/rpc/handover_watch.h"
#include "server/rpc/loop_progress.h"
#include "server/rpc/relief_watch.h"
#include "server/rpc/resident_memory.h"

namespace syncbn::rpc {

// Runs on a thread of its own: both the loop's threads and the acceptor's read connections by gRPC, and each may be
// kept by one for as long as its peer likes.
//
// Thread safety: Start and Stop from one thread; the others from any.
class ConnectionWatch {
 public:
  // `progress` and `handover` tell the progress of the loop's threads and of the acceptor's, and `relieve` is as
  // QueueThreads::Relieve; called from Start to Stop. `connections` must outlive this object.
  ConnectionWatch(Connections* connections, std::function<LoopProgress()> progress,
                  std::function<void(bool add)> relieve, std::function<Handover()> handover);
  // Stop() must have been called if Start() was.
  ~ConnectionWatch() = default;
  ConnectionWatch(const ConnectionWatch&) = delete;
  ConnectionWatch& operator=(const ConnectionWatch&) = delete;

  // The interval at which connections are looked at while there are any.
  static constexpr absl::Duration kInterval = absl::Milliseconds(10);

  // Begins to look. Errors: RESOURCE_EXHAUSTED if the system grants no thread.
  absl::Status Start();
  // Does nothing unless Start() has succeeded.
  void Stop();

  // Tells that there is a new connection.
  void Wake();

 private:
  void Run();
  void Look();

  Connections* const connections_;
  const std::function<LoopProgress()> progress_;
  ExecutorThreads executor_threads_;
  ReliefWatch relief_watch_;
  FloodWatch flood_watch_;
  HandoverWatch handover_watch_;
  const Clock clock_;
  CheckSchedule check_schedule_;
  ResidentMemory resident_memory_;
  absl::Mutex mutex_;
  MonotonicCondition changed_;
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CONNECTION_WATCH_H_
