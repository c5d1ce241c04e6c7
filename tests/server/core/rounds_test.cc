// Rounds from their first contribution to their end.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"
#include "tests/testing/moments_oracle.h"

namespace syncbn::core {
namespace {

using testing::Backward;
using testing::BatchNormLayer;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Numbers;
using testing::ReasonOf;
using testing::SameOutcome;
using testing::Sum;
using testing::SumLayer;

const Numbers kFew{2, {1.0}, {0.5}};
const Numbers kMore{6, {3.0}, {4.0}};

// `world_size` workers that know layer "bn" of one channel, and sum "loss" of two elements.
std::vector<StreamId> JoinAll(Engine& engine, uint32_t world_size, const GroupConfig& config = GroupConfig()) {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size; ++rank) {
    Join join = testing::MakeJoin(rank, world_size);
    join.config = config;
    join.layers = {BatchNormLayer("bn", 1), SumLayer("loss", 2)};
    streams.push_back(engine.Join(join));
  }
  return streams;
}

GroupConfig Proceed(uint32_t min_workers) {
  GroupConfig config;
  config.missing_policy = MissingPolicy::kProceed;
  config.min_workers = min_workers;
  config.round_timeout = absl::Seconds(1);
  return config;
}

// ---- Completion -----------------------------------------------------------------------------------------------------

TEST(RoundTest, CompletesWithTheLastContribution) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 7), kFew);
  EXPECT_THAT(engine.log(workers[0]).outcomes, IsEmpty());
  engine.Advance(absl::Milliseconds(3));
  engine.Contribute(workers[1], Forward("bn", 7), kMore);

  const auto outcome = engine.Outcome(workers[0], Forward("bn", 7));
  EXPECT_EQ(engine.Outcome(workers[1], Forward("bn", 7)), outcome) << "one object for all";
  const testing::ExactMoments exact = testing::Pool({{2, 1.0L, 0.5L}, {6, 3.0L, 4.0L}});
  EXPECT_EQ(outcome->count, 8);
  EXPECT_DOUBLE_EQ(outcome->first[0], static_cast<double>(exact.mean));
  EXPECT_DOUBLE_EQ(outcome->second[0], static_cast<double>(exact.m2 / 8));
  EXPECT_TRUE(outcome->backward_required);
  EXPECT_THAT(outcome->missing_ranks, IsEmpty());

  ASSERT_EQ(engine.ended().size(), 1u);
  EXPECT_EQ(engine.ended()[0].outcome, outcome);
  EXPECT_EQ(engine.ended()[0].duration, absl::Milliseconds(3));
  EXPECT_EQ(engine.ended()[0].contributors, 2u);
  EXPECT_EQ(engine.ended()[0].last_rank, 1u);
}

TEST(RoundTest, OneWorkerCompletesAtOnce) {
  Engine engine;
  const auto workers = JoinAll(engine, 1);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 2);
}

TEST(RoundTest, SumsAddVectors) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[1], Sum("loss", 0), {0, {1.0, 2.0}, {}});
  engine.Contribute(workers[0], Sum("loss", 0), {0, {10.0, 20.0}, {}});
  const auto outcome = engine.Outcome(workers[0], Sum("loss", 0));
  EXPECT_THAT(outcome->first, ElementsAre(11.0, 22.0));
  EXPECT_THAT(outcome->second, IsEmpty());
}

TEST(RoundTest, AllEmptyBatchesHaveAnOutcome) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), {0, {}, {}});
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), "");
  EXPECT_EQ(outcome->count, 0);
  EXPECT_THAT(outcome->first, ElementsAre(0.0));
  EXPECT_THAT(outcome->second, ElementsAre(0.0));
}

