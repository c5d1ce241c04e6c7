// Membership of a group: joining, coming back, being lost, being replaced, ending.

#include <string>
#include <vector>

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
using testing::MakeJoin;
using testing::Numbers;
using testing::ReasonOf;

const Numbers kNumbers{4, {1.0}, {0.5}};

std::vector<LayerSpec> Layers() { return {BatchNormLayer("bn", 1)}; }

std::vector<StreamId> JoinAll(Engine& engine, uint32_t world_size, const GroupConfig& config = GroupConfig()) {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size; ++rank) {
    Join join = MakeJoin(rank, world_size);
    join.config = config;
    streams.push_back(engine.Join(join));
    engine.Declare(streams.back(), Layers());
  }
  return streams;
}

GroupConfig Grace(absl::Duration grace) {
  GroupConfig config;
  config.rejoin_grace = grace;
  return config;
}

// ---- Joining --------------------------------------------------------------------------------------------------------

TEST(JoinTest, IsAnsweredWithTheFilledConfig) {
  Engine engine;
  const StreamId worker = engine.Join(MakeJoin(1, 3));
  const SendJoined& joined = *engine.log(worker).joined;
  EXPECT_EQ(joined.protocol_version, 1u);
  EXPECT_EQ(joined.incarnation, 1u);
  EXPECT_NE(joined.run_id, 0u);
  EXPECT_EQ(joined.config.round_timeout, absl::Minutes(10));
  EXPECT_EQ(joined.config.rejoin_grace, absl::Milliseconds(50));
  EXPECT_EQ(joined.membership.world_size, 3u);
  EXPECT_THAT(joined.membership.present_ranks, ElementsAre(1));
}

TEST(JoinTest, MembershipIsAnnouncedWhenTheGroupIsComplete) {
  Engine engine;
  const StreamId a = engine.Join(MakeJoin(0, 3));
  const StreamId b = engine.Join(MakeJoin(1, 3));
  EXPECT_THAT(engine.log(a).memberships, IsEmpty());
  const StreamId c = engine.Join(MakeJoin(2, 3));
  ASSERT_EQ(engine.log(a).memberships.size(), 1u);
  EXPECT_THAT(engine.log(a).memberships[0].present_ranks, ElementsAre(0, 1, 2));
  EXPECT_EQ(engine.log(b).memberships.size(), 1u);
  EXPECT_THAT(engine.log(c).memberships, IsEmpty()) << "it is in `joined`";
}

TEST(JoinTest, TheFirstFrameMustJoinAndNoLaterOneMay) {
  Engine engine;
  const StreamId worker = engine.Join(MakeJoin(0, 2));
  const StreamId other = engine.Join(MakeJoin(1, 2));
  FrameReceived again;
  again.stream = worker;
  again.join = MakeJoin(0, 2);
  engine.On(again);
  EXPECT_EQ(engine.log(worker).close_reason(), kJoinRequired);
  EXPECT_THAT(engine.log(other).memberships.back().present_ranks, ElementsAre(1)) << "it is lost";
}

TEST(JoinTest, AStreamWithoutAJoinIsClosed) {
  Coordinator coordinator;
  FrameReceived frame;
  frame.stream = 9;
  const Effects effects = coordinator.On(frame, absl::UnixEpoch());
  ASSERT_EQ(effects.size(), 1u);
  const auto& close = std::get<CloseStream>(effects[0]);
  EXPECT_EQ(close.stream, 9u);
  EXPECT_STREQ(close.error->reason, kJoinRequired);
}

TEST(JoinTest, VersionsMustMeet) {
  Engine engine;
  Join join = MakeJoin(0, 1);
  join.min_protocol_version = 2;
  join.max_protocol_version = 3;
  const StreamId newer = engine.Join(join);
  EXPECT_EQ(engine.log(newer).close_reason(), kVersionUnsupported);
  EXPECT_THAT(engine.log(newer).closed_with->message, HasSubstr("versions 2 to 3, this master version 1"));
  join.min_protocol_version = 3;
  join.max_protocol_version = 1;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  join.min_protocol_version = 0;
  join.max_protocol_version = 9;
  EXPECT_EQ(engine.log(engine.Join(join)).joined->protocol_version, 1u);
}

