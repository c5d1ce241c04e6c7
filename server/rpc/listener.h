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

// Not thread-safe.
class Listener {
 public:
  // Listens on every address that the host's name stands for, all of them on one port. An address of a name that this
  // host does not have (::1 where there is no IPv6) is passed over if another can be listened on.
  //
  // A unix socket's file that nobody serves is replaced; a file of another kind is left alone.
  // Errors: UNAVAILABLE, naming the address and the system's reason.
  static absl::StatusOr<Listener> Open(const ListenAddress& address);

  Listener(Listener&& other) noexcept;
  Listener& operator=(Listener&& other) noexcept;
  // Closes the sockets, and removes a unix socket's file if it is still this one's.
  ~Listener();

  // Non-blocking.
  const std::vector<int>& descriptors() const { return descriptors_; }
  const std::string& text() const { return address_.text; }
  // The target that a client passes to reach it: the port where any was asked for.
  std::string target() const;
  // 0 for unix sockets.
  int port() const { return port_; }

  // A unix socket's file is gone or has become another's, so that nobody can connect any more.
  bool IsUnreachable() const;
  // Closes the sockets and opens them anew, on the port that they had. After an error there are none, and it may be
  // tried again.
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