TEST(RoundTest, EveryArrivalOrderGivesTheSameBits) {
  const std::vector<Numbers> numbers = {
      {3, {0.1}, {0.7}}, {5, {1e4 + 0.3}, {1e-3}}, {0, {}, {}}, {11, {-7.77}, {123.456}}};
  std::vector<size_t> order = {0, 1, 2, 3};
  std::shared_ptr<const RoundOutcome> forward;
  std::shared_ptr<const RoundOutcome> sum;
  int orders = 0;
  do {
    Engine engine;
    const auto workers = JoinAll(engine, 4);
    for (const size_t rank : order) engine.Contribute(workers[rank], Forward("bn", 0), numbers[rank]);
    for (const size_t rank : order)
      engine.Contribute(workers[rank], Sum("loss", 0), {0, {0.1 * rank, 1e16 * rank}, {}});
    for (const StreamId worker : workers) {
      if (forward == nullptr) forward = engine.Outcome(worker, Forward("bn", 0));
      if (sum == nullptr) sum = engine.Outcome(worker, Sum("loss", 0));
      EXPECT_TRUE(SameOutcome(*engine.Outcome(worker, Forward("bn", 0)), *forward));
      EXPECT_TRUE(SameOutcome(*engine.Outcome(worker, Sum("loss", 0)), *sum));
    }
    ++orders;
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(orders, 24);
}

TEST(RoundTest, KeysNotOrderDecide) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[0], Sum("loss", 5), {0, {1.0, 1.0}, {}});
  engine.Contribute(workers[0], Forward("bn", 1), kMore);
  engine.Contribute(workers[1], Forward("bn", 1), kMore);
  engine.Contribute(workers[1], Sum("loss", 5), {0, {1.0, 1.0}, {}});
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 4);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 1))->count, 12);
  EXPECT_THAT(engine.Outcome(workers[0], Sum("loss", 5))->first, ElementsAre(2.0, 2.0));
}

TEST(RoundTest, OutcomesOfOneFrameTravelTogether) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  for (uint64_t sequence = 0; sequence < 3; ++sequence) engine.Contribute(workers[0], Forward("bn", sequence), kFew);
  FrameReceived frame;
  frame.stream = workers[1];
  for (uint64_t sequence = 0; sequence < 3; ++sequence) {
    frame.contributions.push_back({Forward("bn", sequence), kFew.count, kFew.role, kFew.first, kFew.second});
  }
  engine.On(frame);
  for (const StreamId worker : workers) {
    EXPECT_EQ(engine.log(worker).result_frames, 1u);
    ASSERT_EQ(engine.log(worker).outcomes.size(), 3u);
    for (uint64_t sequence = 0; sequence < 3; ++sequence) {
      EXPECT_EQ(engine.log(worker).outcomes[sequence]->key.sequence, sequence) << "in the order of their ends";
    }
  }
  EXPECT_EQ(engine.ended().size(), 3u);
}

// ---- Members that leave ---------------------------------------------------------------------------------------------

TEST(LeaveTest, WhoHasLeftIsNotWaitedFor) {
  Engine engine;
  const auto workers = JoinAll(engine, 3);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_THAT(engine.log(workers[0]).outcomes, IsEmpty());
  engine.Leave(workers[2]);
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(outcome->count, 4);
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(2));
  EXPECT_TRUE(engine.log(workers[2]).closed);
  EXPECT_EQ(engine.log(workers[2]).close_reason(), "");
  EXPECT_THAT(engine.log(workers[0]).memberships.back().left_ranks, ElementsAre(2));

  engine.Contribute(workers[0], Forward("bn", 1), kFew);
  engine.Contribute(workers[1], Forward("bn", 1), kFew);
  EXPECT_EQ(engine.Outcome(workers[1], Forward("bn", 1))->count, 4);
}

TEST(LeaveTest, WhatItContributedBeforeCounts) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[1], Forward("bn", 0), kMore);
  engine.Leave(workers[1]);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(outcome->count, 8);
  EXPECT_THAT(outcome->missing_ranks, IsEmpty());
}

