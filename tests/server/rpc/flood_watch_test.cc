// Connections that are taken for a flood, by the CPU time that the loop's threads spend in gRPC and the bytes that move
// meanwhile.

#include "server/rpc/flood_watch.h"

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "server/rpc/connections.h"
#include "tests/server/rpc/loopback.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kKiB = size_t{1} << 10;

class FloodWatchTest : public ::testing::Test {
 protected:
  FloodWatchTest() { turn_.there = turn_.in_grpc = true; }

  // The thread spends so much time where it is, and the watch looks.
  void Spend(int ms) {
    turn_.cpu += absl::Milliseconds(ms);
    watch_.Look(progress_);
  }
  // The thread has been where it is for long enough to be observed from here on.
  void BeginToObserve() {
    watch_.Look(progress_);
    Spend(5);
  }
  // It goes elsewhere.
  void BeginTurn(bool in_grpc) {
    ++turn_.number;
    turn_.in_grpc = in_grpc;
  }

  Connections connections_{1024, 0};
  testing::Loopback loopback_{&connections_};
  LoopProgress progress_;
  LoopTurn& turn_ = progress_.turns[0];
  FloodWatch watch_{&connections_};
};

TEST_F(FloodWatchTest, FewBytesThatKeepTheThreadBusyAreAFlood) {
  const auto flood = loopback_.Accept(), other = loopback_.Accept();
  BeginToObserve();
  flood->Receive(64 * kKiB);
  other->Receive(kKiB);
  Spend(10);
  EXPECT_FALSE(flood->open());
}

// From before the peer knows of the end until the loop has taken all that has come.
TEST_F(FloodWatchTest, NewConnectionsWaitForWhatAFloodHasLeftBehind) {
  const auto flood = loopback_.Accept();
  BeginToObserve();
  EXPECT_FALSE(connections_.flooded());
  flood->Receive(64 * kKiB);
  Spend(10);
  EXPECT_TRUE(connections_.flooded());
  for (int i = 0; i < 20; ++i) {
    ++progress_.calls;
    watch_.Look(progress_);
    EXPECT_TRUE(connections_.flooded());
  }
  for (int i = 0; i < 20; ++i) watch_.Look(progress_);
  EXPECT_FALSE(connections_.flooded());
}

TEST_F(FloodWatchTest, AFloodOfPingsIsOneThoughItIsAnswered) {
  const auto flood = loopback_.Accept();
  BeginToObserve();
  flood->Receive(200 * kKiB);
  flood->Send(200 * kKiB);
  Spend(10);
  EXPECT_FALSE(flood->open());
}

TEST_F(FloodWatchTest, LongFramesOfWhoeverJoinsAreNone) {
  const auto joins = loopback_.Accept();
  BeginToObserve();
  joins->Receive(1024 * kKiB);
  Spend(10);
  EXPECT_TRUE(joins->open());
}

// However slow the machine is.
TEST_F(FloodWatchTest, ConnectionsOfWorkersAreNone) {
  const auto worker = loopback_.AcceptWorker(), joins = loopback_.Accept();
  BeginToObserve();
  worker->Receive(64 * kKiB);
  joins->Receive(16 * kKiB);
  Spend(100);
  EXPECT_TRUE(worker->open());
  EXPECT_TRUE(joins->open());
}

// Nothing of what it sends becomes a frame, for far longer than the longest frame takes.
TEST_F(FloodWatchTest, AWorkerThatSendsNoFramesIsOneAfterAWhile) {
  const auto worker = loopback_.AcceptWorker();
  BeginToObserve();
  for (int spent = 0; spent < 480; spent += 10) {
    worker->Receive(1024 * kKiB);  // PING frames take so little time.
    Spend(10);
    ASSERT_TRUE(worker->open()) << spent;
  }
  for (int i = 0; i < 2; ++i) {
    worker->Receive(1024 * kKiB);
    Spend(10);
  }
  EXPECT_FALSE(worker->open());
}

TEST_F(FloodWatchTest, AWorkerWhoseFramesComeIsNoneHoweverLongTheyAre) {
  const auto worker = loopback_.AcceptWorker();
  const auto frames = connections_.FramesOf(worker->peer());
  BeginToObserve();
  for (int frame = 0; frame < 8; ++frame) {
    for (int spent = 0; spent < 250; spent += 10) {
      worker->Receive(256 * kKiB);
      Spend(10);
    }
    frames->Add(25 * 256 * kKiB);
  }
  EXPECT_TRUE(worker->open());
}

// Their frames take the longer, the more are on their way.
TEST_F(FloodWatchTest, WorkersThatSendLongFramesAtOnceAreNone) {
  std::vector<std::unique_ptr<testing::Pair>> workers;
  for (int i = 0; i < 3; ++i) workers.push_back(loopback_.AcceptWorker());
  BeginToObserve();
  for (int spent = 0; spent < 1000; spent += 10) {
    for (const auto& worker : workers) worker->Receive(64 * kKiB);
    Spend(10);
  }
  for (const auto& worker : workers) EXPECT_TRUE(worker->open());
}

