// A leave is acknowledged when no other member can need any more what its worker holds: the contributions to rounds
// whose outcomes others have not read.

#include <algorithm>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using testing::MakeJoin;
using testing::Numbers;

const Numbers kNumbers{4, {1.0}, {0.5}};
constexpr absl::Duration kDelay = absl::Seconds(1);  // Limits::max_leave_delay.

class DeparturesTest : public ::testing::Test {
 protected:
  // Lets so many workers join, who say which memberships they have read, and complete one round.
  void Begin(uint32_t world_size) {
    Join join = MakeJoin(0, world_size);
    join.config.rejoin_grace = absl::Milliseconds(50);
    for (Rank rank = 0; rank < world_size; ++rank) {
      join.rank = rank;
      workers_.push_back(engine_.Join(join));
      engine_.Declare(workers_.back(), {BatchNormLayer("bn", 1)});
    }
    for (const StreamId worker : workers_) {
      engine_.Read(worker);
      engine_.Contribute(worker, Forward("bn", 0), kNumbers);
    }
  }
  bool Acknowledged(StreamId worker) const {
    EXPECT_EQ(engine_.log(worker).close_reason(), "");
    return engine_.log(worker).closed;
  }

  Engine engine_;
  std::vector<StreamId> workers_;
};

TEST_F(DeparturesTest, TheOthersReadOfItFirst) {
  Begin(3);
  engine_.Leave(workers_[2]);
  EXPECT_FALSE(Acknowledged(workers_[2]));
  EXPECT_THAT(engine_.log(workers_[0]).memberships.back().left_ranks, ElementsAre(2)) << "it has left nevertheless";
  engine_.Read(workers_[0]);
  EXPECT_FALSE(Acknowledged(workers_[2]));
  engine_.Read(workers_[1]);
  EXPECT_TRUE(Acknowledged(workers_[2]));
}

TEST_F(DeparturesTest, WhoReadsOfALeaveHasReadWhatItEnded) {
  Begin(2);
  engine_.Contribute(workers_[0], Forward("bn", 1), kNumbers);
  const Effects effects = engine_.Leave(workers_[1]);
  const auto first = [&effects](auto is) { return std::find_if(effects.begin(), effects.end(), is); };
  const auto outcome = first([](const Effect& effect) { return std::holds_alternative<SendResults>(effect); });
  const auto news = first([](const Effect& effect) { return std::holds_alternative<SendMembership>(effect); });
  EXPECT_TRUE(outcome < news && news != effects.end());
}

// The rounds that it ends are too many for one turn.
TEST(DeparturesInTurnsTest, WhoReadsOfALeaveHasReadWhatItEnded) {
  Limits limits;
  limits.max_turn_bytes = 1;
  Engine engine(limits);
  const StreamId stays = engine.Join(0, 2, {BatchNormLayer("bn", 1)});
  const StreamId leaves = engine.Join(1, 2, {BatchNormLayer("bn", 1)});
  for (const StreamId worker : {stays, leaves}) engine.Read(worker);
  for (uint64_t sequence = 0; sequence < 3; ++sequence) {
    engine.Contribute(stays, Forward("bn", sequence), kNumbers);
  }
  engine.Leave(leaves);
  engine.Read(stays);
  EXPECT_EQ(engine.log(stays).outcomes.size(), 1u);
  EXPECT_FALSE(engine.log(leaves).closed);
  for (int turn = 0; turn < 3; ++turn) engine.Advance(absl::ZeroDuration());
  EXPECT_EQ(engine.log(stays).outcomes.size(), 3u);
  EXPECT_FALSE(engine.log(leaves).closed) << "the others have not been read yet";
  engine.Read(stays);
  EXPECT_TRUE(engine.log(leaves).closed);
}

TEST_F(DeparturesTest, AnEarlierMembershipIsNotEnough) {
  Begin(2);
  FrameReceived early;
  early.stream = workers_[0];
  early.membership_read = engine_.log(workers_[0]).memberships.back().version;
  engine_.Leave(workers_[1]);
  engine_.On(early);
  EXPECT_FALSE(Acknowledged(workers_[1]));
  early.membership_read = UINT64_MAX;  // A version that the group has not announced.
  engine_.On(early);
  EXPECT_TRUE(Acknowledged(workers_[1]));
  const StreamId again = engine_.Join(1, 2);
  engine_.Read(again);
  engine_.Leave(again);
  EXPECT_FALSE(Acknowledged(again)) << "what it claims to have read is not to come, as it seems";
}