TEST(LeaveTest, ContributionsOfTheLastFrameCount) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  FrameReceived last;
  last.stream = workers[1];
  last.contributions.push_back({Forward("bn", 0), kFew.count, kFew.role, kFew.first, kFew.second});
  last.leave = "finished";
  engine.On(last);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 4);
}

// ---- Deadlines ------------------------------------------------------------------------------------------------------

TEST(DeadlineTest, CountsFromTheFirstArrivalAndNamesTheMissing) {
  Engine engine;
  GroupConfig config;
  config.round_timeout = absl::Seconds(2);
  const auto workers = JoinAll(engine, 4, config);
  engine.Contribute(workers[1], Forward("bn", 3), kFew);
  engine.Advance(absl::Milliseconds(1500));
  engine.Contribute(workers[2], Forward("bn", 3), kFew);
  EXPECT_EQ(engine.coordinator().NextDeadline(), engine.now() + absl::Milliseconds(500));
  engine.Advance(absl::Milliseconds(499));
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Advance(absl::Milliseconds(1));

  const auto outcome = engine.Outcome(workers[1], Forward("bn", 3));
  EXPECT_EQ(engine.Outcome(workers[2], Forward("bn", 3)), outcome);
  ASSERT_TRUE(outcome->error.has_value());
  EXPECT_EQ(outcome->error->code, absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(*outcome), kRoundTimeout);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(0, 3));
  EXPECT_THAT(outcome->error->message, HasSubstr("ranks 0 and 3 did not contribute to the forward round 3 of layer "
                                                 "\"bn\" within 2s"));
  EXPECT_EQ(engine.ended()[0].duration, absl::Seconds(2));

  engine.Contribute(workers[0], Forward("bn", 3), kFew);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 3)), outcome) << "whoever comes late is told the same";
}

TEST(DeadlineTest, EachRoundHasItsOwn) {
  Engine engine;
  GroupConfig config;
  config.round_timeout = absl::Seconds(2);
  const auto workers = JoinAll(engine, 2, config);
  engine.Contribute(workers[0], Forward("bn", 1), kFew);
  engine.Advance(absl::Seconds(1));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Advance(absl::Seconds(1));
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 1))), kRoundTimeout);
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 0))), "");
}

TEST(DeadlineTest, EarlyWakeUpsAreHarmless) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  EXPECT_THAT(engine.On(TimePassed()), IsEmpty());
}

// ---- PROCEED --------------------------------------------------------------------------------------------------------

TEST(ProceedTest, CompletesAtTheDeadlineWithEnoughWorkers) {
  Engine engine;
  const auto workers = JoinAll(engine, 4, Proceed(2));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[3], Forward("bn", 0), kMore);
  engine.Advance(absl::Seconds(1));
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(outcome->count, 8);
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(1, 2));
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[1], Forward("bn", 0)), outcome) << "the late one is told, and not counted";
}

TEST(ProceedTest, FailsAtTheDeadlineWithTooFew) {
  Engine engine;
  const auto workers = JoinAll(engine, 4, Proceed(3));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[3], Forward("bn", 0), kMore);
  engine.Advance(absl::Seconds(1));
  const auto outcome = engine.Outcome(workers[3], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kTooFewWorkers);
  EXPECT_EQ(outcome->error->code, absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(1, 2));
}

TEST(ProceedTest, CompletesAtOnceWhenEveryoneHasContributed) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, Proceed(1));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[0], Forward("bn", 0))->count, 4);
}

TEST(ProceedTest, DoesNotWaitForTheLost) {
  Engine engine;
  const auto workers = JoinAll(engine, 3, Proceed(2));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  engine.Close(workers[2]);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Advance(absl::Milliseconds(50));
  EXPECT_THAT(engine.Outcome(workers[0], Forward("bn", 0))->missing_ranks, ElementsAre(2));
}

TEST(ProceedTest, SaysAsSoonAsTooFewAreLeft) {
  Engine engine;
  const auto workers = JoinAll(engine, 3, Proceed(2));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Close(workers[1]);
  engine.Close(workers[2]);
  engine.Advance(absl::Milliseconds(50));
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kTooFewWorkers);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(1, 2));
}

