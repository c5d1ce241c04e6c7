#include "server/rpc/listener.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "plumbing/fork_sockets.h"

namespace syncbn::rpc {
namespace {

// Length of the backlog; the system uses the lesser of this and net.core.somaxconn.
constexpr int kBacklog = 4096;
// Attempts to find a port that is free on all addresses of a name.
constexpr int kPortAttempts = 16;

// Returns the system's text for use within a sentence: "address already in use".
std::string Reason(int error) {
  char buffer[256];
  std::string text = strerror_r(error, buffer, sizeof(buffer));
  if (text.size() > 1 && absl::ascii_islower(text[1])) text[0] = absl::ascii_tolower(text[0]);
  return text;
}

absl::Status CannotListen(const ListenAddress& address, const std::string& where, const std::string& reason) {
  const std::string detail = where.empty() || where == address.text ? "" : absl::StrCat(" (", where, ")");
  return absl::UnavailableError(absl::StrCat("cannot listen on \"", address.text, "\"", detail, ": ", reason));
}

// Returns a listening socket, or the negative of an errno.
int ListenOn(const SocketAddress& address, bool alone) {
  const int descriptor = socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (descriptor < 0) return -errno;
  const auto set = [descriptor](int level, int name, int value) {
    return setsockopt(descriptor, level, name, &value, sizeof(value)) == 0;
  };
  bool done = true;
  // Reuse the port while connections of an earlier master on it time out. A master that listens still excludes others.
  if (address.family() != AF_UNIX) done = set(SOL_SOCKET, SO_REUSEADDR, 1);
  // [::] alone includes the IPv4 addresses of this machine.
  if (address.family() == AF_INET6)
    done = done && set(IPPROTO_IPV6, IPV6_V6ONLY, alone && address.is_wildcard() ? 0 : 1);
  done = done && bind(descriptor, address.get(), address.length) == 0 && listen(descriptor, kBacklog) == 0;
  if (done) return descriptor;
  const int error = errno;
  close(descriptor);
  return -error;
}

uint16_t PortOf(int descriptor) {
  SocketAddress address;
  address.length = sizeof(address.storage);
  getsockname(descriptor, reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address.port();
}

// Returns whether a process serves on the socket; it may be too busy to answer.
bool IsServed(const SocketAddress& address) {
  const int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (descriptor < 0) return true;
  const bool refused = connect(descriptor, address.get(), address.length) != 0 && errno == ECONNREFUSED;
  close(descriptor);
  return !refused;
}

}  // namespace

absl::StatusOr<Listener> Listener::Open(const ListenAddress& address) {
  Listener listener(address);
  if (absl::Status status = listener.Reopen(); !status.ok()) return status;
  return listener;
}

Listener::Listener(Listener&& other) noexcept
    : address_(std::move(other.address_)),
      descriptors_(std::exchange(other.descriptors_, {})),
      port_(other.port_),
      device_(other.device_),
      inode_(std::exchange(other.inode_, 0)) {}

Listener& Listener::operator=(Listener&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(descriptors_, other.descriptors_);
  std::swap(port_, other.port_);
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
  return *this;
}

Listener::~Listener() { Close(); }

std::string Listener::target() const {
  return address_.is_tcp() ? absl::StrCat(address_.host, ":", port_) : address_.text;
}

absl::Status Listener::Reopen() {
  Close();
  if (absl::Status status = address_.is_tcp() ? OpenTcp() : OpenUnix(); !status.ok()) return status;
  for (const int descriptor : descriptors_) GiveUpInForkedChildren(descriptor);
  return absl::OkStatus();
}

absl::Status Listener::OpenTcp() {
  const bool any_port = port_ == 0 && address_.sockets.front().port() == 0;
  const bool alone = address_.sockets.size() == 1;
  absl::Status status;
  for (int attempt = 0; attempt < kPortAttempts; ++attempt) {
    Close();
    status = absl::OkStatus();
    uint16_t port = port_ != 0 ? static_cast<uint16_t>(port_) : address_.sockets.front().port();
    bool taken = false;
    for (SocketAddress socket : address_.sockets) {
      socket.set_port(port);
      const int descriptor = ListenOn(socket, alone);
      if (descriptor >= 0) {
        descriptors_.push_back(descriptor);
        if (port == 0) port = PortOf(descriptor);
        continue;
      }
      status = CannotListen(address_, socket.ToString(), Reason(-descriptor));
      const bool absent = descriptor == -EADDRNOTAVAIL || descriptor == -EAFNOSUPPORT;
      if (absent) continue;
      taken = descriptor == -EADDRINUSE && !descriptors_.empty();
      Close();
      break;
    }
    if (!descriptors_.empty()) {
      port_ = port;
      return absl::OkStatus();
    }
    if (!any_port || !taken) break;
  }
  return status;
}

absl::Status Listener::OpenUnix() {
  const SocketAddress& address = address_.sockets.front();
  const char* const path = address_.path.c_str();
  struct stat status;
  if (!address_.path.empty() && lstat(path, &status) == 0) {
    if (!S_ISSOCK(status.st_mode)) return CannotListen(address_, "", "there is a file of another kind at this path");
    if (IsServed(address)) return CannotListen(address_, "", Reason(EADDRINUSE));
    unlink(path);  // Left by an earlier process. If it cannot be removed, bind() reports the reason.
  }
  const int descriptor = ListenOn(address, /*alone=*/true);
  if (descriptor < 0) return CannotListen(address_, "", Reason(-descriptor));
  descriptors_.push_back(descriptor);
  if (!address_.path.empty() && lstat(path, &status) == 0) {
    device_ = status.st_dev;
    inode_ = status.st_ino;
  }
  return absl::OkStatus();
}

bool Listener::IsUnreachable() const {
  if (inode_ == 0) return false;
  struct stat status;
  return lstat(address_.path.c_str(), &status) != 0 || status.st_dev != device_ || status.st_ino != inode_;
}

void Listener::Close() {
  if (inode_ != 0 && !IsUnreachable()) unlink(address_.path.c_str());
  inode_ = 0;
  for (const int descriptor : descriptors_) close(descriptor);
  descriptors_.clear();
}

}  // namespace syncbn::rpc
