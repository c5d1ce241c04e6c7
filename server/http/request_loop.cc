#include "server/http/request_loop.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "plumbing/fork_sockets.h"
#include "plumbing/start_thread.h"
#include "server/rpc/listen_address.h"

namespace syncbn::http {
namespace {

constexpr size_t kMostConnections = 256;
constexpr size_t kLeastConnections = 4;
// Connections accepted before the others' turn.
constexpr int kMostAtOnce = 64;
// Pause after the system has refused a connection, or memory for poll().
constexpr absl::Duration kPause = absl::Milliseconds(50);
// Bytes of answers that all peers together may leave unread.
constexpr size_t kMaxUnreadBytes = size_t{64} << 20;

// Leaves nearly all descriptors to workers.
size_t MaxConnections() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kMostConnections;
  return std::clamp<size_t>(limit.rlim_cur / 16, kLeastConnections, kMostConnections);
}

// Returns the address without its port.
std::string HostOf(const rpc::SocketAddress& peer) {
  const std::string text = peer.ToString();
  return text.substr(0, text.rfind(':'));
}

}  // namespace

RequestLoop::RequestLoop(rpc::Listener listener, Handlers handlers)
    : listener_(std::move(listener)),
      handlers_(std::move(handlers)),
      max_connections_(MaxConnections()),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

RequestLoop::~RequestLoop() {
  if (wake_ >= 0) close(wake_);
}

absl::Status RequestLoop::Start() {
  if (wake_ < 0) return absl::ResourceExhaustedError(absl::StrCat("no descriptor can be had: ", std::strerror(errno)));
  return StartThread(
      "the status page's connections", [this] { Run(); }, &thread_);
}

void RequestLoop::Stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  eventfd_write(wake_, 1);
  thread_.join();
}

void RequestLoop::Answer(uint64_t id, std::string bytes) {
  {
    const absl::MutexLock lock(&mutex_);
    answers_.emplace_back(id, std::move(bytes));
  }
  eventfd_write(wake_, 1);
}

void RequestLoop::Run() {
  std::vector<pollfd> polled;
  std::vector<uint64_t> owners;  // Of the connections among `polled`.
  while (!stopping_) {
    polled.assign(1, {wake_, POLLIN, 0});
    owners.clear();
    for (const auto& [id, connection] : connections_) {
      polled.push_back({connection->descriptor(), connection->events(), 0});
      owners.push_back(id);
    }
    if (clock_.Now() >= paused_until_) {
      for (const int listener : listener_.descriptors()) polled.push_back({listener, POLLIN, 0});
    }
    const int64_t timeout_ms = absl::ToInt64Milliseconds(Timeout()) + 1;
    if (poll(polled.data(), polled.size(), static_cast<int>(timeout_ms)) < 0) {
      if (errno != EINTR) absl::SleepFor(kPause);  // The system lacks memory.
      continue;
    }
    eventfd_t count = 0;
    if (polled[0].revents != 0) eventfd_read(wake_, &count);
    for (size_t i = 0; i < owners.size(); ++i) {
      const int events = polled[i + 1].revents;
      if (events != 0) Proceed(owners[i], connections_.at(owners[i]).get(), events);
    }
    WriteAnswers();
    DropEnded();
    for (size_t i = 1 + owners.size(); i < polled.size(); ++i) {
      if (polled[i].revents != 0) AcceptFrom(polled[i].fd);
    }
  }
  connections_.clear();
}

absl::Duration RequestLoop::Timeout() const {
  const absl::Time now = clock_.Now();
  absl::Time due = now + absl::Minutes(1);
  if (now < paused_until_) due = std::min(due, paused_until_);
  for (const auto& [id, connection] : connections_) due = std::min(due, connection->deadline());
  return std::max(absl::ZeroDuration(), due - now);
}

