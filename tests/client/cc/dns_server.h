// A name server on loopback that knows one name, for tests of what follows when its address changes.

#ifndef SYNCBN_TESTS_CLIENT_CC_DNS_SERVER_H_
#define SYNCBN_TESTS_CLIENT_CC_DNS_SERVER_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>

#include "gtest/gtest.h"

namespace syncbn::testing {

// Answers every question for an IPv4 address with 127.0.0.`last`, and every other question with no answer.
class DnsServer {
 public:
  DnsServer() {
    socket_ = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    socklen_t length = sizeof(address);
    getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    EXPECT_EQ(pipe(wake_), 0);
    thread_ = std::thread([this] { Run(); });
  }

  ~DnsServer() {
    EXPECT_EQ(write(wake_[1], "x", 1), 1);
    thread_.join();
    for (const int descriptor : {socket_, wake_[0], wake_[1]}) close(descriptor);
  }

  int port() const { return port_; }
  void Answer(uint8_t last) { last_ = last; }

 private:
  static constexpr size_t kHeader = 12;
  static constexpr uint8_t kTypeA = 1;

  void Run() {
    while (true) {
      pollfd ready[2] = {{socket_, POLLIN, 0}, {wake_[0], POLLIN, 0}};
      poll(ready, 2, -1);
      if (ready[1].revents != 0) return;
      uint8_t packet[1024];
      sockaddr_in from = {};
      socklen_t length = sizeof(from);
      const ssize_t size = recvfrom(socket_, packet, 512, 0, reinterpret_cast<sockaddr*>(&from), &length);
      if (size < static_cast<ssize_t>(kHeader) + 5) continue;
      const size_t answer = Respond(packet, static_cast<size_t>(size));
      sendto(socket_, packet, answer, 0, reinterpret_cast<sockaddr*>(&from), length);
    }
  }

  // Makes the question its answer; returns the length.
  size_t Respond(uint8_t* packet, size_t size) const {
    size_t end = kHeader;  // The question's: labels, 0, type, class.
    while (end < size && packet[end] != 0) end += packet[end] + size_t{1};
    const bool wants_address = packet[end + 2] == kTypeA;
    end += 5;
    packet[2] = 0x84;  // A response, with authority.
    packet[3] = 0;
    std::memset(packet + 6, 0, 6);  // No answers, no additional records.
    if (!wants_address) return end;
    packet[7] = 1;
    const uint8_t record[] = {0xc0, kHeader, 0, kTypeA, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, last_};
    std::memcpy(packet + end, record, sizeof(record));
    return end + sizeof(record);
  }

  int socket_ = -1;
  int port_ = 0;
  int wake_[2] = {-1, -1};
  std::atomic<uint8_t> last_{1};
  std::thread thread_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_DNS_SERVER_H_