// ---- Bad numbers ----------------------------------------------------------------------------------------------------

TEST(BadNumbersTest, TheRoundFailsForAllNamingTheSender) {
  Engine engine;
  const auto workers = JoinAll(engine, 3);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Contribute(workers[2], Forward("bn", 0), {4, {NAN}, {1.0}});
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kNotFinite);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(2));
  EXPECT_EQ(engine.Outcome(workers[2], Forward("bn", 0)), outcome);
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(engine.Outcome(workers[1], Forward("bn", 0)), outcome);
  // The next round is not affected.
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 1), kFew);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[2], Forward("bn", 1))), "");
}

TEST(BadNumbersTest, WrongLengthsFailTheRound) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Sum("loss", 0), {0, {1.0}, {}});
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Sum("loss", 0))), kInvalidContribution);
}

TEST(BadNumbersTest, FiniteNumbersThatOverflowTogether) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  const int64_t count = int64_t{1} << 40;
  engine.Contribute(workers[0], Forward("bn", 0), {count, {0x1p500}, {0.0}});
  engine.Contribute(workers[1], Forward("bn", 0), {count, {-0x1p500}, {0.0}});
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kNotFinite);
  EXPECT_EQ(engine.View().summary.rounds_failed, 1u);
}

TEST(BadNumbersTest, PropagatingLayersFollowIeee754) {
  Engine engine;
  LayerSpec spec = BatchNormLayer("wild", 2);
  spec.numeric_policy = NumericPolicy::kPropagate;
  const StreamId a = engine.Join(0, 2, {spec});
  const StreamId b = engine.Join(1, 2, {spec});
  engine.Contribute(a, Forward("wild", 0), {1, {NAN, 1.0}, {0.0, 0.0}});
  engine.Contribute(b, Forward("wild", 0), {1, {1.0, 3.0}, {0.0, 0.0}});
  const auto outcome = engine.Outcome(a, Forward("wild", 0));
  EXPECT_EQ(ReasonOf(*outcome), "");
  EXPECT_TRUE(std::isnan(outcome->first[0]));
  EXPECT_EQ(outcome->first[1], 2.0);
  EXPECT_EQ(outcome->second[1], 1.0);
}

// A loss scaler finds the infinities of its overflowing steps in the gradients.
TEST(BadNumbersTest, BackwardRoundsAndSumsPropagateThemByAnyPolicy) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kFew);
  engine.Contribute(workers[0], Backward("bn", 0), {0, {INFINITY}, {NAN}});
  engine.Contribute(workers[1], Backward("bn", 0), {0, {1.0}, {2.0}});
  const auto backward = engine.Outcome(workers[1], Backward("bn", 0));
  EXPECT_EQ(ReasonOf(*backward), "");
  EXPECT_EQ(backward->first[0], INFINITY);
  EXPECT_TRUE(std::isnan(backward->second[0]));
  engine.Contribute(workers[0], Sum("loss", 0), {0, {INFINITY, 1.6e308}, {}});
  engine.Contribute(workers[1], Sum("loss", 0), {0, {-INFINITY, 1.6e308}, {}});
  const auto sum = engine.Outcome(workers[0], Sum("loss", 0));
  EXPECT_EQ(ReasonOf(*sum), "");
  EXPECT_TRUE(std::isnan(sum->first[0]));
  EXPECT_EQ(sum->first[1], INFINITY) << "an overflow of the sum alone";
  EXPECT_EQ(engine.Outcome(workers[1], Sum("loss", 0)), sum);
}

// ---- Late rounds ----------------------------------------------------------------------------------------------------