TEST_F(DeparturesTest, OneThatNeverSaysWhatItHasReadIsNotWaitedFor) {
  const StreamId a = engine_.Join(0, 2), b = engine_.Join(1, 2);
  engine_.Leave(b);
  EXPECT_TRUE(Acknowledged(b));
  engine_.Leave(a);
  EXPECT_TRUE(Acknowledged(a));
}

TEST_F(DeparturesTest, ThoseThatLeaveDoNotWaitForEachOther) {
  Begin(3);
  engine_.Leave(workers_[2]);
  engine_.Leave(workers_[1]);
  EXPECT_FALSE(Acknowledged(workers_[2]));
  engine_.Leave(workers_[0]);
  for (const StreamId worker : workers_) EXPECT_TRUE(Acknowledged(worker));
}

TEST_F(DeparturesTest, OneThatDoesNotReadIsWaitedForASecond) {
  Begin(2);
  engine_.Leave(workers_[1]);
  engine_.Advance(kDelay - absl::Milliseconds(1));
  EXPECT_FALSE(Acknowledged(workers_[1]));
  engine_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(Acknowledged(workers_[1]));
}

TEST_F(DeparturesTest, OneWhoseStreamHasBrokenMayAskForOutcomes) {
  Begin(2);
  engine_.Close(workers_[0]);
  engine_.Leave(workers_[1]);
  EXPECT_FALSE(Acknowledged(workers_[1]));
  const StreamId back = engine_.Reconnect(workers_[0]);
  engine_.Read(back);
  EXPECT_FALSE(Acknowledged(workers_[1])) << "what it has not been told yet, it has not asked for yet";
  engine_.Read(back, /*caught_up=*/true);
  EXPECT_FALSE(Acknowledged(workers_[1])) << "answers may be on their way";
  engine_.Read(back);
  EXPECT_TRUE(Acknowledged(workers_[1]));
}

TEST_F(DeparturesTest, OneThatIsLostForGoodIsNotWaitedFor) {
  Begin(2);
  engine_.Close(workers_[0]);
  engine_.Leave(workers_[1]);
  engine_.Advance(absl::Milliseconds(49));
  EXPECT_FALSE(Acknowledged(workers_[1]));
  engine_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(Acknowledged(workers_[1]));
}

TEST_F(DeparturesTest, AStreamThatBreaksIsNotClosedAnyMore) {
  Begin(2);
  engine_.Leave(workers_[1]);
  engine_.Close(workers_[1]);
  engine_.Read(workers_[0]);
  engine_.Advance(kDelay);
  EXPECT_FALSE(engine_.log(workers_[1]).closed);
  EXPECT_EQ(engine_.View().left, 1u);
}

// The next master may need what it holds.
TEST_F(DeparturesTest, AShutdownDoesNotAcknowledgeIt) {
  Begin(2);
  engine_.Leave(workers_[1]);
  engine_.Shutdown();
  EXPECT_EQ(engine_.log(workers_[1]).close_reason(), "SHUTTING_DOWN");
  EXPECT_EQ(engine_.log(workers_[0]).close_reason(), "SHUTTING_DOWN");
}

TEST_F(DeparturesTest, TheEndOfTheGroupAcknowledgesIt) {
  Begin(2);
  engine_.Leave(workers_[1]);
  Join join = MakeJoin(0, 2);
  join.generation = 1;
  engine_.Join(join);
  EXPECT_TRUE(Acknowledged(workers_[1]));
  EXPECT_EQ(engine_.log(workers_[0]).close_reason(), "GENERATION_SUPERSEDED");
}

// Its worker begins anew while others have not read of the leave.
TEST_F(DeparturesTest, TheRankMayBeTakenAgainMeanwhile) {
  Begin(2);
  engine_.Leave(workers_[1]);
  const StreamId again = engine_.Join(1, 2);
  EXPECT_FALSE(Acknowledged(workers_[1]));
  EXPECT_TRUE(engine_.log(again).joined.has_value());
  engine_.Read(workers_[0]);
  EXPECT_TRUE(Acknowledged(workers_[1]));
}

}  // namespace
}  // namespace syncbn::core