TEST(JoinTest, RanksLieBelowTheWorldSize) {
  Engine engine;
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(2, 2))).close_reason(), kMalformedFrame);
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(0, 0))).close_reason(), kMalformedFrame);
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
}

struct ConfigCase {
  std::string name;
  GroupConfig config;
  uint32_t world_size;
  std::string difference;  // Empty if it agrees.
};

GroupConfig Config(absl::Duration timeout, MissingPolicy policy, uint32_t min_workers, absl::Duration grace) {
  GroupConfig config;
  config.round_timeout = timeout;
  config.missing_policy = policy;
  config.min_workers = min_workers;
  config.rejoin_grace = grace;
  return config;
}

class ConfigTest : public ::testing::TestWithParam<ConfigCase> {};

TEST_P(ConfigTest, MustEqualThatOfTheGroup) {
  constexpr MissingPolicy kProceed = MissingPolicy::kProceed;
  Engine engine;
  Join join = MakeJoin(0, 4);
  join.config = Config(absl::Seconds(5), kProceed, 2, absl::Seconds(1));
  const StreamId first = engine.Join(join);
  join.rank = 1;
  join.world_size = GetParam().world_size;
  join.config = GetParam().config;
  const StreamId second = engine.Join(join);
  if (GetParam().difference.empty()) {
    EXPECT_FALSE(engine.log(second).closed);
  } else {
    EXPECT_EQ(engine.log(second).close_reason(), kGroupConfigMismatch);
    EXPECT_THAT(engine.log(second).closed_with->message, HasSubstr(GetParam().difference));
    EXPECT_FALSE(engine.log(first).closed);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, ConfigTest,
    ::testing::Values(ConfigCase{"Same", Config(absl::Seconds(5), MissingPolicy::kProceed, 2, absl::Seconds(1)), 4, ""},
                      ConfigCase{"WorldSize", Config(absl::Seconds(5), MissingPolicy::kProceed, 2, absl::Seconds(1)), 5,
                                 "world_size 5, but group \"g\" of job \"j\" has 4"},
                      ConfigCase{"Policy", Config(absl::Seconds(5), MissingPolicy::kFail, 0, absl::Seconds(1)), 4,
                                 "missing_policy FAIL, but group \"g\" of job \"j\" has PROCEED"},
                      ConfigCase{"MinWorkers", Config(absl::Seconds(5), MissingPolicy::kProceed, 3, absl::Seconds(1)),
                                 4, "min_workers 3"},
                      ConfigCase{"Timeout", Config(absl::Seconds(6), MissingPolicy::kProceed, 2, absl::Seconds(1)), 4,
                                 "round_timeout 6s, but group \"g\" of job \"j\" has 5s"},
                      ConfigCase{"Grace", Config(absl::Seconds(5), MissingPolicy::kProceed, 2, absl::Seconds(2)), 4,
                                 "rejoin_grace 2s"}),
    [](const auto& info) { return info.param.name; });

TEST(ConfigTest, MinWorkersOfAFailingGroupMeansNothing) {
  Engine engine;
  engine.Join(MakeJoin(0, 2));
  Join join = MakeJoin(1, 2);
  join.config.min_workers = 2;
  EXPECT_FALSE(engine.log(engine.Join(join)).closed);
}

TEST(ConfigTest, MinWorkersLiesWithinTheWorldSize) {
  Engine engine;
  Join join = MakeJoin(0, 2);
  join.config.missing_policy = MissingPolicy::kProceed;
  for (const uint32_t min_workers : {0, 3}) {
    join.config.min_workers = min_workers;
    EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  }
}

TEST(GroupTest, GroupsAreIndependent) {
  Engine engine;
  Join join = MakeJoin(0, 1);
  const StreamId here = engine.Join(join);
  join.id.group = "h";
  join.config.round_timeout = absl::Seconds(7);
  const StreamId there = engine.Join(join);
  engine.Declare(here, Layers());
  engine.Declare(there, {BatchNormLayer("bn", 2)});
  engine.Contribute(here, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.log(here).outcomes.size(), 1u);
  EXPECT_EQ(engine.log(there).outcomes.size(), 0u);
  EXPECT_EQ(engine.coordinator().ListGroups().size(), 2u);
}

// ---- Loss and return ------------------------------------------------------------------------------------------------

TEST(LossTest, RoundsThatWaitEndAfterTheGrace) {
  Engine engine;
  const auto workers = JoinAll(engine, 3, Grace(absl::Seconds(1)));
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[2]);
  EXPECT_THAT(engine.log(workers[0]).memberships.back().present_ranks, ElementsAre(0, 1));
  engine.Advance(absl::Milliseconds(999));
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Advance(absl::Milliseconds(1));
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(outcome->error->code, absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(*outcome), kWorkerLost);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(2));
  EXPECT_THAT(outcome->error->message, HasSubstr("rank 2 was lost before contributing to the forward round 0"));
  engine.Contribute(workers[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(workers[1], Forward("bn", 0)), outcome);
  // New rounds do not wait for it either.
  engine.Contribute(workers[1], Forward("bn", 1), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[1], Forward("bn", 1))), kWorkerLost);
}

