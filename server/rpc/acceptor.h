// Accepts connections and hands them to gRPC. gRPC 1.51 would listen by itself, but stops for ever once the process has
// run out of descriptors for a moment, takes connections without a bound, and tells neither.

#ifndef SYNCBN_SERVER_RPC_ACCEPTOR_H_
#define SYNCBN_SERVER_RPC_ACCEPTOR_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "grpcpp/server_builder.h"
#include "plumbing/clock.h"
#include "server/log/throttle.h"
#include "server/rpc/listener.h"

namespace syncbn::rpc {

// A thread of its own: what keeps the loop busy does not keep connections waiting, and the other way round. At the
// limit, and where the process has no descriptor left, connections are closed as soon as they are accepted, so that
// their peers know and try again.
class Acceptor {
 public:
  // `max_connections`: that are open at one time, over all listeners. `on_listening` is told, on the acceptor's thread,
  // when a listener has stopped working (false) and when all of them work again (true).
  Acceptor(std::vector<Listener> listeners, size_t max_connections, std::function<void(bool)> on_listening);
  // Stop() must have been called if Start() was.
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // `sink` is the started server's.
  void Start(std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> sink);
  // Closes the listeners. Connections stay.
  void Stop();

 private:
  void Run();
  // Accepts what waits on one socket, within reason. False: the socket does not work.
  bool AcceptFrom(int descriptor);
  void Take(int listener, int connection);
  // Returns whether there is room for one more.
  bool HasRoom();
  // The process is out of descriptors, or the system of memory.
  void Shed(int descriptor, int error);
  void Break(size_t index, const std::string& why);
  // Opens again what does not work.
  void Repair();
  absl::Duration Timeout() const;

  std::vector<Listener> listeners_;
  const size_t max_connections_;
  const std::function<void(bool)> on_listening_;
  std::vector<bool> broken_;  // By listener: to be opened again.
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> sink_;
  // The inode of the socket by its descriptor, of those handed over. gRPC closes them without telling.
  absl::flat_hash_map<int, ino_t> connections_;
  Throttle throttle_;
  int wake_ = -1;   // An eventfd.
  int spare_ = -1;  // A descriptor to give up when there is no other.
  const Clock clock_;
  absl::Time paused_until_ = absl::InfinitePast();
  absl::Time repair_at_ = absl::InfinitePast();
  bool listening_ = true;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_ACCEPTOR_H_
