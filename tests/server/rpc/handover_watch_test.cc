// Connections that keep the acceptor's thread inside gRPC, by its CPU time and the bytes that are read meanwhile.

#include "server/rpc/handover_watch.h"

#include <memory>

#include "gtest/gtest.h"
#include "server/rpc/connections.h"
#include "tests/server/rpc/loopback.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kKiB = size_t{1} << 10;

class HandoverWatchTest : public ::testing::Test {
 protected:
  // The acceptor begins to hand the connection to gRPC.
  void Begin(const testing::Pair& connection) {
    ++handover_.number;
    handover_.descriptor = connection.descriptor();
    watch_.Look();
  }
  // Its thread spends so much time, and the watch looks.
  void Spend(int ms) {
    handover_.cpu += absl::Milliseconds(ms);
    watch_.Look();
  }

  Connections connections_{1024, 0};
  testing::Loopback loopback_{&connections_};
  Handover handover_;
  HandoverWatch watch_{&connections_, [this] { return handover_; }};
};

TEST_F(HandoverWatchTest, FewBytesThatKeepTheThreadBusyAreAFlood) {
  const auto flood = loopback_.Accept();
  Begin(*flood);
  Spend(5);
  flood->Receive(64 * kKiB);
  Spend(10);
  EXPECT_FALSE(flood->open());
  EXPECT_TRUE(connections_.flooded());
}

// Whatever moves by other connections, on other threads.
TEST_F(HandoverWatchTest, OthersBytesAreNotToItsCredit) {
  const auto flood = loopback_.Accept();
  const auto worker = loopback_.AcceptWorker();
  Begin(*flood);
  Spend(5);
  flood->Receive(64 * kKiB);
  worker->Receive(8192 * kKiB);
  Spend(10);
  EXPECT_FALSE(flood->open());
  EXPECT_TRUE(worker->open());
}

TEST_F(HandoverWatchTest, ALongFirstFrameIsNone) {
  const auto joins = loopback_.Accept();
  Begin(*joins);
  Spend(5);
  joins->Receive(1024 * kKiB);
  Spend(10);
  EXPECT_TRUE(joins->open());
}

TEST_F(HandoverWatchTest, AHandshakeIsNoneHoweverLongItTakes) {
  const auto joins = loopback_.Accept();
  Begin(*joins);
  Spend(5);
  joins->Receive(4 * kKiB);
  Spend(100);
  EXPECT_TRUE(joins->open());
}

TEST_F(HandoverWatchTest, ShortHandoversAreNoneHoweverManyThereAre) {
  for (int i = 0; i < 20; ++i) {
    const auto connection = loopback_.Accept();
    Begin(*connection);
    connection->Receive(16 * kKiB);
    Spend(3);
    handover_.descriptor = -1;
    Spend(3);
    EXPECT_TRUE(connection->open());
  }
}

}  // namespace
}  // namespace syncbn::rpc