TEST(LossTest, ARoundThatHasItsContributionDoesNotMind) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, Grace(absl::ZeroDuration()));
  engine.Contribute(workers[1], Forward("bn", 0), kNumbers);
  engine.Close(workers[1]);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 8);
}

TEST(LossTest, WithoutAGraceRoundsEndAtOnce) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, Grace(absl::ZeroDuration()));
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[1]);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 0))), kWorkerLost);
}

TEST(LossTest, WhoComesBackInTimeIsWaitedFor) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, Grace(absl::Seconds(1)));
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[1]);
  engine.Advance(absl::Milliseconds(999));
  const StreamId again = engine.Reconnect(workers[1]);
  EXPECT_EQ(engine.log(again).joined->incarnation, engine.log(workers[1]).joined->incarnation);
  EXPECT_EQ(engine.log(again).joined->run_id, engine.log(workers[1]).joined->run_id);
  engine.Advance(absl::Seconds(10));
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(again, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 8);
}

TEST(LossTest, WhoComesBackLateTakesPartAgain) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[1]);
  engine.Advance(absl::Seconds(1));
  const StreamId again = engine.Reconnect(workers[1]);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Contribute(again, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(again, Forward("bn", 0))->count, 8);
}

TEST(LossTest, AnOutcomeWaitsForWhoWasAway) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[0]);
  engine.Contribute(workers[1], Forward("bn", 0), kNumbers);
  const auto outcome = engine.Outcome(workers[1], Forward("bn", 0));
  const StreamId again = engine.Reconnect(workers[0]);
  engine.Contribute(again, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(again, Forward("bn", 0)), outcome);
}

TEST(LossTest, ClosingAnUnknownStreamIsIgnored) {
  Engine engine;
  EXPECT_THAT(engine.On(StreamClosed{77}), IsEmpty());
}

// ---- Joins after a leave --------------------------------------------------------------------------------------------

// A group of three that waits 5 s for successors. Rank 2 has left; ranks 0 and 1 go on.
class RejoinTest : public ::testing::Test {
 protected:
  RejoinTest() {
    config_.missing_policy = MissingPolicy::kWait;
    config_.rejoin_grace = absl::Seconds(5);
    for (Rank rank = 0; rank < 3; ++rank) workers_.push_back(Join(rank));
    for (const StreamId worker : workers_) engine_.Contribute(worker, Forward("bn", 0), kNumbers);
    engine_.Leave(workers_[2]);
  }

