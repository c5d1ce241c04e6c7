// The loop of a master: a thread drives the completion queue, and the engine inline. Where workers share memory, a
// second thread takes turns with it; where gRPC keeps it, others.

#ifndef SYNCBN_SERVER_RPC_MASTER_LOOP_H_
#define SYNCBN_SERVER_RPC_MASTER_LOOP_H_

#include <atomic>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/alarm.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_builder.h"
#include "plumbing/clock.h"
#include "server/core/coordinator.h"
#include "server/log/narrator.h"
#include "server/rpc/event_loop.h"
#include "server/rpc/health.h"
#include "server/rpc/inspection.h"
#include "server/rpc/loop_options.h"
#include "server/rpc/loop_progress.h"
#include "server/rpc/queue_threads.h"
#include "server/rpc/sessions.h"
#include "server/rpc/state_saver.h"
#include "server/rpc/turn_lock.h"
#include "server/rpc/unary_calls.h"

namespace syncbn::rpc {

// Events flow from the services to the engine, and its effects from the engine to the services.
class MasterLoop {
 public:
  explicit MasterLoop(LoopOptions options);
  // Stop() must have been called if Start() was.
  ~MasterLoop() = default;
  MasterLoop(const MasterLoop&) = delete;
  MasterLoop& operator=(const MasterLoop&) = delete;

  // Adds the services and the queue. Before the server is built.
  void Register(grpc::ServerBuilder* builder);
  // Begins to serve. After the server has been started. Stop() is due afterwards also if this fails.
  // Errors: RESOURCE_EXHAUSTED if the system grants no thread.
  absl::Status Start();
  // Health is NOT_SERVING while nobody can connect. Any thread, between Start and Stop.
  void SetListening(bool listening);
  // Returns the number of workers' streams that are open. Any thread.
  size_t workers() const { return sessions_.joined(); }
  // Asks the loop for a sign of life. Returns whether it has given the one that the call before asked for. One thread,
  // between Start and Stop.
  bool Probe();
  // Returns the progress of the threads that read connections. Any thread, between Start and Stop.
  LoopProgress progress() const { return {calls_.load(std::memory_order_relaxed), threads_.turns(), {}}; }
  // Adds a thread for a while, as QueueThreads::Relieve has it. Any thread, between Start and Stop.
  void Relieve(bool add) { threads_.Relieve(add); }
  // Tells every worker that the master is going away. Any thread; the server's own Shutdown follows.
  void BeginShutdown();
  // Ends the threads. After the server's Shutdown.
  void Stop();

 private:
  // Handles an event of the completion queue; null if there is none. Returns when to look again without one.
  absl::Time OnQueue(Tag* tag, bool ok);
  // A thread that drove the queue has gone. Lets another one find out when time has to pass.
  void OnThreadLeft();
  // Starts the thread of ReadShared, unless it runs. Returns false if no thread can be had.
  bool StartReadingShared();
  // Looks at shared memory. A thread of its own, since one thread cannot wait for the queue and for a doorbell; it is
  // started with the first worker that shares memory.
  void ReadShared();
  // Does what is due after an event, or without one. `quiet`: there was none.
  void EndTurn(bool quiet);
  absl::Time NextWakeUp() const;
  // Tells the engine the time, if something is due. What is left of it belongs to the backlog: rounds by the thousand
  // may end at one time, and others should not wait for all of them.
  void ServeDeadlines();
  // Returns whether there is work that waits until nothing else is to be done, or for a while.
  bool has_backlog() const { return overdue_ || sessions_.has_backlog(); }
  // Gives the backlog its turn, if it is time. `idle`: nothing else is to be done.
  void ServeBacklog(bool idle);
  // Returns memory to the system a while after the last stream has gone.
  void TrimMemory();
  // Shuts the queue down once there is nothing more to stop.
  void EndIfIdle();

  // Hands an event to the engine, and applies its effects in order.
  void Deliver(const core::Event& event);
  void Apply(const core::SendJoined& joined);
  void Apply(const core::SendResults& results);
  void Apply(const core::SendLayerError& error);
  void Apply(const core::SendMembership& change);
  void Apply(const core::SendLateRounds& late);
  void Apply(const core::CloseStream& close);
  void Apply(const core::RoundEnded& ended);
  void Apply(const core::MemberChanged& change) { log_.On(change, now_); }
  void Apply(const core::JoinRefused& refused) { log_.On(refused, now_); }
  void Apply(const core::GroupEnded& ended);

  // Runs a tag on the loop's thread, as soon as possible.
  void Wake(grpc::Alarm& alarm, Tag& tag);
  void OnShutdown(bool ok);
  void OnStop(bool ok);
  void OnListening(bool ok);
  void OnProbe(bool ok);
  void OnHandedOn(bool) { handing_on_ = false; }

  const LoopOptions options_;
  const Clock clock_;
  // Held by whichever thread has its turn. All that follows belongs to it, but for what is atomic.
  TurnLock turn_;
  absl::Time now_ = clock_.Now();  // The time of the event that is being handled.
  Narrator log_;
  core::Coordinator coordinator_;
  StateSaver state_saver_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  Sessions sessions_;
  InspectionService inspection_;
  HealthService health_;
  UnaryCalls unary_calls_{&now_, options_.connections, options_.limits.max_turn_bytes};
  absl::Time backlog_served_ = now_;
  absl::Time trim_at_ = absl::InfiniteFuture();
  bool trimmed_ = true;  // Since there last was a stream.
  int quiet_polls_ = 0;
  bool overdue_ = false;  // The last turn of deadlines left some that had come.
  MethodTag<MasterLoop> shutdown_tag_, stop_tag_, listening_tag_, probe_tag_, handed_on_tag_;
  grpc::Alarm shutdown_alarm_, stop_alarm_, listening_alarm_, probe_alarm_, handed_on_alarm_;
  std::atomic<bool> listening_{true};
  std::atomic<bool> listening_told_{true};  // No alarm is on its way.
  std::atomic<bool> probe_answered_{true};
  bool handing_on_ = false;  // An alarm is on its way.
  bool stopping_ = false;
  bool queue_ended_ = false;
  bool stopped_ = false;
  std::atomic<uint64_t> calls_{0};
  QueueThreads threads_;
  std::thread shared_thread_;  // Not before a worker shares memory.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_MASTER_LOOP_H_
