// An address to listen on, as people write it: HOST:PORT, unix:PATH or unix-abstract:NAME.

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
  // The port; for TCP addresses only.
  uint16_t port() const;
  void set_port(uint16_t port);
  // Returns whether only this machine can reach the address.
  bool is_local() const;
  // Returns whether it stands for all addresses of this machine of its family.
  bool is_wildcard() const;
  // Returns text such as "127.0.0.1:50051" or "[::1]:50051".
  std::string ToString() const;
};

// Returns such a text without its port, "127.0.0.1" or "[::1]"; an empty one if it is empty.
std::string WithoutPort(absl::string_view address);

struct ListenAddress {
  std::string text;  // As it was written.
  // The host of HOST:PORT, with the brackets of an IPv6 address; empty for unix sockets.
  std::string host;
  // The path of unix:PATH, without the slashes of unix://PATH; empty for the others.
  std::string path;
  // At least one; several if the host's name has several, in the resolver's order.
  std::vector<SocketAddress> sockets;

  bool is_tcp() const { return !host.empty(); }
  bool is_local() const;
};

// Parses the address and resolves its host, which may ask a name server.
//
// Errors: INVALID_ARGUMENT, naming the address: malformed text, a port beyond 65535, an unknown host, or a path that is
// too long for a unix socket.
// Thread safety: any thread may call it.
absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view text);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LISTEN_ADDRESS_H_