TEST(LateRoundTest, IsToldOnceToThoseWhoHaveContributedAndGoesOn) {
  Engine engine;
  const auto workers = JoinAll(engine, 4);
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Advance(absl::Seconds(4));
  engine.Contribute(workers[2], Forward("bn", 0), kFew);
  engine.Advance(absl::Seconds(5));
  EXPECT_TRUE(engine.log(workers[0]).late_rounds.empty());
  engine.Leave(workers[3]);
  engine.Advance(absl::Minutes(1));
  for (const StreamId worker : {workers[0], workers[2]}) {
    ASSERT_EQ(engine.log(worker).late_rounds.size(), 1u);
    const LateRound& late = engine.log(worker).late_rounds[0];
    EXPECT_EQ(late.key, Forward("bn", 0));
    EXPECT_EQ(late.age, absl::Seconds(10));
    EXPECT_THAT(late.missing_ranks, ElementsAre(1)) << "who has left is not waited for";
    EXPECT_EQ(late.missing, 1u);
  }
  EXPECT_TRUE(engine.log(workers[1]).late_rounds.empty());
  engine.Contribute(workers[1], Forward("bn", 0), kFew);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 0))), "");
}

TEST(LateRoundTest, NamesSixtyFourRanksAndCountsAll) {
  Engine engine;
  const StreamId worker = engine.Join(7, 200, {BatchNormLayer("bn", 1)});
  for (uint64_t sequence = 0; sequence < 3; ++sequence) engine.Contribute(worker, Forward("bn", sequence), kFew);
  size_t effects = 0;
  for (const Effect& effect : engine.Advance(absl::Seconds(10)))
    effects += std::holds_alternative<SendLateRounds>(effect);
  EXPECT_EQ(effects, 1u) << "rounds that become late together are told together";
  ASSERT_EQ(engine.log(worker).late_rounds.size(), 3u);
  for (const LateRound& late : engine.log(worker).late_rounds) {
    EXPECT_EQ(late.missing, 199u);
    ASSERT_EQ(late.missing_ranks.size(), 64u);
    EXPECT_EQ(late.missing_ranks.front(), 0u);
    EXPECT_EQ(late.missing_ranks.back(), 64u);
  }
}

TEST(LateRoundTest, IsNotToldWhereTheDeadlineComesFirst) {
  Engine engine;
  Join join = testing::MakeJoin(0, 2);
  join.config.round_timeout = absl::Seconds(10);
  const StreamId worker = engine.Join(join);
  engine.Declare(worker, {BatchNormLayer("bn", 1)});
  engine.Contribute(worker, Forward("bn", 0), kFew);
  engine.Advance(absl::Seconds(10));
  EXPECT_TRUE(engine.log(worker).late_rounds.empty());
  EXPECT_EQ(ReasonOf(*engine.Outcome(worker, Forward("bn", 0))), kRoundTimeout);
}

TEST(UnknownLayerTest, IsToldToTheSender) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  engine.Contribute(workers[0], Forward("other", 0), kFew);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("other", 0))), kInvalidContribution);
  engine.Contribute(workers[0], Sum("bn", 0), {0, {1.0}, {}});
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Sum("bn", 0))), kInvalidContribution);
  engine.Contribute(workers[0], Forward("loss", 0), kFew);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("loss", 0))), kInvalidContribution);
  EXPECT_THAT(engine.log(workers[1]).outcomes, IsEmpty());
}

// ---- Backward -------------------------------------------------------------------------------------------------------

class BackwardTest : public ::testing::Test {
 protected:
  // Three workers complete forward round 0 with these roles.
  void RunForward(std::vector<BackwardRole> roles, const GroupConfig& config = GroupConfig()) {
    workers_ = JoinAll(engine_, static_cast<uint32_t>(roles.size()), config);
    for (size_t rank = 0; rank < roles.size(); ++rank) {
      engine_.Contribute(workers_[rank], Forward("bn", 0), {4, {1.0 * rank}, {1.0}, roles[rank]});
    }
  }
  void Send(Rank rank) { engine_.Contribute(workers_[rank], Backward("bn", 0), {0, {1.0 + rank}, {10.0 * rank}}); }
  std::shared_ptr<const RoundOutcome> Outcome(Rank rank) { return engine_.Outcome(workers_[rank], Backward("bn", 0)); }