  // Says nothing but its join.
  StreamId Join(Rank rank) {
    core::Join join = MakeJoin(rank, 3);
    join.config = config_;
    join.layers = Layers();
    return engine_.Join(join);
  }

  // Ranks 0 and 1 contribute to the round.
  void Begin(uint64_t sequence) {
    for (const Rank rank : {0u, 1u}) engine_.Contribute(workers_[rank], Forward("bn", sequence), kNumbers);
  }

  // Expects that the round has completed without rank 2.
  void ExpectWithoutIt(uint64_t sequence) {
    const auto outcome = engine_.Outcome(workers_[0], Forward("bn", sequence));
    EXPECT_EQ(ReasonOf(*outcome), "");
    EXPECT_THAT(outcome->missing_ranks, ElementsAre(2));
  }

  GroupConfig config_;
  Engine engine_;
  std::vector<StreamId> workers_;
};

// A process died while its join was on the way; its successor was let in, worked and left before that join came.
TEST_F(RejoinTest, ALateJoinOfADeadProcessHoldsNobodyUp) {
  const StreamId dead = Join(2);
  ASSERT_TRUE(engine_.log(dead).joined.has_value());
  Begin(1);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Forward("bn", 1)), IsEmpty()) << "somebody may be there";
  engine_.Close(dead);
  ExpectWithoutIt(1);
  EXPECT_THAT(engine_.log(workers_[0]).memberships.back().left_ranks, ElementsAre(2));
  EXPECT_EQ(engine_.changes().back().state, MemberState::kLeft);
  engine_.Advance(absl::Seconds(6));
  Begin(2);
  ExpectWithoutIt(2);
  const StreamId next = Join(2);
  EXPECT_GT(engine_.log(next).joined->incarnation, engine_.log(dead).joined->incarnation);
}

TEST_F(RejoinTest, OneThatComesBackWithItsIncarnationTakesPart) {
  const StreamId broken = Join(2);
  engine_.Close(broken);
  const StreamId back = engine_.Reconnect(broken);
  EXPECT_EQ(engine_.log(back).joined->incarnation, engine_.log(broken).joined->incarnation);
  Begin(1);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Forward("bn", 1)), IsEmpty());
  engine_.Contribute(back, Forward("bn", 1), kNumbers);
  EXPECT_EQ(engine_.Outcome(workers_[0], Forward("bn", 1))->count, 12);
}

TEST_F(RejoinTest, OneThatHasSentAFrameIsLost) {
  const StreamId alive = Join(2);
  engine_.Read(alive);
  Begin(1);
  engine_.Close(alive);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Forward("bn", 1)), IsEmpty()) << "its successor may come";
  engine_.Advance(absl::Seconds(5));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("bn", 1))), kWorkerLost);
}

// The acknowledgement of its leave was lost, and it has died before it could leave again.
TEST_F(RejoinTest, OneThatHadLeftItselfIsNotLost) {
  const StreamId first = engine_.Reconnect(workers_[2]);
  const StreamId second = engine_.Reconnect(workers_[2]);
  EXPECT_EQ(engine_.log(first).close_reason(), kFenced);
  Begin(1);
  engine_.Close(second);
  ExpectWithoutIt(1);
}

TEST_F(RejoinTest, ASecondJoinOnItsStreamIsNotHeard) {
  Begin(1);
  const StreamId other = Join(2);
  Begin(2);
  FrameReceived again;
  again.stream = other;
  again.join = MakeJoin(2, 3);
  engine_.On(again);
  EXPECT_EQ(engine_.log(other).close_reason(), kJoinRequired);
  ExpectWithoutIt(2);
}

// ---- Seats ----------------------------------------------------------------------------------------------------------

