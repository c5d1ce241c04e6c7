// The sockets of the HTTP server, on one thread.

#ifndef SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_
#define SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/posix/stream_descriptor.hpp"
#include "boost/asio/steady_timer.hpp"
#include "server/http/answer.h"
#include "server/http/connection.h"
#include "server/http/request.h"
#include "server/rpc/listener.h"

namespace syncbn::http {

// Accepts connections, reads a request from each, and writes its answer. No peer holds up another one: nothing blocks,
// and a new connection at the limit takes the place of the oldest one of the address that has most. A request that
// comes at once is therefore read, whatever others do with theirs; while all wait for their answers, probes stay.
//
// Thread safety: Start and Stop from one thread, Respond from any.
class RequestLoop {
 public:
  // Called on the loop's thread; they must not block.
  struct Handlers {
    // A request has come.
    std::function<Connection::Served(uint64_t id, Request request)> serve;
    // The connection has ended before Respond() was called for it.
    std::function<void(uint64_t id)> forget;
  };

  // Errors: RESOURCE_EXHAUSTED if the system grants no descriptor.
  static absl::StatusOr<std::unique_ptr<RequestLoop>> Open(rpc::Listener listener, Handlers handlers);
  // Closes the listening sockets and all connections. Stop() must have been called if Start() was.
  ~RequestLoop();
  RequestLoop(const RequestLoop&) = delete;
  RequestLoop& operator=(const RequestLoop&) = delete;

  // Errors: RESOURCE_EXHAUSTED if the system grants no thread, or no place among those to be waited for.
  absl::Status Start();
  // Ends the thread. Does nothing unless Start() has succeeded.
  void Stop();

  // Writes the answer of a connection, after which it ends. Does nothing if it has ended already.
  void Respond(uint64_t id, Answer answer);

  // Returns the address by which the server is reached, with the actual port.
  std::string target() const { return listener_.target(); }

 private:
  // Connections by their number, and so by age.
  using Connections = std::map<uint64_t, std::shared_ptr<Connection>>;
  struct Listening {
    int descriptor;                                // The listener's.
    boost::asio::posix::stream_descriptor socket;  // Waits on it, and does not close it.
    boost::asio::steady_timer pause;
  };

  // Throws an exception if the system grants no descriptor.
  RequestLoop(rpc::Listener listener, Handlers handlers);

  void AwaitConnection(Listening* listening);
  void AcceptFrom(Listening* listening);
  // Accepts one connection. Returns an errno on failure, or 0.
  int AcceptOne(int listener);
  void Add(boost::asio::ip::tcp::socket socket, std::string address);
  // Drops the oldest answers that nobody reads while all of them are too long together.
  void BoundUnreadBytes();
  void MakeRoom();
  Connections::iterator Drop(Connections::iterator dropped);

  const rpc::Listener listener_;
  const Handlers handlers_;
  const size_t max_connections_;
  boost::asio::io_context context_;
  std::list<Listening> listening_;
  Connections connections_;
  absl::flat_hash_map<std::string, int> of_address_;  // The number of connections.
  uint64_t next_id_ = 1;
  std::thread thread_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_REQUEST_LOOP_H_
