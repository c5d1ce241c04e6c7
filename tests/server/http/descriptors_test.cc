// Connections of a process that may open no more descriptors.

#include <sys/resource.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/http/request_loop.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/listener.h"
#include "tests/server/http/served_loop.h"

namespace syncbn::http {
namespace {

using ::testing::HasSubstr;

constexpr char kRequest[] = "GET /a HTTP/1.1\r\nHost: b\r\n\r\n";

// Leaves the process a number of descriptors as long as it exists.
class DescriptorsLeft {
 public:
  explicit DescriptorsLeft(int number) {
    const int next = dup(STDIN_FILENO);
    close(next);
    getrlimit(RLIMIT_NOFILE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(next + number);
    EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  ~DescriptorsLeft() { setrlimit(RLIMIT_NOFILE, &before_); }
  DescriptorsLeft(const DescriptorsLeft&) = delete;
  DescriptorsLeft& operator=(const DescriptorsLeft&) = delete;

 private:
  rlimit before_ = {};
};

TEST(DescriptorsTest, NoDescriptorIsAnError) {
  for (int number = 0; number < 2; ++number) {
    const auto address = rpc::ParseListenAddress("127.0.0.1:0");
    auto listener = rpc::Listener::Open(*address);
    ASSERT_TRUE(listener.ok()) << listener.status();
    const DescriptorsLeft left(number);
    const auto loop = RequestLoop::Open(*std::move(listener), {});
    EXPECT_EQ(loop.status().code(), absl::StatusCode::kResourceExhausted) << number;
    EXPECT_THAT(std::string(loop.status().message()), HasSubstr("Too many open files"));
  }
}

TEST(DescriptorsTest, APeerWaitsWhileThereIsNoDescriptor) {
  ServedLoop loop;
  auto left = std::make_unique<DescriptorsLeft>(1);
  Peer peer(loop, kRequest);
  left.reset();
  EXPECT_THAT(peer.ReadAll(), HasSubstr("GET /a b "));
}

TEST(DescriptorsTest, ANewPeerGetsTheDescriptorOfAnotherIfThereIsNone) {
  ServedLoop loop;
  const DescriptorsLeft left(3);
  Peer slow(loop, "GET /");
  EXPECT_THAT(Peer(loop, kRequest).ReadAll(), HasSubstr("GET /a b "));
  EXPECT_EQ(slow.ReadAll(), "");
}

}  // namespace
}  // namespace syncbn::http
