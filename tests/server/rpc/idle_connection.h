// A TCP connection that says nothing.

#ifndef SYNCBN_TESTS_SERVER_RPC_IDLE_CONNECTION_H_
#define SYNCBN_TESTS_SERVER_RPC_IDLE_CONNECTION_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>

#include "gtest/gtest.h"

namespace syncbn::testing {

// Thread safety: none.
class Idle {
 public:
  // Connects to a port of 127.0.0.1, from an address of this machine.
  explicit Idle(int port, const char* from = "127.0.0.1")
      : descriptor_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    inet_pton(AF_INET, from, &address.sin_addr);
    EXPECT_EQ(bind(descriptor_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(descriptor_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~Idle() { close(descriptor_); }
  Idle(const Idle&) = delete;
  Idle& operator=(const Idle&) = delete;

  int descriptor() const { return descriptor_; }

  // Waits for the server's first bytes (its settings), or for the end: false.
  bool Greeted() {
    constexpr int kPatienceMs = 60000;
    char byte;
    pollfd wait = {descriptor_, POLLIN, 0};
    return poll(&wait, 1, kPatienceMs) == 1 && recv(descriptor_, &byte, 1, 0) == 1;
  }

 private:
  const int descriptor_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_RPC_IDLE_CONNECTION_H_
