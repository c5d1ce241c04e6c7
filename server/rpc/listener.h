// The listening sockets of one address.

#ifndef SYNCBN_SERVER_RPC_LISTENER_H_
#define SYNCBN_SERVER_RPC_LISTENER_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/rpc/listen_address.h"

namespace syncbn::rpc {

// Thread safety: none.
class Listener {
 public:
  // Listens on every address of the host's name, all on one port. Skips addresses that this machine does not have (::1
  // without IPv6), if at least one remains. Replaces the file of a unix socket that nobody serves, but no other file.
  //
  // Errors: UNAVAILABLE, naming the address and the system's reason.
  static absl::StatusOr<Listener> Open(const ListenAddress& address);

  Listener(Listener&& other) noexcept;
  Listener& operator=(Listener&& other) noexcept;
  // Closes the sockets, and removes a unix socket's file unless it has been replaced.
  ~Listener();

  // The listening sockets, which are non-blocking.
  const std::vector<int>& descriptors() const { return descriptors_; }
  const std::string& text() const { return address_.text; }
  // Returns the target by which clients reach this address, with the actual port.
  std::string target() const;
  // Returns the port; 0 for unix sockets.
  int port() const { return port_; }

  // Returns whether a unix socket's file has gone or been replaced, so that nobody can connect any more.
  bool IsUnreachable() const;
  // Closes the sockets and opens them again, on the same port. After an error no socket is open, and the call may be
  // repeated. Errors: those of Open.
  absl::Status Reopen();

 private:
  explicit Listener(const ListenAddress& address) : address_(address) {}

  absl::Status OpenTcp();
  absl::Status OpenUnix();
  void Close();

  ListenAddress address_;
  std::vector<int> descriptors_;
  int port_ = 0;
  // The unix socket's file.
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LISTENER_H_