void RequestLoop::WriteAnswers() {
  std::vector<std::pair<uint64_t, std::string>> answers;
  {
    const absl::MutexLock lock(&mutex_);
    answers.swap(answers_);
  }
  for (auto& [id, bytes] : answers) {
    const auto it = connections_.find(id);
    if (it == connections_.end() || it->second->state() != Connection::State::kServed) continue;
    it->second->Answer(std::move(bytes), clock_.Now());
  }
  if (!answers.empty()) BoundUnreadBytes();
}

void RequestLoop::AcceptFrom(int listener) {
  for (int i = 0; i < kMostAtOnce; ++i) {
    int error = -AcceptOne(listener);
    const auto is_lack = [](int e) { return e == EMFILE || e == ENFILE || e == ENOBUFS || e == ENOMEM; };
    if (is_lack(error) && !connections_.empty()) {
      MakeRoom();
      error = -AcceptOne(listener);
    }
    if (error <= 0 || error == ECONNABORTED || error == EINTR) continue;
    // Other errors are of the network that the peer is in, or of the socket itself, and may last.
    if (error != EAGAIN) paused_until_ = clock_.Now() + kPause;
    return;
  }
}

int RequestLoop::AcceptOne(int listener) {
  rpc::SocketAddress peer;
  peer.length = sizeof(peer.storage);
  const int descriptor =
      accept4(listener, reinterpret_cast<sockaddr*>(&peer.storage), &peer.length, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (descriptor < 0) return -errno;
  GiveUpInForkedChildren(descriptor);
  if (connections_.size() >= max_connections_) MakeRoom();
  const uint64_t id = next_id_++;
  auto added = std::make_unique<Connection>(descriptor, HostOf(peer), clock_.Now());
  ++of_address_[added->address()];
  Connection* const connection = connections_.emplace(id, std::move(added)).first->second.get();
  // Its request may be there, and is served before later connections could take its place.
  Proceed(id, connection, POLLIN);
  return 0;
}

void RequestLoop::Proceed(uint64_t id, Connection* connection, int events) {
  const bool had_come = connection->state() != Connection::State::kHead;
  connection->Proceed(events, clock_.Now());
  if (had_come || connection->state() != Connection::State::kServed) return;
  Served served = handlers_.serve(id, connection->head());
  connection->set_precious(served.precious);
  if (served.answer.has_value()) connection->Answer(*std::move(served.answer), clock_.Now());
}

void RequestLoop::BoundUnreadBytes() {
  size_t sum = 0;
  for (const auto& [id, connection] : connections_) sum += connection->unread_bytes();
  for (auto it = connections_.begin(); it != connections_.end() && sum > kMaxUnreadBytes;) {
    const size_t bytes = it->second->unread_bytes();
    sum -= bytes;
    it = bytes > 0 ? Drop(it) : std::next(it);
  }
}

void RequestLoop::MakeRoom() {
  // The oldest of those that compare equal is taken, whatever its state: the newest may only not have sent its request
  // yet.
  const auto rank = [this](const Connections::value_type& entry) {
    const Connection& connection = *entry.second;
    return std::make_pair(!connection.precious(), of_address_[connection.address()]);
  };
  const auto victim = std::max_element(connections_.begin(), connections_.end(),
                                       [&rank](const auto& a, const auto& b) { return rank(a) < rank(b); });
  if (victim != connections_.end()) Drop(victim);
}

RequestLoop::Connections::iterator RequestLoop::Drop(Connections::iterator dropped) {
  const Connection& connection = *dropped->second;
  if (connection.state() == Connection::State::kServed) handlers_.forget(dropped->first);
  const auto count = of_address_.find(connection.address());
  if (--count->second == 0) of_address_.erase(count);
  return connections_.erase(dropped);
}

void RequestLoop::DropEnded() {
  const absl::Time now = clock_.Now();
  for (auto it = connections_.begin(); it != connections_.end();) {
    const bool ended = it->second->state() == Connection::State::kGone || it->second->deadline() <= now;
    it = ended ? Drop(it) : std::next(it);
  }
}

}  // namespace syncbn::http
