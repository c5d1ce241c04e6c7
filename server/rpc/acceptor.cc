#include "server/rpc/acceptor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "plumbing/fork_sockets.h"
#include "plumbing/log.h"
#include "plumbing/start_thread.h"

namespace syncbn::rpc {
namespace {

// Connections accepted from one listener before the next one's turn.
constexpr int kMostAtOnce = 64;
// Pause when the process has no descriptor left, not even the spare one.
constexpr absl::Duration kPause = absl::Milliseconds(50);
// Interval at which broken listeners are reopened and the others checked.
constexpr absl::Duration kRepairInterval = absl::Seconds(1);
// Time for which a peer may leave data unacknowledged, as gRPC sets it on sockets that it accepts.
constexpr int kUserTimeoutMs = 20000;

// Returns the other side's address; that of an unnamed unix socket if it has gone already.
SocketAddress PeerOf(int connection) {
  SocketAddress address;
  address.storage.ss_family = AF_UNIX;
  address.length = sizeof(address.storage);
  getpeername(connection, reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address;
}

// Sets options of TCP. The calls fail on unix sockets, which do not need them.
void Tune(int connection) {
  const int on = 1;
  setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(connection, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
}

int OpenSpare() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

void CloseIfOpen(int& descriptor) {
  if (descriptor >= 0) close(descriptor);
  descriptor = -1;
}

}  // namespace

Acceptor::Acceptor(std::vector<Listener> listeners, Connections* connections, std::function<LoopProgress()> progress,
                   std::function<void(bool add)> relieve, std::function<void(bool)> on_listening)
    : listeners_(std::move(listeners)),
      connections_(connections),
      watch_(connections, std::move(progress), std::move(relieve), [this] { return handover(); }),
      on_listening_(std::move(on_listening)),
      broken_(listeners_.size()),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      spare_(OpenSpare()) {}

Acceptor::~Acceptor() {
  CloseIfOpen(wake_);
  CloseIfOpen(spare_);
}

absl::Status Acceptor::Start(std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> sink) {
  sink_ = std::move(sink);
  absl::Status started = StartThread(
      "accepting connections", [this] { Run(); }, &thread_);
  if (!started.ok()) return started;
  SYNCBN_CHECK(pthread_getcpuclockid(thread_.native_handle(), &cpu_clock_) == 0, "a thread has no clock");
  started = watch_.Start();
  if (!started.ok()) Stop();
  return started;
}

Handover Acceptor::handover() const {
  timespec cpu = {};
  clock_gettime(cpu_clock_, &cpu);
  return {handovers_, handed_over_, absl::DurationFromTimespec(cpu)};
}

void Acceptor::Stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  const uint64_t one = 1;
  const ssize_t written = write(wake_, &one, sizeof(one));
  (void)written;
  thread_.join();
  watch_.Stop();  // After the thread, which only the watch frees from a flood.
  listeners_.clear();
}

void Acceptor::Run() {
  std::vector<pollfd> polled;
  std::vector<size_t> owners;
  while (!stopping_) {
    ++turns_;
    polled.assign(1, {wake_, POLLIN, 0});
    owners.assign(1, 0);
    const bool paused = clock_.Now() < paused_until_ || connections_->flooded();
    for (size_t i = 0; i < listeners_.size() && !paused; ++i) {
      for (const int descriptor : listeners_[i].descriptors()) {
        polled.push_back({descriptor, POLLIN, 0});
        owners.push_back(i);
      }
    }
    const int64_t timeout_ms = absl::ToInt64Milliseconds(Timeout()) + 1;
    if (poll(polled.data(), polled.size(), static_cast<int>(timeout_ms)) < 0 && errno != EINTR) {
      paused_until_ = clock_.Now() + kPause;  // The system lacks memory.
      continue;
    }
    for (size_t i = 1; i < polled.size() && !stopping_ && !connections_->flooded(); ++i) {
      if (polled[i].revents == 0) continue;
      // A unix socket that was shut down must be recognized here: accept() reports no error for it, only EAGAIN.
      const bool dead = (polled[i].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0;
      if (dead || !AcceptFrom(polled[i].fd)) Break(owners[i], "its socket does not work any more");
    }
    if (clock_.Now() >= repair_at_) Repair();
  }
}

absl::Duration Acceptor::Timeout() const {
  const absl::Time now = clock_.Now();
  absl::Time due = repair_at_;
  if (now < paused_until_) due = std::min(due, paused_until_);
  if (connections_->flooded()) due = std::min(due, now + ConnectionWatch::kInterval);
  return std::max(absl::ZeroDuration(), due - now);
}

bool Acceptor::AcceptFrom(int descriptor) {
  for (int i = 0; i < kMostAtOnce && !stopping_ && !connections_->flooded(); ++i) {
    const int connection = accept4(descriptor, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (connection >= 0) {
      Take(descriptor, connection);
      continue;
    }
    switch (errno) {
      case EAGAIN:
        return true;
      case EMFILE:
      case ENFILE:
      case ENOBUFS:
      case ENOMEM:
        Shed(descriptor, errno);
        return true;
      case EBADF:
      case EINVAL:
      case ENOTSOCK:
      case EOPNOTSUPP:
        return false;
      default:  // An error of this connection alone: it broke while it waited, a firewall, a network that is down.
        break;
    }
  }
  return true;
}

void Acceptor::Take(int listener, int connection) {
  const SocketAddress peer = PeerOf(connection);
  if (const std::string why = connections_->Add(connection, peer); !why.empty()) {
    throttle_.Log(LogLevel::kWarning, "max_connections", clock_.Now(),
                  absl::StrCat("refused a connection from ", peer.ToString(), ": ", why));
    close(connection);
    return;
  }
  GiveUpInForkedChildren(connection);
  Tune(connection);
  grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters parameters;
  parameters.listener_fd = listener;
  parameters.fd = connection;
  watch_.Wake();
  ++handovers_;
  handed_over_ = connection;
  sink_->HandleNewConnection(&parameters);
  handed_over_ = -1;
}

void Acceptor::Shed(int descriptor, int error) {
  throttle_.Log(LogLevel::kError, "descriptors", clock_.Now(),
                absl::StrCat("cannot accept connections for the moment: ", std::strerror(error),
                             "; those that wait are refused (see ulimit -n)"));
  // Accept one waiting connection with the spare descriptor and close it, so that its peer learns of the refusal.
  CloseIfOpen(spare_);
  int connection = accept4(descriptor, nullptr, nullptr, SOCK_CLOEXEC);
  CloseIfOpen(connection);
  spare_ = OpenSpare();
  if (spare_ < 0) paused_until_ = clock_.Now() + kPause;
}

void Acceptor::Break(size_t index, const std::string& why) {
  broken_[index] = true;
  repair_at_ = absl::InfinitePast();
  if (std::exchange(listening_, false)) on_listening_(false);
  throttle_.Log(LogLevel::kError, "listener", clock_.Now(),
                absl::StrCat("nobody can connect to ", listeners_[index].target(), ": ", why));
}

void Acceptor::Repair() {
  for (size_t i = 0; i < listeners_.size(); ++i) {
    if (!broken_[i] && listeners_[i].IsUnreachable()) Break(i, "the socket's file is gone");
    if (!broken_[i]) continue;
    if (const absl::Status status = listeners_[i].Reopen(); !status.ok()) {
      Break(i, std::string(status.message()));
      continue;
    }
    broken_[i] = false;
    throttle_.Log(LogLevel::kWarning, "reopened", clock_.Now(),
                  absl::StrCat("listening on ", listeners_[i].target(), " again"));
  }
  repair_at_ = clock_.Now() + kRepairInterval;
  const bool all = std::find(broken_.begin(), broken_.end(), true) == broken_.end();
  if (all && !std::exchange(listening_, true)) on_listening_(true);
}

}  // namespace syncbn::rpc
