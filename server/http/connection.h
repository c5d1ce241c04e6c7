// One connection of HTTP: the head of a request comes, an answer goes, and it ends.

#ifndef SYNCBN_SERVER_HTTP_CONNECTION_H_
#define SYNCBN_SERVER_HTTP_CONNECTION_H_

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "boost/asio/ip/tcp.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/core/tcp_stream.hpp"
#include "server/http/answer.h"
#include "server/http/messages.h"
#include "server/http/request.h"

namespace syncbn::http {

// Never blocks. Each of its states has a time by which it must end, however often the peer sends or reads a byte. Reads
// and writes that it has begun keep it alive until they end.
//
// Thread safety: none. All is called on the thread that runs the socket's io_context.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  enum class State {
    kHead,     // The head has not come in full.
    kServed,   // The head is there, and its answer is being made.
    kAnswer,   // The answer is being written.
    kDrained,  // All is written. The socket stays open until the peer closes, which might lose the answer otherwise.
    kGone,     // The socket is closed.
  };
  // The fate of a request.
  struct Served {
    std::optional<Answer> answer;  // Absent if Respond() will give it.
    bool precious = false;         // Whether others should make room before this connection.
  };
  // Called by the io_context, never from within a call of the connection's methods.
  struct Handlers {
    std::function<Served(Request request)> serve;
    // The connection has ended by itself, and not by Close().
    std::function<void()> ended;
  };

  // `address`: the peer's, without its port.
  Connection(boost::asio::ip::tcp::socket socket, std::string address, Handlers handlers);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Begins to read.
  void Start();
  // Begins to write the answer. Needs the state kServed.
  void Respond(Answer answer);
  void Close();

  State state() const { return state_; }
  // Returns whether others should make room before this one; false until its request has come.
  bool precious() const { return precious_; }
  const std::string& address() const { return address_; }
  // Returns the bytes of the answer's body, until all of them are written.
  size_t unread_bytes() const { return response_.body().size(); }

 private:
  void TakeHead(const boost::beast::error_code& error);
  void HaveWritten(const boost::beast::error_code& error);
  void Drain();
  void End();

  boost::beast::tcp_stream stream_;
  const std::string address_;
  const Handlers handlers_;
  State state_ = State::kHead;
  bool precious_ = false;
  HeadParser parser_;
  boost::beast::flat_buffer buffer_{kMaxHeadBytes};
  Response response_;
  std::array<char, 2048> drained_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_CONNECTION_H_