TEST(SeatTest, AnEmptyOneGoesToANewIncarnation) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[1]);
  const StreamId reborn = engine.Join(1, 2, Layers());
  EXPECT_EQ(engine.log(reborn).joined->incarnation, 2u);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Contribute(reborn, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(reborn, Forward("bn", 0))->count, 8);
}

TEST(SeatTest, OneThatIsHeldIsNotGivenToAStranger) {
  Engine engine;
  Join holder = MakeJoin(1, 2);
  holder.description = "syncbn host=node7 pid=4711";
  const StreamId first = engine.Join(holder);
  const StreamId other = engine.Join(MakeJoin(0, 2));
  engine.Declare(first, Layers());
  engine.Declare(other, Layers());
  engine.Contribute(other, Forward("bn", 0), kNumbers);
  for (const uint64_t incarnation : {uint64_t{0}, uint64_t{2}, uint64_t{9}, uint64_t{1} << 62}) {
    Join join = MakeJoin(1, 2);
    join.incarnation = incarnation;
    const StreamId stranger = engine.Join(join);
    EXPECT_EQ(engine.log(stranger).close_reason(), kRankTaken) << incarnation;
    EXPECT_EQ(engine.log(stranger).closed_with->code, absl::StatusCode::kAlreadyExists);
    EXPECT_THAT(engine.log(stranger).closed_with->ranks, ElementsAre(1));
    EXPECT_THAT(engine.log(stranger).closed_with->message,
                ::testing::AllOf(HasSubstr("rank 1 of group \"g\" of job \"j\" is taken"),
                                 HasSubstr("syncbn host=node7 pid=4711")));
    EXPECT_FALSE(engine.log(stranger).joined.has_value());
  }
  EXPECT_FALSE(engine.log(first).closed);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(first, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(other, Forward("bn", 0))->count, 8) << "nothing was lost";
}

TEST(SeatTest, AStrangerWithOtherLayersLearnsThatItIsTakenToo) {
  Engine engine;
  Join join = MakeJoin(0, 2);
  join.layers = Layers();
  const StreamId holder = engine.Join(join);
  join.layers = {BatchNormLayer("other", 3)};
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kRankTaken);
  EXPECT_THAT(engine.log(holder).layer_errors, IsEmpty()) << "that is another job's affair";
}

TEST(SeatTest, IsFreeOnceItsHolderHasGoneOrLeft) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(1, 2))).close_reason(), kRankTaken);
  engine.Close(workers[1]);
  const StreamId second = engine.Join(MakeJoin(1, 2));
  ASSERT_TRUE(engine.log(second).joined.has_value());
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(1, 2))).close_reason(), kRankTaken);
  engine.Leave(second);
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(1, 2))).joined->incarnation, 3u);
}

TEST(SeatTest, AGreaterGenerationTakesAllOfThem) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  Join join = MakeJoin(1, 2);
  join.generation = 1;
  ASSERT_TRUE(engine.log(engine.Join(join)).joined.has_value());
  EXPECT_EQ(engine.log(workers[0]).close_reason(), kGenerationSuperseded);
  EXPECT_EQ(engine.log(workers[1]).close_reason(), kGenerationSuperseded);
}

// An earlier master may have given out the greater incarnation. The holder stays: it would have been told.
TEST(SeatTest, AtARestartedMasterWhoComesFirstHoldsItUntilItGoes) {
  Engine engine;
  engine.Advance(absl::Hours(1));
  Join join = MakeJoin(0, 2);
  join.run_id = 77;
  join.incarnation = 3;
  const StreamId holder = engine.Join(join);
  join.incarnation = 5;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kRankTaken);
  engine.Close(holder);
  EXPECT_EQ(engine.log(engine.Join(join)).joined->incarnation, 5u);
  join.incarnation = 3;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kFenced);
}