  Engine engine_;
  std::vector<StreamId> workers_;
};

constexpr BackwardRole kRequired = BackwardRole::kRequired;
constexpr BackwardRole kIfRequired = BackwardRole::kIfRequired;
constexpr BackwardRole kNone = BackwardRole::kNone;

TEST_F(BackwardTest, SumsOverTheContributorsOfForward) {
  RunForward({kRequired, kRequired, kRequired});
  for (Rank rank = 0; rank < 3; ++rank) Send(rank);
  EXPECT_EQ(Outcome(0)->count, 12) << "that of the forward round";
  EXPECT_THAT(Outcome(0)->first, ElementsAre(6.0));
  EXPECT_THAT(Outcome(0)->second, ElementsAre(30.0));
  EXPECT_EQ(Outcome(2), Outcome(0));
}

TEST_F(BackwardTest, DoesNotWaitForWhoCannot) {
  RunForward({kRequired, kNone, kIfRequired});
  Send(0);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Backward("bn", 0)), IsEmpty());
  Send(2);
  EXPECT_THAT(Outcome(0)->first, ElementsAre(4.0));
  EXPECT_EQ(Outcome(0)->count, 12);
  EXPECT_EQ(ReasonOf(*Outcome(2)), "");
}

TEST_F(BackwardTest, WhoAnnouncedNoneIsRefused) {
  RunForward({kRequired, kNone, kRequired});
  Send(1);
  EXPECT_EQ(ReasonOf(*Outcome(1)), kNotAContributor);
  Send(0);
  Send(2);
  EXPECT_EQ(ReasonOf(*Outcome(0)), "") << "the round is as it was";
}

TEST_F(BackwardTest, WhoAnnouncedNoneIsRefusedAfterItsEndToo) {
  RunForward({kRequired, kNone, kRequired});
  Send(0);
  Send(2);
  Send(1);
  EXPECT_EQ(ReasonOf(*Outcome(1)), kNotAContributor);
}

TEST_F(BackwardTest, NobodyRequiresIt) {
  RunForward({kIfRequired, kNone, kIfRequired});
  EXPECT_FALSE(engine_.Outcome(workers_[0], Forward("bn", 0))->backward_required);
  Send(0);
  EXPECT_EQ(ReasonOf(*Outcome(0)), kNotAContributor);
}

TEST_F(BackwardTest, NeedsACompletedForwardRound) {
  RunForward({kRequired, kRequired});
  engine_.Contribute(workers_[0], Backward("bn", 1), {0, {1.0}, {1.0}});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Backward("bn", 1))), kForwardRoundUnknown);

  engine_.Contribute(workers_[0], Forward("bn", 2), {4, {NAN}, {1.0}});
  engine_.Contribute(workers_[0], Backward("bn", 2), {0, {1.0}, {1.0}});
  const auto outcome = engine_.Outcome(workers_[0], Backward("bn", 2));
  EXPECT_EQ(ReasonOf(*outcome), kForwardRoundUnknown);
  EXPECT_THAT(outcome->error->message, HasSubstr("failed"));
}

TEST_F(BackwardTest, WhoWasMissingInForwardIsNoContributor) {
  workers_ = JoinAll(engine_, 3, Proceed(2));
  engine_.Contribute(workers_[0], Forward("bn", 0), kFew);
  engine_.Contribute(workers_[1], Forward("bn", 0), kFew);
  engine_.Advance(absl::Seconds(1));
  Send(2);
  EXPECT_EQ(ReasonOf(*Outcome(2)), kNotAContributor);
  Send(0);
  Send(1);
  EXPECT_EQ(Outcome(0)->count, 4);
  EXPECT_THAT(Outcome(0)->first, ElementsAre(3.0));
}

