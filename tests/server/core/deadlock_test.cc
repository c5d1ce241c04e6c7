// Deadlocks: every member waits, and on different rounds. They end at once, not at a deadline.

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Numbers;
using testing::ReasonOf;

const Numbers kNumbers{4, {1.0}, {0.5}};

class DeadlockTest : public ::testing::Test {
 protected:
  void JoinAll(uint32_t world_size, uint32_t present) {
    for (Rank rank = 0; rank < present; ++rank) {
      workers_.push_back(engine_.Join(rank, world_size, {BatchNormLayer("a", 1), BatchNormLayer("b", 1)}));
    }
  }
  void Block(Rank rank, const RoundKey& key) { engine_.ContributeAndBlock(workers_[rank], key, kNumbers); }

  Engine engine_;
  std::vector<StreamId> workers_;
};

TEST_F(DeadlockTest, IsReportedAtOnceWithWhoWaitsForWhat) {
  JoinAll(3, 3);
  Block(0, Forward("a", 0));
  Block(1, Forward("a", 0));
  EXPECT_THAT(engine_.ended(), IsEmpty());
  Block(2, Forward("b", 4));
  const auto a = engine_.Outcome(workers_[0], Forward("a", 0));
  const auto b = engine_.Outcome(workers_[2], Forward("b", 4));
  EXPECT_EQ(engine_.Outcome(workers_[1], Forward("a", 0)), a);
  EXPECT_EQ(ReasonOf(*a), kDeadlock);
  EXPECT_EQ(a->error->code, absl::StatusCode::kAborted);
  EXPECT_THAT(a->error->ranks, ElementsAre(2));
  EXPECT_EQ(ReasonOf(*b), kDeadlock);
  EXPECT_THAT(b->error->ranks, ElementsAre(0, 1));
  EXPECT_THAT(a->error->message,
              HasSubstr("rank 0 on the forward round 0 of layer \"a\"; rank 1 on the forward round 0 "
                        "of layer \"a\"; rank 2 on the forward round 4 of layer \"b\""));
  // The group goes on.
  for (Rank rank = 0; rank < 3; ++rank) Block(rank, Forward("a", 1));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 1))), "");
}

TEST_F(DeadlockTest, OthersOfItsRoundsStand) {
  JoinAll(2, 2);
  engine_.Contribute(workers_[0], Forward("b", 0), kNumbers);
  Block(0, Forward("a", 0));
  Block(1, Forward("a", 1));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 0))), kDeadlock);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Forward("b", 0)), IsEmpty());
  EXPECT_EQ(engine_.View().pending.size(), 1u);
}

TEST_F(DeadlockTest, NotWhileSomeoneIsNotBlocked) {
  JoinAll(2, 2);
  Block(0, Forward("a", 0));
  engine_.Contribute(workers_[1], Forward("b", 0), kNumbers);
  EXPECT_THAT(engine_.ended(), IsEmpty());
}

TEST_F(DeadlockTest, NotWhileSomeoneHasNotJoined) {
  JoinAll(3, 2);
  Block(0, Forward("a", 0));
  Block(1, Forward("b", 0));
  EXPECT_THAT(engine_.ended(), IsEmpty());
}

TEST_F(DeadlockTest, NotWhileSomeoneIsLost) {
  JoinAll(3, 3);
  engine_.Contribute(workers_[2], Forward("a", 0), kNumbers);
  engine_.Close(workers_[2]);
  Block(0, Forward("a", 0));
  Block(1, Forward("b", 0));
  EXPECT_THAT(engine_.ended(), IsEmpty());
  // After its return it blocks like the others.
  workers_[2] = engine_.Reconnect(workers_[2]);
  Block(2, Forward("a", 0));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("b", 0))), kDeadlock);
}

TEST_F(DeadlockTest, WhoHasLeftDoesNotCount) {
  JoinAll(3, 3);
  Block(0, Forward("a", 0));
  Block(1, Forward("b", 0));
  engine_.Leave(workers_[2]);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 0))), kDeadlock);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("b", 0))), kDeadlock);
}

TEST_F(DeadlockTest, AnyFrameSaysThatItsSenderIsNotBlocked) {
  JoinAll(2, 2);
  Block(0, Forward("a", 0));
  engine_.Declare(workers_[0], {BatchNormLayer("c", 1)});
  Block(1, Forward("b", 0));
  EXPECT_THAT(engine_.ended(), IsEmpty());
}

TEST_F(DeadlockTest, AnEndOfARoundFreesItsContributors) {
  JoinAll(2, 2);
  engine_.Contribute(workers_[1], Forward("a", 0), kNumbers);
  Block(0, Forward("a", 0));  // Completes it.
  Block(1, Forward("b", 0));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 0))), "");
  EXPECT_THAT(engine_.Outcomes(workers_[1], Forward("b", 0)), IsEmpty());
}

TEST_F(DeadlockTest, WhoWaitsForAnyOfSeveralIsFreedByOne) {
  JoinAll(2, 2);
  FrameReceived frame;
  frame.stream = workers_[0];
  for (const char* layer : {"a", "b"}) {
    frame.contributions.push_back({Forward(layer, 0), kNumbers.count, kNumbers.role, kNumbers.first, kNumbers.second});
    frame.blocked_on.push_back(Forward(layer, 0));
  }
  engine_.On(frame);
  EXPECT_THAT(engine_.View().members[0].blocked_on, ElementsAre(Forward("a", 0), Forward("b", 0)));
  Block(1, Forward("a", 0));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 0))), "");
  EXPECT_THAT(engine_.View().members[0].blocked_on, IsEmpty());
  EXPECT_EQ(engine_.ended().size(), 1u);
}

TEST_F(DeadlockTest, AClaimToWaitForWhatItHasNotContributedToIsNotBelieved) {
  JoinAll(2, 2);
  FrameReceived frame;
  frame.stream = workers_[0];
  frame.blocked_on = {Forward("a", 0)};
  engine_.On(frame);
  Block(1, Forward("a", 0));
  EXPECT_THAT(engine_.ended(), IsEmpty());
  engine_.Contribute(workers_[0], Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("a", 0))), "");
}

TEST(DeadlockTurnsTest, WhatALeaveIsAboutToEndIsNone) {
  // The leave ends both rounds, one in each turn.
  Limits limits;
  limits.max_turn_bytes = 1;
  Engine engine(limits);
  const StreamId first = engine.Join(0, 2, {BatchNormLayer("a", 1), BatchNormLayer("b", 1)});
  const StreamId second = engine.Join(1, 2, {BatchNormLayer("a", 1), BatchNormLayer("b", 1)});
  engine.Contribute(second, Forward("a", 0), kNumbers);
  engine.ContributeAndBlock(second, Forward("b", 0), kNumbers);
  engine.Leave(first);
  engine.Advance(absl::ZeroDuration());
  EXPECT_EQ(ReasonOf(*engine.Outcome(second, Forward("a", 0))), "");
  EXPECT_EQ(ReasonOf(*engine.Outcome(second, Forward("b", 0))), "");
}

TEST_F(DeadlockTest, ManyWorkersAreNamedInPart) {
  JoinAll(12, 12);
  for (Rank rank = 0; rank < 12; ++rank) Block(rank, Forward(rank == 11 ? "b" : "a", 0));
  const auto outcome = engine_.Outcome(workers_[11], Forward("b", 0));
  EXPECT_EQ(ReasonOf(*outcome), kDeadlock);
  EXPECT_EQ(outcome->error->ranks.size(), 11u);
  EXPECT_THAT(outcome->error->message, HasSubstr("; and 4 more workers"));
}

}  // namespace
}  // namespace syncbn::core
