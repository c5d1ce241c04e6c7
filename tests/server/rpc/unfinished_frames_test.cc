// Frames that begin and do not end: how much of them may be kept, and for how long.

#include <sys/socket.h>

#include <array>
#include <memory>

#include "gtest/gtest.h"
#include "server/rpc/connections.h"
#include "tests/server/rpc/loopback.h"

namespace syncbn::rpc {
namespace {

using testing::Loopback;
using testing::Pair;

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kMostUnfinished = 7 * kMiB;
constexpr size_t kMostOfStrangers = kMiB;

class UnfinishedFramesTest : public ::testing::Test {
 protected:
  // The connection sends a frame, all of which comes.
  void Finish(Pair& pair, size_t bytes) {
    pair.Receive(bytes);
    connections_.FramesOf(pair.peer())->Add(bytes);
  }

  // Frames that have begun at one check are overdue at the next.
  Connections connections_{1024, 0, kMostUnfinished, absl::ZeroDuration(), kMostOfStrangers};
  Loopback loopback_{&connections_};
};

TEST_F(UnfinishedFramesTest, FramesThatComeTakeNothing) {
  const auto worker = loopback_.AcceptWorker();
  for (int i = 0; i < 20; ++i) {
    Finish(*worker, kMiB);
    connections_.Check();
  }
  EXPECT_TRUE(worker->open());
}

TEST_F(UnfinishedFramesTest, AFrameThatDoesNotEndEndsItsConnection) {
  const auto worker = loopback_.AcceptWorker(), other = loopback_.AcceptWorker();
  worker->Receive(3 * kMiB);
  connections_.Check();
  EXPECT_TRUE(worker->open());
  connections_.Check();
  EXPECT_FALSE(worker->open());
  EXPECT_TRUE(other->open());
}

TEST_F(UnfinishedFramesTest, AFrameThatEndsInTimeDoesNot) {
  const auto worker = loopback_.AcceptWorker();
  for (int i = 0; i < 5; ++i) {
    worker->Receive(3 * kMiB);
    connections_.Check();
    connections_.FramesOf(worker->peer())->Add(3 * kMiB);
    connections_.Check();
  }
  EXPECT_TRUE(worker->open());
}

// Frames of many streams may be unfinished at every single look.
TEST_F(UnfinishedFramesTest, OthersMayHaveBegunMeanwhile) {
  const auto worker = loopback_.AcceptWorker();
  for (int i = 0; i < 5; ++i) {
    worker->Receive(3 * kMiB);
    connections_.Check();
    Finish(*worker, 3 * kMiB);
    connections_.FramesOf(worker->peer())->Add(2 * kMiB);
  }
  EXPECT_TRUE(worker->open());
}

TEST_F(UnfinishedFramesTest, AFewFramesBesideItDoNotHideOne) {
  const auto worker = loopback_.AcceptWorker();
  worker->Receive(5 * kMiB);
  connections_.Check();
  Finish(*worker, kMiB);
  connections_.Check();
  EXPECT_FALSE(worker->open());
}

TEST_F(UnfinishedFramesTest, TheGreediestConnectionEndsWhereAllTakeTooMuch) {
  const auto some = loopback_.AcceptWorker(), most = loopback_.AcceptWorker();
  some->Receive(4 * kMiB);
  most->Receive(6 * kMiB);
  connections_.Check();
  EXPECT_TRUE(some->open());
  EXPECT_FALSE(most->open());
}

TEST_F(UnfinishedFramesTest, StrangersMayHoldLessAndAllOfThemTogether) {
  const auto worker = loopback_.AcceptWorker();
  const std::array strangers = {loopback_.Accept(), loopback_.Accept(), loopback_.Accept()};
  worker->Receive(3 * kMiB);
  strangers[0]->Receive(kMiB / 2);
  strangers[1]->Receive(3 * kMiB / 4);
  strangers[2]->Receive(kMiB);
  connections_.Check();
  EXPECT_TRUE(worker->open());
  EXPECT_TRUE(strangers[0]->open());
  EXPECT_FALSE(strangers[1]->open());
  EXPECT_FALSE(strangers[2]->open());
}

// gRPC frees what it holds of a connection some time after that has ended, and others must not fill memory meanwhile.
TEST_F(UnfinishedFramesTest, AnEndedConnectionCountsUntilItIsClosed) {
  auto ended = loopback_.Accept();
  ended->Receive(3 * kMiB / 2);
  connections_.Check();
  ASSERT_FALSE(ended->open());
  const auto next = loopback_.Accept(), little = loopback_.Accept(), worker = loopback_.AcceptWorker();
  next->Receive(kMiB / 2);
  little->Receive(48 << 10);
  worker->Receive(3 * kMiB);
  connections_.Check();
  EXPECT_FALSE(next->open());
  EXPECT_TRUE(little->open());
  EXPECT_TRUE(worker->open());
}

// It would hold all of it by the next check.
TEST_F(UnfinishedFramesTest, WhatWaitsToBeReadCountsThenToo) {
  const auto ended = loopback_.Accept(), next = loopback_.Accept(), worker = loopback_.AcceptWorker();
  next->Arrive(96 << 10);
  worker->Arrive(96 << 10);
  connections_.Check();
  ASSERT_TRUE(next->open());
  ended->Receive(3 * kMiB / 2);
  connections_.Check();
  ASSERT_FALSE(ended->open());
  connections_.Check();
  EXPECT_FALSE(next->open());
  EXPECT_TRUE(worker->open());
}

TEST_F(UnfinishedFramesTest, AnEndedConnectionCountsNoMoreOnceItIsClosed) {
  auto ended = loopback_.Accept();
  ended->Receive(3 * kMiB / 2);
  connections_.Check();
  ended.reset();
  const auto next = loopback_.Accept();
  next->Receive(kMiB / 2);
  connections_.Check();
  EXPECT_TRUE(next->open());
}

TEST_F(UnfinishedFramesTest, AStrangersHeadersEnd) {
  const auto idle = loopback_.Accept(), endless = loopback_.Accept(), inspector = loopback_.Accept();
  idle->Receive(32 << 10);  // The handshake of TLS.
  endless->Receive(96 << 10);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(endless->open(), i < 2);
    Finish(*inspector, 32 << 10);
    inspector->Send(kMiB);
    inspector->Receive(kMiB / 16);  // It acknowledges what it reads.
    connections_.Check();
  }
  EXPECT_TRUE(idle->open());
  EXPECT_TRUE(inspector->open());
}

// gRPC reads all that the system holds of one in a row.
TEST_F(UnfinishedFramesTest, TheSystemHoldsLittleOfAStranger) {
  constexpr int kReceiveLock = 2;  // SOCK_RCVBUF_LOCK
  const auto connection = loopback_.Accept();
  const auto option = [&connection](int name) {
    int value = -1;
    socklen_t length = sizeof(value);
    getsockopt(connection->descriptor(), SOL_SOCKET, name, &value, &length);
    return value;
  };
  if (option(SO_BUF_LOCK) < 0) GTEST_SKIP() << "this system cannot take such a bound back";
  EXPECT_EQ(option(SO_BUF_LOCK) & kReceiveLock, kReceiveLock);
  EXPECT_LE(option(SO_RCVBUF), 128 << 10);
  connections_.Joined(connection->peer());
  EXPECT_EQ(option(SO_BUF_LOCK) & kReceiveLock, 0) << "the system may choose again";
}

TEST_F(UnfinishedFramesTest, PeersWithoutNamesHaveNoCounter) { EXPECT_EQ(connections_.FramesOf(""), nullptr); }

}  // namespace
}  // namespace syncbn::rpc
