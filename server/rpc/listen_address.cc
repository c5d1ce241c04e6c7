#include "server/rpc/listen_address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stddef.h>
#include <sys/un.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace syncbn::rpc {
namespace {

// Longest path of a unix socket, or name of an abstract one: one byte of sun_path ends a path or begins a name.
constexpr size_t kMaxPath = sizeof(sockaddr_un::sun_path) - 1;

absl::Status Malformed(absl::string_view text, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": ", what));
}

absl::Status NotAnAddress(absl::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is neither HOST:PORT nor unix:PATH"));
}

bool IsLoopback(const in_addr& address) { return ntohl(address.s_addr) >> 24 == 127; }

bool IsLoopback(const in6_addr& address) {
  return IN6_IS_ADDR_LOOPBACK(&address) || (IN6_IS_ADDR_V4MAPPED(&address) && address.s6_addr[12] == 127);
}

const sockaddr_in& Inet4(const SocketAddress& a) { return reinterpret_cast<const sockaddr_in&>(a.storage); }
const sockaddr_in6& Inet6(const SocketAddress& a) { return reinterpret_cast<const sockaddr_in6&>(a.storage); }

absl::StatusOr<ListenAddress> ParseUnix(absl::string_view text, absl::string_view path, bool abstract) {
  if (absl::StartsWith(path, "//")) {
    path.remove_prefix(2);
    if (!abstract && !absl::StartsWith(path, "/"))
      return Malformed(text, "a path after \"unix://\" begins with a slash");
  }
  if (path.empty()) return NotAnAddress(text);
  if (path.size() > kMaxPath) {
    return Malformed(
        text, absl::StrCat("the path is ", path.size(), " bytes long; that of a unix socket has at most ", kMaxPath));
  }
  ListenAddress address;
  address.text = std::string(text);
  if (!abstract) address.path = std::string(path);
  SocketAddress& socket = address.sockets.emplace_back();
  auto& storage = reinterpret_cast<sockaddr_un&>(socket.storage);
  storage.sun_family = AF_UNIX;
  // A path has a zero byte at its end, an abstract name at its beginning; both count.
  path.copy(storage.sun_path + (abstract ? 1 : 0), path.size());
  socket.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + 1);
  return address;
}

// Returns whether the text is a whole number, with or without a sign.
bool IsNumber(absl::string_view text) {
  if (absl::StartsWith(text, "-") || absl::StartsWith(text, "+")) text.remove_prefix(1);
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return absl::ascii_isdigit(c); });
}

absl::StatusOr<uint16_t> ParsePort(absl::string_view text, absl::string_view port) {
  if (!IsNumber(port))
    return Malformed(text, absl::StrCat("no such host or port: port \"", port, "\" is not a number"));
  int value = -1;
  if (!absl::ascii_isdigit(port[0]) || !absl::SimpleAtoi(port, &value) || value > 65535) {
    return Malformed(text, absl::StrCat("port ", port, " is not in 0 .. 65535"));
  }
  return static_cast<uint16_t>(value);
}

absl::StatusOr<ListenAddress> ParseTcp(absl::string_view text) {
  if (absl::StrContains(text, "://")) return Malformed(text, "is a URL; an address is HOST:PORT or unix:PATH");
  if (absl::StrContains(text, ",")) return Malformed(text, "has a comma; each address is given by itself");
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 || colon + 1 == text.size()) return NotAnAddress(text);
  const absl::string_view host = text.substr(0, colon);
  absl::string_view name = host;
  const bool brackets = absl::StartsWith(host, "[") && absl::EndsWith(host, "]");
  if (brackets) name = host.substr(1, host.size() - 2);
  if (!brackets && absl::StrContains(host, ":")) {
    return Malformed(text, "an IPv6 address stands in brackets, as in \"[::1]:50051\"");
  }
  const auto port = ParsePort(text, text.substr(colon + 1));
  if (!port.ok()) return port.status();
  addrinfo hints = {};
  hints.ai_family = brackets ? AF_INET6 : AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | (brackets ? AI_NUMERICHOST : 0);
  addrinfo* found = nullptr;
  const int error = getaddrinfo(std::string(name).c_str(), nullptr, &hints, &found);
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owned(found, freeaddrinfo);
  if (error != 0 || found == nullptr) {
    return Malformed(text, absl::StrCat("no such host or port: ", absl::AsciiStrToLower(gai_strerror(error))));
  }
  ListenAddress address;
  address.text = std::string(text);
  address.host = std::string(host);
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    if (info->ai_family != AF_INET && info->ai_family != AF_INET6) continue;
    SocketAddress socket;
    std::memcpy(&socket.storage, info->ai_addr, info->ai_addrlen);
    socket.length = info->ai_addrlen;
    socket.set_port(*port);
    // A host's name may resolve to one address twice, as "localhost" does by many an /etc/hosts.
    const auto same = [&socket](const SocketAddress& other) { return other.ToString() == socket.ToString(); };
    if (std::none_of(address.sockets.begin(), address.sockets.end(), same)) address.sockets.push_back(socket);
  }
  if (address.sockets.empty()) return Malformed(text, "no such host or port");
  return address;
}

}  // namespace

uint16_t SocketAddress::port() const {
  return ntohs(family() == AF_INET ? Inet4(*this).sin_port : Inet6(*this).sin6_port);
}

void SocketAddress::set_port(uint16_t port) {
  if (family() == AF_INET) {
    reinterpret_cast<sockaddr_in&>(storage).sin_port = htons(port);
  } else {
    reinterpret_cast<sockaddr_in6&>(storage).sin6_port = htons(port);
  }
}

bool SocketAddress::is_local() const {
  if (family() == AF_UNIX) return true;
  return family() == AF_INET ? IsLoopback(Inet4(*this).sin_addr) : IsLoopback(Inet6(*this).sin6_addr);
}

bool SocketAddress::is_wildcard() const {
  if (family() == AF_INET6) return IN6_IS_ADDR_UNSPECIFIED(&Inet6(*this).sin6_addr);
  return family() == AF_INET && Inet4(*this).sin_addr.s_addr == htonl(INADDR_ANY);
}

std::string SocketAddress::ToString() const {
  char text[INET6_ADDRSTRLEN] = "";
  if (family() == AF_INET) {
    inet_ntop(AF_INET, &Inet4(*this).sin_addr, text, sizeof(text));
    return absl::StrCat(text, ":", port());
  }
  if (family() == AF_INET6) {
    inet_ntop(AF_INET6, &Inet6(*this).sin6_addr, text, sizeof(text));
    return absl::StrCat("[", text, "]:", port());
  }
  return "a unix socket";
}

std::string WithoutPort(absl::string_view address) { return std::string(address.substr(0, address.rfind(':'))); }

bool ListenAddress::is_local() const {
  return std::all_of(sockets.begin(), sockets.end(), [](const SocketAddress& socket) { return socket.is_local(); });
}

absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view text) {
  if (text.find('\0') != absl::string_view::npos) return NotAnAddress(text.substr(0, text.find('\0')));
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "unix-abstract:")) return ParseUnix(text, rest, /*abstract=*/true);
  if (absl::ConsumePrefix(&rest, "unix:")) return ParseUnix(text, rest, /*abstract=*/false);
  return ParseTcp(text);
}

}  // namespace syncbn::rpc
