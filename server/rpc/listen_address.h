// Where to listen, as a person writes it: HOST:PORT, unix:PATH or unix-abstract:NAME.

#ifndef SYNCBN_SERVER_RPC_LISTEN_ADDRESS_H_
#define SYNCBN_SERVER_RPC_LISTEN_ADDRESS_H_

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn::rpc {

// The argument of bind().
struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  // The port of a TCP address.
  uint16_t port() const;
  void set_port(uint16_t port);
  // Where this host alone reaches it.
  bool is_local() const;
  // "127.0.0.1:50051", "[::1]:50051".
  std::string ToString() const;
};

struct ListenAddress {
  std::string text;  // As it was written.
  // HOST of HOST:PORT, with the brackets of an IPv6 address; empty for unix sockets.
  std::string host;
  // PATH of unix:PATH, without the slashes of unix://PATH; empty for the others.
  std::string path;
  // Several where a host's name has several, in the resolver's order. At least one.
  std::vector<SocketAddress> sockets;

  bool is_tcp() const { return !host.empty(); }
  bool is_local() const;
};

// Resolves the host, which may ask a name server. INVALID_ARGUMENT, naming the address, for what is no address, a port
// beyond 65535, a host that is not known, and a path longer than a unix socket's may be.
absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view text);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LISTEN_ADDRESS_H_
