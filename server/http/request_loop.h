// The sockets of the HTTP server, on one thread.

#ifndef SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_
#define SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/clock.h"
#include "server/http/connection.h"
#include "server/rpc/listener.h"

namespace syncbn::http {

// Accepts connections, reads a request from each, and writes its answer. No peer holds up another one: nothing blocks,
// and a new connection at the limit takes the place of the oldest one of the address that has most. A request that
// comes at once is therefore read, whatever others do with theirs; while all wait for their answers, probes stay.
//
// Thread safety: Start and Stop from one thread, Answer from any.
class RequestLoop {
 public:
  struct Served {
    std::optional<std::string> answer;  // Its bytes; absent if Answer() will give them.
    bool precious = false;              // Others make room before this request, which waits for its answer.
  };

  // Called on the loop's thread; they must not block.
  struct Handlers {
    // The head of a request has come.
    std::function<Served(uint64_t id, absl::string_view head)> serve;
    // The connection has ended before Answer() was called for it.
    std::function<void(uint64_t id)> forget;
  };

  RequestLoop(rpc::Listener listener, Handlers handlers);
  // Stop() must have been called if Start() was.
  ~RequestLoop();
  RequestLoop(const RequestLoop&) = delete;
  RequestLoop& operator=(const RequestLoop&) = delete;

  // Errors: RESOURCE_EXHAUSTED if the system grants no thread or descriptor.
  absl::Status Start();
  // Closes the listening sockets and all connections. Does nothing unless Start() has succeeded.
  void Stop();

  // Writes the answer of a connection, after which it ends. Does nothing if it has ended already.
  void Answer(uint64_t id, std::string bytes);

  // Returns the address by which the server is reached, with the actual port.
  std::string target() const { return listener_.target(); }

 private:
  // By number, and so by age.
  using Connections = std::map<uint64_t, std::unique_ptr<Connection>>;

  void Run();
  absl::Duration Timeout() const;
  // Takes the answers that other threads have given.
  void WriteAnswers();
  void AcceptFrom(int listener);
  // Accepts one connection. Returns the negative of an errno on failure.
  int AcceptOne(int listener);
  // Lets a connection go on, and serves its request once that is there.
  void Proceed(uint64_t id, Connection* connection, int events);
  // Drops the oldest answers that nobody reads while all of them are too long together.
  void BoundUnreadBytes();
  void MakeRoom();
  Connections::iterator Drop(Connections::iterator dropped);
  void DropEnded();

  const rpc::Listener listener_;
  const Handlers handlers_;
  const size_t max_connections_;
  const Clock clock_;
  const int wake_;  // An eventfd.
  Connections connections_;
  absl::flat_hash_map<std::string, int> of_address_;  // The number of connections.
  uint64_t next_id_ = 1;
  absl::Time paused_until_ = absl::InfinitePast();  // No connections are accepted until then.
  std::atomic<bool> stopping_{false};
  absl::Mutex mutex_;
  std::vector<std::pair<uint64_t, std::string>> answers_ ABSL_GUARDED_BY(mutex_);  // Not yet taken by the loop.
  std::thread thread_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_
