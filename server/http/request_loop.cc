#include "server/http/request_loop.h"

#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/post.hpp"
#include "boost/system/system_error.hpp"
#include "plumbing/fork_sockets.h"
#include "plumbing/start_thread.h"
#include "server/rpc/listen_address.h"

namespace syncbn::http {
namespace {

using boost::asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kMostConnections = 256;
constexpr size_t kLeastConnections = 4;
// Pause after the system has refused a connection.
constexpr std::chrono::milliseconds kPause(50);
// Bytes of answers that all peers together may leave unread.
constexpr size_t kMaxUnreadBytes = size_t{64} << 20;

// Leaves nearly all descriptors to workers.
size_t MaxConnections() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kMostConnections;
  return std::clamp<size_t>(limit.rlim_cur / 16, kLeastConnections, kMostConnections);
}

absl::Status NoDescriptor(const error_code& error) {
  return absl::ResourceExhaustedError(absl::StrCat("no descriptor can be had for the status page: ", error.message()));
}

bool IsLack(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

// Returns whether an error of accept() is of the network that the peer is in, or of the socket itself, and may last.
bool MayLast(int error) { return error != 0 && error != EAGAIN && error != ECONNABORTED && error != EINTR; }

}  // namespace

absl::StatusOr<std::unique_ptr<RequestLoop>> RequestLoop::Open(rpc::Listener listener, Handlers handlers) {
  try {
    return std::unique_ptr<RequestLoop>(new RequestLoop(std::move(listener), std::move(handlers)));
  } catch (const boost::system::system_error& error) {
    return NoDescriptor(error.code());
  }
}

RequestLoop::RequestLoop(rpc::Listener listener, Handlers handlers)
    : listener_(std::move(listener)),
      handlers_(std::move(handlers)),
      max_connections_(MaxConnections()),
      context_(/*concurrency_hint=*/1) {
  for (const int descriptor : listener_.descriptors()) {
    listening_.push_back(
        {descriptor, boost::asio::posix::stream_descriptor(context_), boost::asio::steady_timer(context_)});
  }
}

RequestLoop::~RequestLoop() {
  for (Listening& listening : listening_) listening.socket.release();
}

absl::Status RequestLoop::Start() {
  for (Listening& listening : listening_) {
    error_code error;
    listening.socket.assign(listening.descriptor, error);
    if (error) return NoDescriptor(error);
    AwaitConnection(&listening);
  }
  return StartThread(
      "the status page's connections", [this] { context_.run(); }, &thread_);
}

void RequestLoop::Stop() {
  if (!thread_.joinable()) return;
  context_.stop();
  thread_.join();
}

void RequestLoop::Respond(uint64_t id, Answer answer) {
  boost::asio::post(context_, [this, id, answer = std::move(answer)]() mutable {
    const auto it = connections_.find(id);
    if (it == connections_.end() || it->second->state() != Connection::State::kServed) return;
    it->second->Respond(std::move(answer));
    BoundUnreadBytes();
  });
}

void RequestLoop::AwaitConnection(Listening* listening) {
  // An error of the wait is one of accept(), too.
  listening->socket.async_wait(boost::asio::posix::stream_descriptor::wait_read,
                               [this, listening](const error_code& /*unused*/) { AcceptFrom(listening); });
}

// One connection is accepted at a time, since its request may be there: that is read before later connections could
// take its place.
void RequestLoop::AcceptFrom(Listening* listening) {
  int error = AcceptOne(listening->descriptor);
  if (IsLack(error) && !connections_.empty()) {
    MakeRoom();
    error = AcceptOne(listening->descriptor);
  }
  if (!MayLast(error)) return AwaitConnection(listening);
  listening->pause.expires_after(kPause);
  listening->pause.async_wait([this, listening](const error_code& /*unused*/) { AwaitConnection(listening); });
}

// Asio's own accept() has no SOCK_CLOEXEC.
int RequestLoop::AcceptOne(int listener) {
  rpc::SocketAddress peer;
  peer.length = sizeof(peer.storage);
  const int descriptor =
      accept4(listener, reinterpret_cast<sockaddr*>(&peer.storage), &peer.length, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (descriptor < 0) return errno;
  GiveUpInForkedChildren(descriptor);
  tcp::socket socket(context_);
  error_code error;
  socket.assign(peer.family() == AF_INET6 ? tcp::v6() : tcp::v4(), descriptor, error);
  if (error) {
    close(descriptor);
    return error.value();
  }
  Add(std::move(socket), rpc::WithoutPort(peer.ToString()));
  return 0;
}

void RequestLoop::Add(tcp::socket socket, std::string address) {
  if (connections_.size() >= max_connections_) MakeRoom();
  const uint64_t id = next_id_++;
  ++of_address_[address];
  Connection::Handlers handlers = {[this, id](Request request) { return handlers_.serve(id, std::move(request)); },
                                   [this, id] { Drop(connections_.find(id)); }};
  auto added = std::make_shared<Connection>(std::move(socket), std::move(address), std::move(handlers));
  added->Start();
  connections_.emplace(id, std::move(added));
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
  Connection& connection = *dropped->second;
  if (connection.state() == Connection::State::kServed) handlers_.forget(dropped->first);
  connection.Close();
  const auto count = of_address_.find(connection.address());
  if (--count->second == 0) of_address_.erase(count);
  return connections_.erase(dropped);
}

}  // namespace syncbn::http
