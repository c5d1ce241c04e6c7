// Accepts connections and hands them to gRPC. gRPC 1.51 could listen itself, but it stops for good once the process has
// run out of descriptors for a moment, accepts connections without a limit, and reports neither.

#ifndef SYNCBN_SERVER_RPC_ACCEPTOR_H_
#define SYNCBN_SERVER_RPC_ACCEPTOR_H_

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/server_builder.h"
#include "plumbing/clock.h"
#include "server/log/throttle.h"
#include "server/rpc/connection_watch.h"
#include "server/rpc/connections.h"
#include "server/rpc/handover_watch.h"
#include "server/rpc/listener.h"
#include "server/rpc/loop_progress.h"

namespace syncbn::rpc {

// Runs on a thread of its own, so that a busy loop does not delay connections, nor connections the loop. At the limit,
// and when the process has no descriptor left, connections are closed as soon as they are accepted, so that their peers
// learn of it and try again.
//
// Thread safety: Start and Stop from one thread.
class Acceptor {
 public:
  // Connections for which `connections` has no room are refused; it must outlive this object. `on_listening` is called
  // on the acceptor's thread: with false when a listener has stopped working, with true when all of them work again.
  // `progress` and `relieve` are as ConnectionWatch has them, and called from Start to Stop.
  Acceptor(std::vector<Listener> listeners, Connections* connections, std::function<LoopProgress()> progress,
           std::function<void(bool add)> relieve, std::function<void(bool)> on_listening);
  // Stop() must have been called if Start() was.
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // Begins to accept. `sink` belongs to the started server.
  // Errors: RESOURCE_EXHAUSTED if the system grants no thread.
  absl::Status Start(std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> sink);
  // Closes the listeners. Open connections stay. Does nothing unless Start() has succeeded.
  void Stop();

  // Returns a number that grows while the thread is alive, at least once in two seconds. Any thread.
  uint64_t turns() const { return turns_; }

 private:
  void Run();
  // Accepts waiting connections on one socket, a limited number at a time. Returns false if the socket does not work.
  bool AcceptFrom(int descriptor);
  void Take(int listener, int connection);
  // Refuses waiting connections when the process is out of descriptors, or the system out of memory.
  void Shed(int descriptor, int error);
  // Notes that a listener does not work.
  void Break(size_t index, const std::string& why);
  // Reopens the listeners that do not work.
  void Repair();
  absl::Duration Timeout() const;
  // Returns the progress of the thread. Any thread, from Start to Stop.
  Handover handover() const;

  std::vector<Listener> listeners_;
  Connections* const connections_;
  ConnectionWatch watch_;
  const std::function<void(bool)> on_listening_;
  std::vector<bool> broken_;  // By listener: to be reopened.
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> sink_;
  Throttle throttle_;
  int wake_ = -1;   // An eventfd.
  int spare_ = -1;  // A descriptor to use when there is no other.
  const Clock clock_;
  absl::Time paused_until_ = absl::InfinitePast();
  absl::Time repair_at_ = absl::InfinitePast();
  bool listening_ = true;
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> turns_{0};
  std::atomic<uint64_t> handovers_{0};
  std::atomic<int> handed_over_{-1};  // The connection that gRPC is being given.
  clockid_t cpu_clock_ = 0;           // The thread's.
  std::thread thread_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_ACCEPTOR_H_