// gRPC's own threads read, too.
TEST_F(FloodWatchTest, AThreadOfGrpcsMayReadAFlood) {
  LoopTurn& executor = progress_.executors[1];
  executor = turn_;
  BeginTurn(/*in_grpc=*/false);
  const auto flood = loopback_.Accept();
  watch_.Look(progress_);
  executor.cpu += absl::Milliseconds(5);
  watch_.Look(progress_);
  flood->Receive(64 * kKiB);
  executor.cpu += absl::Milliseconds(10);
  watch_.Look(progress_);
  EXPECT_FALSE(flood->open());
}

// The workers of a large group have their results, of a megabyte each, while another one joins.
TEST_F(FloodWatchTest, WhoeverJoinsWhileLongResultsAreWrittenIsNone) {
  std::vector<std::unique_ptr<testing::Pair>> workers;
  for (int i = 0; i < 8; ++i) workers.push_back(loopback_.AcceptWorker());
  const auto joins = loopback_.Accept();
  BeginToObserve();
  for (const auto& worker : workers) worker->Send(1024 * kKiB);
  joins->Receive(16 * kKiB);
  Spend(40);
  EXPECT_TRUE(joins->open());
}

// Another thread of gRPC's reads meanwhile.
TEST_F(FloodWatchTest, WhoeverJoinsWhileTheLoopMergesIsNone) {
  const auto joins = loopback_.Accept();
  BeginTurn(/*in_grpc=*/false);
  BeginToObserve();
  joins->Receive(64 * kKiB);
  Spend(100);
  EXPECT_TRUE(joins->open());
  BeginTurn(/*in_grpc=*/true);
  Spend(100);
  EXPECT_TRUE(joins->open()) << "that time is no part of this turn's";
}

TEST_F(FloodWatchTest, ShortCallsOfGrpcAreNoFloodHoweverManyThereAre) {
  const auto busy = loopback_.Accept();
  for (int i = 0; i < 20; ++i) {
    BeginTurn(/*in_grpc=*/true);
    watch_.Look(progress_);
    busy->Receive(16 * kKiB);
    Spend(3);
  }
  EXPECT_TRUE(busy->open());
}

// Whichever of the threads reads it.
TEST_F(FloodWatchTest, EachOfTheThreadsMayReadAFlood) {
  LoopTurn& other = progress_.turns[2];
  other = turn_;
  BeginTurn(/*in_grpc=*/false);
  const auto flood = loopback_.Accept();
  watch_.Look(progress_);
  other.cpu += absl::Milliseconds(5);
  watch_.Look(progress_);
  flood->Receive(64 * kKiB);
  other.cpu += absl::Milliseconds(10);
  watch_.Look(progress_);
  EXPECT_FALSE(flood->open());
}

// The times of both count together, as the bytes that they read do.
TEST_F(FloodWatchTest, TwoThreadsMayReadFloodsAtOnce) {
  LoopTurn& other = progress_.turns[1];
  other = turn_;
  const auto flood = loopback_.Accept();
  watch_.Look(progress_);
  other.cpu += absl::Milliseconds(5);
  Spend(5);
  flood->Receive(64 * kKiB);
  other.cpu += absl::Milliseconds(5);
  Spend(5);
  EXPECT_FALSE(flood->open());
}

// A thread whose long call began later is observed from then on, for no more than its own bytes.
TEST_F(FloodWatchTest, TimeBeforeTheBytesWereCountedIsNotCounted) {
  const auto flood = loopback_.Accept(), long_frames = loopback_.Accept();
  BeginToObserve();
  LoopTurn& other = progress_.turns[1];
  other = turn_;
  watch_.Look(progress_);
  flood->Receive(2 * kKiB);
  other.cpu += absl::Milliseconds(5);
  Spend(5);
  long_frames->Receive(1024 * kKiB);
  other.cpu += absl::Milliseconds(5);
  Spend(5);
  EXPECT_TRUE(flood->open());
  EXPECT_TRUE(long_frames->open());
}

// It is known as soon as one of them has been observed for long enough.
TEST_F(FloodWatchTest, AFloodThatKeepsThreadAfterThreadIsOne) {
  const auto flood = loopback_.Accept();
  BeginToObserve();
  LoopTurn& second = progress_.turns[1];
  LoopTurn& third = progress_.turns[2];
  second = third = turn_;
  watch_.Look(progress_);
  flood->Receive(64 * kKiB);
  second.cpu += absl::Milliseconds(5);
  Spend(3);
  third.cpu += absl::Milliseconds(5);
  Spend(3);
  EXPECT_TRUE(flood->open());
  Spend(3);
  EXPECT_FALSE(flood->open());
}

}  // namespace
}  // namespace syncbn::rpc
