// Connections over loopback with both ends in the test, as Connections sees them.

#ifndef SYNCBN_TESTS_SERVER_RPC_LOOPBACK_H_
#define SYNCBN_TESTS_SERVER_RPC_LOOPBACK_H_

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/rpc/connections.h"
#include "server/rpc/listen_address.h"
#include "tests/server/rpc/idle_connection.h"

namespace syncbn::testing {

// A client's connection, and the server's end of it, which `connections` knows.
//
// Thread safety: none.
class Pair {
 public:
  Pair(int listener, int port, rpc::Connections* connections)
      : client_(port), server_(accept(listener, nullptr, nullptr)) {
    rpc::SocketAddress address;
    address.length = sizeof(address.storage);
    EXPECT_EQ(getpeername(server_, reinterpret_cast<sockaddr*>(&address.storage), &address.length), 0);
    peer_ = address.ToString();
    EXPECT_EQ(connections->Add(server_, address), "");
  }
  ~Pair() { close(server_); }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  const std::string& peer() const { return peer_; }
  // Returns the server's end.
  int descriptor() const { return server_; }
  // The client sends, and the server reads it all.
  void Receive(size_t bytes) { Move(client_.descriptor(), server_, bytes); }
  // The client sends, and the server reads nothing. No more than a connection's buffers take.
  void Arrive(size_t bytes) {
    const std::vector<char> sent(bytes);
    ASSERT_EQ(send(client_.descriptor(), sent.data(), bytes, 0), static_cast<ssize_t>(bytes));
  }
  // The server sends, and the client reads it all.
  void Send(size_t bytes) { Move(server_, client_.descriptor(), bytes); }
  // Returns whether the connection was left alone.
  bool open() const {
    char byte = 0;
    return send(client_.descriptor(), &byte, 1, MSG_NOSIGNAL) == 1 && recv(server_, &byte, 1, 0) == 1;
  }

 private:
  static void Move(int from, int to, size_t bytes) {
    std::vector<char> piece(size_t{16} << 10);
    for (size_t moved = 0; moved < bytes;) {
      const size_t size = std::min(piece.size(), bytes - moved);
      ASSERT_EQ(send(from, piece.data(), size, 0), static_cast<ssize_t>(size));
      ASSERT_EQ(recv(to, piece.data(), size, MSG_WAITALL), static_cast<ssize_t>(size));
      moved += size;
    }
  }

  Idle client_;
  const int server_;
  std::string peer_;
};

// The address that clients connect to. Thread safety: none.
class Loopback {
 public:
  // `connections` must outlive the object.
  explicit Loopback(rpc::Connections* connections)
      : connections_(connections), listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), length), 0);
    EXPECT_EQ(listen(listener_, 64), 0);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length), 0);
    port_ = ntohs(address.sin_port);
  }
  ~Loopback() { close(listener_); }
  Loopback(const Loopback&) = delete;
  Loopback& operator=(const Loopback&) = delete;

  // A stranger connects.
  std::unique_ptr<Pair> Accept() { return std::make_unique<Pair>(listener_, port_, connections_); }
  // A worker connects, and joins.
  std::unique_ptr<Pair> AcceptWorker() {
    auto pair = Accept();
    connections_->Joined(pair->peer());
    return pair;
  }

 private:
  rpc::Connections* const connections_;
  const int listener_;
  int port_ = 0;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_RPC_LOOPBACK_H_
