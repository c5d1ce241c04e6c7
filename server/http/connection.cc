#include "server/http/connection.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "absl/strings/string_view.h"
#include "plumbing/check.h"
#include "server/http/request.h"

namespace syncbn::http {
namespace {

constexpr absl::Duration kTimeForHead = absl::Seconds(5);
// Time to read an answer: a megabyte takes 8 s where a link carries a megabit in a second.
constexpr absl::Duration kTimeForAnswer = absl::Seconds(30);
constexpr absl::Duration kTimeToClose = absl::Seconds(1);
// Calls of recv() in a row, so that a peer that sends without a pause does not hold up the others.
constexpr int kReadsAtOnce = 4;

bool IsLater(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

Connection::Connection(int descriptor, std::string address, absl::Time now)
    : descriptor_(descriptor), address_(std::move(address)), deadline_(now + kTimeForHead) {}

Connection::~Connection() { close(descriptor_); }

int16_t Connection::events() const {
  switch (state_) {
    case State::kHead:
    case State::kDrained:
      return POLLIN;
    case State::kAnswer:
      return POLLOUT;
    default:
      return 0;  // poll() tells of a connection that is broken nevertheless.
  }
}

void Connection::Proceed(int events, absl::Time now) {
  switch (state_) {
    case State::kHead:
      return Read();
    case State::kServed:
      if ((events & (POLLERR | POLLHUP | POLLNVAL)) != 0) state_ = State::kGone;
      return;
    case State::kAnswer:
      return Write(now);
    case State::kDrained:
      return Drain();
    case State::kGone:
      return;
  }
}

void Connection::Answer(std::string bytes, absl::Time now) {
  SYNCBN_CHECK(state_ == State::kServed);
  state_ = State::kAnswer;
  deadline_ = now + kTimeForAnswer;
  bytes_ = std::move(bytes);
  Write(now);
}

void Connection::Read() {
  std::array<char, 2048> buffer;
  for (int i = 0; i < kReadsAtOnce; ++i) {
    const ssize_t count = recv(descriptor_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (count < 0 && IsLater(errno)) return;
    if (count <= 0) {
      state_ = State::kGone;
      return;
    }
    const size_t searched = bytes_.size();
    bytes_.append(buffer.data(), static_cast<size_t>(count));
    // A head that is too long is one to answer, too.
    if (HeadLength(bytes_, searched) == 0 && bytes_.size() <= kMaxHeadBytes) continue;
    state_ = State::kServed;
    deadline_ = absl::InfiniteFuture();
    return;
  }
}

void Connection::Write(absl::Time now) {
  while (written_ < bytes_.size()) {
    const absl::string_view rest = absl::string_view(bytes_).substr(written_);
    const ssize_t count = send(descriptor_, rest.data(), rest.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count < 0 && IsLater(errno)) return;
    if (count < 0) {
      state_ = State::kGone;
      return;
    }
    written_ += static_cast<size_t>(count);
  }
  bytes_.clear();
  bytes_.shrink_to_fit();
  shutdown(descriptor_, SHUT_WR);
  state_ = State::kDrained;
  deadline_ = now + kTimeToClose;
}

void Connection::Drain() {
  std::array<char, 2048> buffer;
  for (int i = 0; i < kReadsAtOnce; ++i) {
    const ssize_t count = recv(descriptor_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (count > 0) continue;
    if (count == 0 || !IsLater(errno)) state_ = State::kGone;
    return;
  }
}

}  // namespace syncbn::http