// Otherwise the next worker that comes back would find another run in place of its own.
TEST(SeatTest, ARefusedFirstJoinLeavesNoGroup) {
  Engine engine;
  Join join = MakeJoin(0, 2);
  join.incarnation = 5;  // Without a run.
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  EXPECT_EQ(engine.coordinator().NextDeadline(), absl::InfiniteFuture());
  join.run_id = 77;
  engine.Advance(absl::Seconds(1));
  EXPECT_TRUE(engine.log(engine.Join(join)).joined.has_value());
}

// Incarnations are given out by masters. One that would leave no room for a greater one is refused.
TEST(SeatTest, AnIncarnationThatWasNeverGivenIsRefused) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[1]);
  for (const uint64_t incarnation : {uint64_t{2}, uint64_t{1} << 62, UINT64_MAX - 1, UINT64_MAX}) {
    Join join = MakeJoin(1, 2);
    join.incarnation = incarnation;
    join.run_id = engine.log(workers[1]).joined->run_id;
    const StreamId stranger = engine.Join(join);
    EXPECT_EQ(engine.log(stranger).close_reason(), kMalformedFrame) << incarnation;
    EXPECT_THAT(engine.log(stranger).closed_with->message, HasSubstr(absl::StrCat("incarnation ", incarnation)));
  }
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(1, 2))).joined->incarnation, 2u);
}

TEST(SeatTest, ARestartedMasterTakesIncarnationsThatCanHaveBeenGiven) {
  Engine engine;
  engine.Advance(absl::Hours(1));
  Join join = MakeJoin(0, 2);
  join.run_id = 77;
  join.incarnation = 4;
  ASSERT_TRUE(engine.log(engine.Join(join)).joined.has_value());
  join.rank = 1;
  join.incarnation = UINT64_MAX - 1;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  join.incarnation = 9;
  const StreamId back = engine.Join(join);
  EXPECT_EQ(engine.log(back).joined->incarnation, 9u);
  engine.Close(back);
  const StreamId next = engine.Join(MakeJoin(1, 2));
  EXPECT_GT(engine.log(next).joined->incarnation, 9u);
  EXPECT_TRUE(engine.log(engine.Reconnect(next)).joined.has_value());
}

// ---- Fencing --------------------------------------------------------------------------------------------------------

TEST(FencingTest, WhatThePredecessorStillSendsIsNotCounted) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[1]);
  engine.Join(1, 2, Layers());
  FrameReceived late;
  late.stream = workers[1];
  late.contributions.push_back({Forward("bn", 0), kNumbers.count, kNumbers.role, kNumbers.first, kNumbers.second});
  for (const Effect& effect : engine.On(late)) {
    ASSERT_TRUE(std::holds_alternative<CloseStream>(effect)) << "at most, it is closed again";
    EXPECT_EQ(std::get<CloseStream>(effect).stream, workers[1]);
  }
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  EXPECT_THAT(engine.View().pending.at(0).missing_ranks, ElementsAre(1));
}

TEST(FencingTest, TheOldIncarnationMayNotComeBack) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[1]);
  const StreamId reborn = engine.Join(1, 2, Layers());
  const StreamId stale = engine.Reconnect(workers[1]);
  EXPECT_EQ(engine.log(stale).close_reason(), kFenced);
  EXPECT_FALSE(engine.log(stale).joined.has_value());
  EXPECT_FALSE(engine.log(reborn).closed);
  EXPECT_THAT(engine.log(stale).closed_with->message, HasSubstr("incarnation 1 is fenced by incarnation 2"));
}

TEST(FencingTest, ASecondStreamOfTheSameIncarnationReplacesTheFirst) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  const StreamId again = engine.Reconnect(workers[1]);
  EXPECT_EQ(engine.log(workers[1]).close_reason(), kFenced) << "of two streams that seem alive, the newer one counts";
  EXPECT_THAT(engine.On(StreamClosed{workers[1]}), IsEmpty()) << "it is no loss";
  EXPECT_FALSE(engine.log(again).closed);
  EXPECT_EQ(engine.View().summary.present, 2u);
}

