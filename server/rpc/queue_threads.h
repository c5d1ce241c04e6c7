// The threads that drive the master's completion queue: one, and more for as long as gRPC keeps it.

#ifndef SYNCBN_SERVER_RPC_QUEUE_THREADS_H_
#define SYNCBN_SERVER_RPC_QUEUE_THREADS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/completion_queue.h"
#include "plumbing/clock.h"
#include "server/rpc/event_loop.h"
#include "server/rpc/loop_progress.h"

namespace syncbn::rpc {

// gRPC reads a connection on the thread that asks for the next event, for as long as there are bytes. Nobody can
// interrupt it, but another thread can ask, and then gRPC serves the other connections there. Usually one thread is
// faster: where several ask, each event wakes one of them.
//
// Thread safety: Start and Join from one thread; the others from any, between these two.
class QueueThreads {
 public:
  // Handles an event, or (null) that none has come until it was time. Returns when the next is due without an event, a
  // time of `clock`. Called on several threads.
  using Handle = std::function<absl::Time(Tag* tag, bool ok)>;

  // `on_leave` is called on a thread that drives the queue no more while others do: if time has to pass, one of them
  // should learn of it. Threads that were added leave after `linger`. `clock` must outlive this object.
  QueueThreads(const Clock* clock, Handle handle, std::function<void()> on_leave,
               absl::Duration linger = absl::Seconds(1));
  // Join() must have been called if Start() was.
  ~QueueThreads() = default;
  QueueThreads(const QueueThreads&) = delete;
  QueueThreads& operator=(const QueueThreads&) = delete;

  // Begins with one thread. Errors: RESOURCE_EXHAUSTED if the system grants none.
  absl::Status Start(grpc::CompletionQueue* queue);
  // Keeps the threads that were added for another `linger`. `add`: adds one, if there may be one more.
  void Relieve(bool add);
  // Tells where each thread is.
  std::array<LoopTurn, LoopProgress::kMostThreads> turns() const;
  // Waits until the queue, which has been or will be shut down, has no more events. Drives it on this thread if Start
  // has failed.
  void Join();

 private:
  struct Seat {
    std::atomic<uint64_t> turns{0};  // Even while the thread is in gRPC.
    std::atomic<bool> there{false};  // The clock is that of a thread which runs.
    std::atomic<clockid_t> cpu_clock{0};
    std::thread thread;
  };

  // Drives the queue until its end, or until it is time for a thread that was added.
  void Drive(Seat* seat, bool added);
  absl::Time leave_at() const;

  const Clock& clock_;
  const Handle handle_;
  const std::function<void()> on_leave_;
  const absl::Duration linger_;
  grpc::CompletionQueue* queue_ = nullptr;
  std::array<Seat, LoopProgress::kMostThreads> seats_;  // The first thread's comes first.
  mutable absl::Mutex mutex_;                           // Guards the threads but the first, too.
  absl::Time leave_at_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  bool joining_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_QUEUE_THREADS_H_
