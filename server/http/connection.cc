#include "server/http/connection.h"

#include <chrono>
#include <utility>
#include <variant>

#include "boost/asio/buffer.hpp"
#include "boost/beast/http/read.hpp"
#include "boost/beast/http/verb.hpp"
#include "boost/beast/http/write.hpp"
#include "plumbing/check.h"

namespace syncbn::http {
namespace {

using boost::beast::error_code;

constexpr std::chrono::seconds kTimeForHead(5);
// Time to read an answer: a megabyte takes 8 s where a link carries a megabit in a second.
constexpr std::chrono::seconds kTimeForAnswer(30);
constexpr std::chrono::seconds kTimeToClose(1);

}  // namespace

Connection::Connection(boost::asio::ip::tcp::socket socket, std::string address, Handlers handlers)
    : stream_(std::move(socket)), address_(std::move(address)), handlers_(std::move(handlers)) {}

void Connection::Start() {
  // The time is that of all reads together: it is not set anew before each.
  stream_.expires_after(kTimeForHead);
  boost::beast::http::async_read_header(
      stream_, buffer_, parser_,
      [self = shared_from_this()](const error_code& error, size_t /*bytes*/) { self->TakeHead(error); });
}

void Connection::TakeHead(const error_code& error) {
  if (state_ != State::kHead) return;
  if (error && !IsRefusal(error)) return End();
  state_ = State::kServed;
  std::variant<Request, Answer> understood = Understand(parser_, error);
  if (Answer* const refusal = std::get_if<Answer>(&understood)) return Respond(std::move(*refusal));
  Served served = handlers_.serve(std::get<Request>(std::move(understood)));
  precious_ = served.precious;
  if (served.answer.has_value()) Respond(*std::move(served.answer));
}

void Connection::Respond(Answer answer) {
  SYNCBN_CHECK(state_ == State::kServed);
  state_ = State::kAnswer;
  response_ = ToResponse(std::move(answer), parser_.get().method() != boost::beast::http::verb::head);
  stream_.expires_after(kTimeForAnswer);
  boost::beast::http::async_write(
      stream_, response_,
      [self = shared_from_this()](const error_code& error, size_t /*bytes*/) { self->HaveWritten(error); });
}

void Connection::HaveWritten(const error_code& error) {
  if (state_ != State::kAnswer) return;
  if (error) return End();
  state_ = State::kDrained;
  response_ = {};
  error_code gone;  // Reading tells the same.
  stream_.socket().shutdown(boost::asio::ip::tcp::socket::shutdown_send, gone);
  stream_.expires_after(kTimeToClose);
  Drain();
}

void Connection::Drain() {
  stream_.async_read_some(boost::asio::buffer(drained_),
                          [self = shared_from_this()](const error_code& error, size_t /*bytes*/) {
                            if (self->state_ != State::kDrained) return;
                            if (error) return self->End();
                            self->Drain();
                          });
}

void Connection::Close() {
  state_ = State::kGone;
  stream_.close();
}

void Connection::End() {
  Close();
  handlers_.ended();
}

}  // namespace syncbn::http