TEST(FencingTest, ARestartFailsTheRoundsThatWaitForThePredecessor) {
  Engine engine;
  const auto workers = JoinAll(engine, 3);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kNumbers);
  engine.Contribute(workers[0], Forward("bn", 1), kNumbers);
  engine.Contribute(workers[1], Forward("bn", 2), kNumbers);
  engine.Close(workers[1]);
  engine.Join(1, 3, Layers());
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 1));
  EXPECT_EQ(ReasonOf(*outcome), kWorkerLost);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(1));
  EXPECT_THAT(outcome->error->message, HasSubstr("rank 1 restarted before it contributed to the forward round 1"));
  ASSERT_EQ(engine.View().pending.size(), 1u) << "the one that it has contributed to waits for others";
  EXPECT_EQ(engine.View().pending[0].key, Forward("bn", 2));
}

TEST(FencingTest, ARestartBeforeTheFirstContributionHarmsNothing) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[1]);
  const StreamId reborn = engine.Join(1, 2, Layers());
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(reborn, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 8);
}

TEST(FencingTest, AProceedingGroupWaitsForTheSuccessor) {
  Engine engine;
  GroupConfig config;
  config.missing_policy = MissingPolicy::kProceed;
  config.min_workers = 1;
  const auto workers = JoinAll(engine, 2, config);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kNumbers);
  engine.Contribute(workers[0], Forward("bn", 1), kNumbers);
  engine.Close(workers[1]);
  Join join = MakeJoin(1, 2);
  join.config = config;
  const StreamId reborn = engine.Join(join);
  engine.Contribute(reborn, Forward("bn", 1), kNumbers);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 1))->count, 8);
}

// ---- Runs and generations -------------------------------------------------------------------------------------------

TEST(RunTest, WorkersBringTheirRunToARestartedMaster) {
  Engine before;
  const auto workers = JoinAll(before, 2);
  const uint64_t run_id = before.log(workers[0]).joined->run_id;
  Engine after;
  Join join = MakeJoin(0, 2);
  join.run_id = run_id;
  join.incarnation = 4;
  const StreamId back = after.Join(join);
  EXPECT_EQ(after.log(back).joined->run_id, run_id);
  EXPECT_EQ(after.log(back).joined->incarnation, 4u);
  // A worker that has just started joins that run.
  EXPECT_EQ(after.log(after.Join(MakeJoin(1, 2))).joined->run_id, run_id);
}

TEST(RunTest, AnotherRunIsOver) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kNumbers);
  engine.Close(workers[1]);
  Join join = MakeJoin(1, 2);
  join.run_id = engine.log(workers[0]).joined->run_id + 1;
  join.incarnation = engine.log(workers[1]).joined->incarnation;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kRunSuperseded);
}

TEST(RunTest, ANewRunBeginsWhereNobodyIsPresent) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  const uint64_t old_run = engine.log(workers[0]).joined->run_id;
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kNumbers);
  engine.Close(workers[0]);
  engine.Close(workers[1]);
  const StreamId fresh = engine.Join(0, 2, {BatchNormLayer("bn", 5)});
  EXPECT_NE(engine.log(fresh).joined->run_id, old_run);
  EXPECT_EQ(engine.groups_ended(), 1u);
  EXPECT_EQ(engine.log(engine.Reconnect(workers[1])).close_reason(), kRunSuperseded);
  EXPECT_EQ(engine.View().summary.rounds_completed, 0u);
}

TEST(RunTest, WhoeverComesBackContinuesTheRun) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Close(workers[0]);
  engine.Close(workers[1]);
  const StreamId back = engine.Reconnect(workers[1]);
  EXPECT_EQ(engine.groups_ended(), 0u);
  engine.Contribute(back, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine.Outcome(back, Forward("bn", 0))->count, 8);
}

