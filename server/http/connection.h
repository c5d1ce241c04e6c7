// One connection of HTTP: the head of a request comes, an answer goes, and it ends.

#ifndef SYNCBN_SERVER_HTTP_CONNECTION_H_
#define SYNCBN_SERVER_HTTP_CONNECTION_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace syncbn::http {

// Never blocks. Each of its states has a time by which it must end, however often the peer sends or reads a byte.
//
// Thread safety: none.
class Connection {
 public:
  enum class State {
    kHead,     // The head has not come in full.
    kServed,   // The head is there, and its answer is being made.
    kAnswer,   // The answer is being written.
    kDrained,  // All is written. The socket stays open until the peer closes, which might lose the answer otherwise.
    kGone,     // Nothing more can come of it.
  };

  // Takes the descriptor of a non-blocking socket. `address`: the peer's, without its port.
  Connection(int descriptor, std::string address, absl::Time now);
  // Closes the socket.
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Reads or writes what the socket takes at once. To be called when poll() reports `events` for the descriptor.
  void Proceed(int events, absl::Time now);
  // Begins to write the answer, and writes what the socket takes at once. Needs the state kServed.
  void Answer(std::string bytes, absl::Time now);

  State state() const { return state_; }
  // Whether others should make room before this one; false at first.
  bool precious() const { return precious_; }
  void set_precious(bool precious) { precious_ = precious; }
  int descriptor() const { return descriptor_; }
  const std::string& address() const { return address_; }
  // The head of the request, once it has come; more if the peer has sent more.
  const std::string& head() const { return bytes_; }
  // Returns the time by which the state must have ended.
  absl::Time deadline() const { return deadline_; }
  // Returns the events to wait for.
  int16_t events() const;
  // Returns the bytes of the answer that the socket has not taken.
  size_t unread_bytes() const { return state_ == State::kAnswer ? bytes_.size() - written_ : 0; }

 private:
  void Read();
  void Write(absl::Time now);
  void Drain();

  const int descriptor_;
  const std::string address_;
  State state_ = State::kHead;
  bool precious_ = false;
  absl::Time deadline_;
  std::string bytes_;  // The head, then the answer.
  size_t written_ = 0;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_CONNECTION_H_
