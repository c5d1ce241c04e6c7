// A loop that serves, and the peers that connect to it.

#ifndef SYNCBN_TESTS_SERVER_HTTP_SERVED_LOOP_H_
#define SYNCBN_TESTS_SERVER_HTTP_SERVED_LOOP_H_

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gtest/gtest.h"
#include "server/http/connection.h"
#include "server/http/request_loop.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/listener.h"

namespace syncbn::http {

// Answers each request with its method, path, host and authorization; but those to /later get their answer from the
// test, and /later?precious is precious. Its locks are the standard library's, which ThreadSanitizer sees.
//
// Thread safety: any thread may call any method.
class ServedLoop {
 public:
  ServedLoop() {
    const auto address = rpc::ParseListenAddress("127.0.0.1:0");
    auto listener = rpc::Listener::Open(*address);
    EXPECT_TRUE(listener.ok()) << listener.status();
    RequestLoop::Handlers handlers;
    handlers.serve = [this](uint64_t id, const Request& request) { return Serve(id, request); };
    handlers.forget = [this](uint64_t /*id*/) { ++forgotten_; };
    auto loop = RequestLoop::Open(*std::move(listener), std::move(handlers));
    EXPECT_TRUE(loop.ok()) << loop.status();
    loop_ = *std::move(loop);
    const absl::Status status = loop_->Start();
    EXPECT_TRUE(status.ok()) << status;
  }
  ~ServedLoop() { loop_->Stop(); }
  ServedLoop(const ServedLoop&) = delete;
  ServedLoop& operator=(const ServedLoop&) = delete;

  std::string target() const { return loop_->target(); }
  // Waits for a request to /later. Returns the number of the oldest that has not been returned.
  uint64_t TakeLater() {
    std::unique_lock<std::mutex> lock(mutex_);
    come_.wait(lock, [this] { return !later_.empty(); });
    const uint64_t id = later_.front();
    later_.pop_front();
    return id;
  }
  void Respond(uint64_t id, std::string body) { loop_->Respond(id, {200, kText, std::move(body)}); }
  // Returns the number of requests to /later whose connection ended before the answer.
  int forgotten() const { return forgotten_; }

 private:
  Connection::Served Serve(uint64_t id, const Request& request) {
    if (request.path != "/later") {
      return {Answer{200, kText,
                     absl::StrCat(request.method, " ", request.path, " ", request.host.value_or("nobody"), " ",
                                  request.authorization)}};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    later_.push_back(id);
    come_.notify_one();
    return {std::nullopt, request.query == "precious"};
  }

  std::mutex mutex_;
  std::condition_variable come_;
  std::deque<uint64_t> later_;
  std::atomic<int> forgotten_{0};
  std::unique_ptr<RequestLoop> loop_;
};

// A connection to a loop.
//
// Thread safety: none.
class Peer {
 public:
  // Connects, and sends the bytes.
  Peer(const ServedLoop& loop, absl::string_view bytes) : descriptor_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    const auto address = rpc::ParseListenAddress(loop.target());
    const rpc::SocketAddress& to = address->sockets.front();
    EXPECT_EQ(connect(descriptor_, to.get(), to.length), 0);
    Send(bytes);
  }
  ~Peer() { Close(); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  // Sends the bytes, or those that the loop takes until it closes the connection.
  void Send(absl::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(descriptor_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent < 0) return;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  void EndSending() { shutdown(descriptor_, SHUT_WR); }
  // Closes the connection so that the loop's next read or write fails.
  void Reset() {
    const linger none = {1, 0};
    setsockopt(descriptor_, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
    Close();
  }
  // Returns all that comes until the loop ends or resets the connection.
  std::string ReadAll() {
    constexpr int kPatienceMs = 60000;
    std::string all;
    char buffer[4096];
    for (;;) {
      pollfd wait = {descriptor_, POLLIN, 0};
      if (poll(&wait, 1, kPatienceMs) != 1) return "the connection goes on";
      const ssize_t count = recv(descriptor_, buffer, sizeof(buffer), 0);
      if (count <= 0) return all;
      all.append(buffer, static_cast<size_t>(count));
    }
  }

 private:
  void Close() {
    if (descriptor_ >= 0) close(std::exchange(descriptor_, -1));
  }

  int descriptor_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_TESTS_SERVER_HTTP_SERVED_LOOP_H_