TEST(GenerationTest, ANewerOneEndsTheGroup) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  Join join = MakeJoin(0, 3);  // Its size may differ.
  join.generation = 1;
  const StreamId next = engine.Join(join);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 0))), kGroupEnded);
  EXPECT_EQ(engine.log(workers[0]).close_reason(), kGenerationSuperseded);
  EXPECT_EQ(engine.log(workers[1]).close_reason(), kGenerationSuperseded);
  EXPECT_EQ(engine.groups_ended(), 1u);
  EXPECT_TRUE(engine.log(next).joined.has_value());
  EXPECT_EQ(engine.View().summary.generation, 1u);
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(1, 3))).close_reason(), kGenerationSuperseded) << "generation 0 is over";
}

// ---- Ends -----------------------------------------------------------------------------------------------------------

TEST(LingerTest, AnEmptyGroupIsDroppedInTheEnd) {
  Engine engine;
  const auto workers = JoinAll(engine, 1);
  engine.Close(workers[0]);
  engine.Advance(absl::Seconds(59));
  EXPECT_EQ(engine.coordinator().ListGroups().size(), 1u);
  engine.Advance(absl::Seconds(1));
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  EXPECT_EQ(engine.groups_ended(), 1u);
  EXPECT_EQ(engine.coordinator().NextDeadline(), absl::InfiniteFuture());
}

TEST(LingerTest, SoIsOneThatEveryoneHasLeft) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  for (const StreamId worker : workers) engine.Leave(worker);
  engine.Advance(absl::Minutes(1));
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
}

TEST(LingerTest, APresentWorkerKeepsTheGroup) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Close(workers[0]);
  engine.Advance(absl::Hours(10));
  EXPECT_EQ(engine.coordinator().ListGroups().size(), 1u);
  EXPECT_FALSE(engine.log(workers[1]).closed);
}

TEST(ShutdownTest, ClosesEveryStreamAndEveryOneThatJoinsAfterwards) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  Join elsewhere = MakeJoin(0, 1);
  elsewhere.id.group = "h";
  const StreamId other = engine.Join(elsewhere);
  engine.Contribute(workers[0], Forward("bn", 0), kNumbers);
  engine.Shutdown();
  for (const StreamId stream : {workers[0], workers[1], other}) {
    EXPECT_EQ(engine.log(stream).close_reason(), kShuttingDown);
    EXPECT_EQ(engine.log(stream).closed_with->code, absl::StatusCode::kUnavailable);
  }
  EXPECT_THAT(engine.log(workers[0]).outcomes, IsEmpty()) << "they resend to the master that comes next";
  EXPECT_EQ(engine.groups_ended(), 2u);
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  EXPECT_EQ(engine.coordinator().NextDeadline(), absl::InfiniteFuture());
  EXPECT_EQ(engine.log(engine.Join(MakeJoin(0, 2))).close_reason(), kShuttingDown);
}

// The next master has not seen the incarnations that the previous one gave out.
TEST(RunTest, ARestartedMasterStillFencesThoseOfBefore) {
  Engine before;
  const StreamId other = before.Join(MakeJoin(0, 2));
  before.Close(before.Join(MakeJoin(1, 2)));
  const StreamId zombie = before.Join(MakeJoin(1, 2));  // Incarnation 2.
  Engine after;
  after.Advance(absl::Seconds(1));
  Join join = MakeJoin(0, 2);
  join.run_id = before.log(other).joined->run_id;
  join.incarnation = before.log(other).joined->incarnation;
  after.Join(join);
  const StreamId fresh = after.Join(MakeJoin(1, 2));
  EXPECT_GT(after.log(fresh).joined->incarnation, before.log(zombie).joined->incarnation);
  join.rank = 1;
  join.incarnation = before.log(zombie).joined->incarnation;
  EXPECT_EQ(after.log(after.Join(join)).close_reason(), kFenced);
  EXPECT_FALSE(after.log(fresh).closed);
}

}  // namespace
}  // namespace syncbn::core