TEST_F(BackwardTest, DeadlineNamesOnlyThoseItWaitsFor) {
  GroupConfig config;
  config.round_timeout = absl::Seconds(1);
  RunForward({kRequired, kNone, kRequired}, config);
  Send(0);
  engine_.Advance(absl::Seconds(1));
  EXPECT_EQ(ReasonOf(*Outcome(0)), kRoundTimeout);
  EXPECT_THAT(Outcome(0)->error->ranks, ElementsAre(2));
}

TEST_F(BackwardTest, EmptyBatchSendsNothing) {
  RunForward({kRequired, kRequired});
  engine_.Contribute(workers_[0], Backward("bn", 0), {0, {}, {}});
  Send(1);
  EXPECT_THAT(Outcome(0)->first, ElementsAre(2.0));
}

// The forward round may be forgotten while its backward round waits, which still knows the ranks that it waits for.
TEST(ForgottenForwardTest, BackwardRoundStandsOnItsOwn) {
  Limits limits;
  limits.retained_rounds = 2;
  Engine engine(limits);
  const auto workers = JoinAll(engine, 3);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kFew);
  engine.Contribute(workers[0], Backward("bn", 0), {0, {1.0}, {10.0}});
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 9), kFew);
  engine.Contribute(workers[1], Backward("bn", 0), {0, {2.0}, {20.0}});
  engine.Leave(workers[2]);
  const auto outcome = engine.Outcome(workers[0], Backward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), "");
  EXPECT_EQ(outcome->count, 6);
  EXPECT_THAT(outcome->first, ElementsAre(3.0));
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(2));
}

TEST(ForgottenForwardTest, TheLostAreStillWaitedFor) {
  Limits limits;
  limits.retained_rounds = 2;
  Engine engine(limits);
  const auto workers = JoinAll(engine, 3);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 0), kFew);
  engine.Contribute(workers[0], Backward("bn", 0), {0, {1.0}, {10.0}});
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("bn", 9), kFew);
  engine.Close(workers[2]);
  engine.Advance(absl::Milliseconds(50));
  const auto outcome = engine.Outcome(workers[0], Backward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kWorkerLost);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(2));
}

// min_workers bounds the number of missing ranks. Ranks that announced NONE are not missing.
TEST_F(BackwardTest, MinWorkersDoesNotCountWhoAnnouncedNone) {
  RunForward({kRequired, kNone, kNone}, Proceed(2));
  Send(0);
  EXPECT_EQ(ReasonOf(*Outcome(0)), "");
  EXPECT_THAT(Outcome(0)->first, ElementsAre(1.0));
}

TEST_F(BackwardTest, MinWorkersIsAtMostAllThatAreExpected) {
  RunForward({kRequired, kNone, kRequired}, Proceed(3));
  Send(0);
  engine_.Advance(absl::Seconds(1));
  EXPECT_EQ(ReasonOf(*Outcome(0)), kTooFewWorkers);
  EXPECT_THAT(Outcome(0)->error->ranks, ElementsAre(2));
}

TEST(ProceedTest, SaysAtOnceWhenTooFewAreLeft) {
  Engine engine;
  const auto workers = JoinAll(engine, 4, Proceed(3));
  engine.Contribute(workers[0], Forward("bn", 0), kFew);
  engine.Leave(workers[1]);
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Leave(workers[2]);
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("bn", 0))), kTooFewWorkers);
}

TEST(BadNumbersTest, CountsThatCannotBeAddedAreRefused) {
  Engine engine;
  const auto workers = JoinAll(engine, 2);
  const int64_t huge = std::numeric_limits<int64_t>::max();
  engine.Contribute(workers[0], Forward("bn", 0), {huge, {1.0}, {1.0}});
  engine.Contribute(workers[1], Forward("bn", 0), {huge, {1.0}, {1.0}});
  const auto outcome = engine.Outcome(workers[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kInvalidContribution);
  EXPECT_THAT(outcome->error->message, HasSubstr("count = 9223372036854775807"));
}

}  // namespace
}  // namespace syncbn::core
