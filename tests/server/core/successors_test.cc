// MISSING_POLICY_WAIT: a worker that has died comes back as a new incarnation, at an earlier step, and takes the place
// of its predecessor. Its peers wait, and nobody sees a difference.

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::Backward;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Numbers;
using testing::ReasonOf;
using testing::SameOutcome;
using testing::Sum;

constexpr uint32_t kWorkers = 3;

GroupConfig Waiting(absl::Duration grace = absl::Seconds(30)) {
  GroupConfig config;
  config.missing_policy = MissingPolicy::kWait;
  config.rejoin_grace = grace;
  return config;
}

// Returns the contribution of a rank to a round: the same in every life.
Numbers Of(Rank rank, const RoundKey& key) {
  const double x = 0.1 + rank + 0.3 * static_cast<double>(key.sequence);
  if (key.phase == Phase::kSum) return {0, {x}, {}};
  return {key.phase == Phase::kForward ? 2 + static_cast<int64_t>(rank) : 0, {x}, {0.7 * (rank + 1)}};
}

class SuccessorsTest : public ::testing::Test {
 protected:
  explicit SuccessorsTest(const Limits& limits = Limits()) : engine_(limits) {}

  StreamId Enter(Rank rank, uint64_t run = 0, uint64_t incarnation = 0) {
    core::Join join = testing::MakeJoin(rank, kWorkers);
    join.config = config_;
    join.run_id = run;
    join.incarnation = incarnation;
    const StreamId stream = engine_.Join(join);
    engine_.Declare(stream, {testing::BatchNormLayer("a", 1), testing::SumLayer("s", 1)});
    return stream;
  }

  void EnterAll() {
    for (Rank rank = 0; rank < kWorkers; ++rank) streams_.push_back(Enter(rank));
  }

  void Contribute(Rank rank, const RoundKey& key) { engine_.Contribute(streams_[rank], key, Of(rank, key)); }

  std::shared_ptr<const RoundOutcome> Complete(const RoundKey& key) {
    for (Rank rank = 0; rank < kWorkers; ++rank) Contribute(rank, key);
    return engine_.Outcome(streams_[0], key);
  }

  void Die(Rank rank) { engine_.Close(streams_[rank]); }
  void Rise(Rank rank) { streams_[rank] = Enter(rank); }

  // The outcome that the rank's newest life was told.
  std::shared_ptr<const RoundOutcome> Told(Rank rank, const RoundKey& key) {
    return engine_.Outcome(streams_[rank], key);
  }

  GroupConfig config_ = Waiting();
  Engine engine_;
  std::vector<StreamId> streams_;  // By rank.
};

TEST_F(SuccessorsTest, ARoundWaitsForTheSuccessorOfAWorkerThatHasNotContributed) {
  EnterAll();
  Contribute(0, Forward("a", 0));
  Contribute(2, Forward("a", 0));
  Die(1);
  engine_.Advance(absl::Seconds(29));
  Rise(1);
  EXPECT_THAT(engine_.Outcomes(streams_[0], Forward("a", 0)), IsEmpty());
  Contribute(1, Forward("a", 0));
  EXPECT_EQ(ReasonOf(*Told(0, Forward("a", 0))), "");
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 0)), *Told(0, Forward("a", 0))));
  EXPECT_EQ(Told(0, Forward("a", 0))->count, 2 + 3 + 4);
}

TEST_F(SuccessorsTest, ASuccessorRepeatsTheStepAndGetsTheOutcomesThatItsPeersHaveHad) {
  EnterAll();
  const auto forward = Complete(Forward("a", 7));
  const auto backward = Complete(Backward("a", 7));
  Contribute(1, Sum("s", 7));
  Contribute(0, Sum("s", 7));
  Die(1);
  Rise(1);
  EXPECT_THAT(engine_.Outcomes(streams_[0], Sum("s", 7)), IsEmpty()) << "the round does not fail";
  Contribute(1, Forward("a", 7));
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 7)), *forward));
  Contribute(1, Backward("a", 7));
  EXPECT_TRUE(SameOutcome(*Told(1, Backward("a", 7)), *backward));
  Contribute(1, Sum("s", 7));
  Contribute(2, Sum("s", 7));
  EXPECT_EQ(ReasonOf(*Told(0, Sum("s", 7))), "");
  EXPECT_TRUE(SameOutcome(*Told(1, Sum("s", 7)), *Told(0, Sum("s", 7))));
  EXPECT_EQ(engine_.Layer("a").running.updates, 1u) << "the repeated round counts once";
}

TEST_F(SuccessorsTest, ASuccessorIsToldWhereItsGroupStands) {
  EnterAll();
  EXPECT_THAT(engine_.log(streams_[2]).joined->newest_rounds, IsEmpty()) << "the group begins";
  Complete(Forward("a", 7));
  Complete(Forward("a", 8));
  Complete(Backward("a", 7));
  Complete(Sum("s", 3));
  Contribute(0, Forward("a", 9));
  Die(1);
  Rise(1);
  EXPECT_THAT(engine_.log(streams_[1]).joined->newest_rounds,
              ElementsAre(Forward("a", 8), Backward("a", 7), Sum("s", 3)));
  const StreamId back = engine_.Reconnect(streams_[0]);
  EXPECT_THAT(engine_.log(back).joined->newest_rounds, IsEmpty()) << "one that comes back knows";
}

TEST_F(SuccessorsTest, OtherNumbersAreRefusedWhereTheRoundHasEnded) {
  EnterAll();
  Complete(Forward("a", 0));
  Die(1);
  Rise(1);
  Numbers other = Of(1, Forward("a", 0));
  other.first[0] += 1e-9;
  engine_.Contribute(streams_[1], Forward("a", 0), other);
  EXPECT_EQ(ReasonOf(*Told(1, Forward("a", 0))), kPayloadChanged);
}

TEST_F(SuccessorsTest, AfterTheGraceRoundsFailAsTheyDoWithoutAWait) {
  EnterAll();
  Contribute(0, Forward("a", 0));
  Die(1);
  engine_.Advance(absl::Seconds(29));
  EXPECT_THAT(engine_.Outcomes(streams_[0], Forward("a", 0)), IsEmpty());
  engine_.Advance(absl::Seconds(2));
  EXPECT_EQ(ReasonOf(*Told(0, Forward("a", 0))), kWorkerLost);
  EXPECT_THAT(Told(0, Forward("a", 0))->error->ranks, ElementsAre(1));
}

TEST_F(SuccessorsTest, TheGraceIsHalfOfTheRoundTimeoutByDefault) {
  config_.rejoin_grace.reset();
  config_.round_timeout = absl::Seconds(80);
  EnterAll();
  EXPECT_EQ(engine_.log(streams_[0]).joined->config.rejoin_grace, absl::Seconds(40));
  config_.round_timeout = absl::Hours(2);
  Engine other;
  core::Join join = testing::MakeJoin(0, kWorkers);
  join.config = config_;
  EXPECT_EQ(other.log(other.Join(join)).joined->config.rejoin_grace, absl::Minutes(10));
}

TEST_F(SuccessorsTest, WorkersThatDisagreeAboutThePolicyAreRefused) {
  EnterAll();
  Die(1);
  config_.missing_policy = MissingPolicy::kFail;
  const StreamId stream = Enter(1);
  EXPECT_EQ(engine_.log(stream).close_reason(), kGroupConfigMismatch);
  EXPECT_THAT(engine_.log(stream).closed_with->message, HasSubstr("WAIT"));
}

TEST_F(SuccessorsTest, WhereAllHaveDiedTheirSuccessorsGoOnWithTheRun) {
  EnterAll();
  const uint64_t run = engine_.log(streams_[0]).joined->run_id;
  const auto outcome = Complete(Forward("a", 4));
  Contribute(0, Backward("a", 4));
  for (Rank rank = 0; rank < kWorkers; ++rank) Die(rank);
  engine_.Advance(absl::Seconds(20));
  for (Rank rank = 0; rank < kWorkers; ++rank) Rise(rank);
  EXPECT_EQ(engine_.log(streams_[0]).joined->run_id, run);
  for (Rank rank = 0; rank < kWorkers; ++rank) {
    Contribute(rank, Forward("a", 4));
    EXPECT_TRUE(SameOutcome(*Told(rank, Forward("a", 4)), *outcome));
  }
  EXPECT_EQ(ReasonOf(*Complete(Backward("a", 4))), "");
}

TEST_F(SuccessorsTest, TheGroupIsKeptAsLongAsItsWorkersAreWaitedFor) {
  config_.rejoin_grace = absl::Minutes(4);
  EnterAll();
  const uint64_t run = engine_.log(streams_[0]).joined->run_id;
  for (Rank rank = 0; rank < kWorkers; ++rank) Die(rank);
  engine_.Advance(absl::Minutes(3));
  Rise(0);
  EXPECT_EQ(engine_.log(streams_[0]).joined->run_id, run);
}

TEST_F(SuccessorsTest, AfterEverybodyHasLeftANewRunBegins) {
  EnterAll();
  const uint64_t run = engine_.log(streams_[0]).joined->run_id;
  for (Rank rank = 0; rank < kWorkers; ++rank) engine_.Leave(streams_[rank]);
  Rise(0);
  EXPECT_NE(engine_.log(streams_[0]).joined->run_id, run);
}

TEST_F(SuccessorsTest, AfterTheGraceOfAllANewRunBegins) {
  config_.rejoin_grace = absl::Seconds(5);
  EnterAll();
  const uint64_t run = engine_.log(streams_[0]).joined->run_id;
  for (Rank rank = 0; rank < kWorkers; ++rank) Die(rank);
  engine_.Advance(absl::Seconds(6));
  Rise(0);
  EXPECT_NE(engine_.log(streams_[0]).joined->run_id, run);
}

// ---- Outcomes are kept for longer -----------------------------------------------------------------------------------

class SmallMemoryTest : public SuccessorsTest {
 protected:
  static Limits Small() {
    Limits limits;
    limits.max_retained_bytes = 32;
    limits.max_retained_bytes_waiting = 128;
    limits.max_newest_rounds_bytes = 60;
    return limits;
  }
  SmallMemoryTest() : SuccessorsTest(Small()) {}
};

TEST_F(SmallMemoryTest, TheOutcomesOfAStepAreKept) {
  EnterAll();
  for (uint64_t sequence = 0; sequence < 9; ++sequence) Complete(Forward("a", sequence));
  Die(1);
  Rise(1);
  Contribute(1, Forward("a", 1));
  EXPECT_EQ(ReasonOf(*Told(1, Forward("a", 1))), "");
  Contribute(1, Forward("a", 0));
  EXPECT_EQ(ReasonOf(*Told(1, Forward("a", 0))), kRoundExpired);
  EXPECT_THAT(Told(1, Forward("a", 0))->error->message, HasSubstr("max_retained_bytes_waiting = 128"));
}

TEST_F(SmallMemoryTest, TheListOfNewestRoundsIsBounded) {
  EnterAll();
  Complete(Forward("a", 0));
  Complete(Backward("a", 0));
  Complete(Sum("s", 0));
  Die(1);
  Rise(1);
  EXPECT_THAT(engine_.log(streams_[1]).joined->newest_rounds, ElementsAre(Forward("a", 0), Backward("a", 0)));
}

// ---- The master dies as well ----------------------------------------------------------------------------------------

// The group of a master that has died, at another one. Ranks 0 and 2 come back; rank 1 has died too.
class BothDieTest : public SuccessorsTest {
 protected:
  static constexpr uint64_t kRun = 77;

  // Returns what an earlier master has told of the round.
  std::shared_ptr<const RoundOutcome> Before(const RoundKey& key) {
    Engine earlier;
    std::vector<StreamId> streams;
    for (Rank rank = 0; rank < kWorkers; ++rank) {
      streams.push_back(earlier.Join(testing::MakeJoin(rank, kWorkers)));
      earlier.Declare(streams.back(), {testing::BatchNormLayer("a", 1), testing::SumLayer("s", 1)});
    }
    for (Rank rank = 0; rank < kWorkers; ++rank) earlier.Contribute(streams[rank], key, Of(rank, key));
    return earlier.Outcome(streams[0], key);
  }

  // The rank comes back, and repeats what it has had the outcome of.
  void Return(Rank rank, const std::vector<std::shared_ptr<const RoundOutcome>>& told) {
    streams_.resize(kWorkers);
    streams_[rank] = Enter(rank, kRun, 5);
    FrameReceived frame;
    frame.stream = streams_[rank];
    std::vector<Numbers> numbers;
    for (const auto& outcome : told) numbers.push_back(Of(rank, outcome->key));
    for (size_t i = 0; i < told.size(); ++i) {
      EndedReport report;
      report.key = told[i]->key;
      report.digest = told[i]->digest;
      report.count = told[i]->count;
      report.backward_required = told[i]->backward_required;
      frame.ended.push_back(report);
      frame.contributions.push_back(
          {told[i]->key, numbers[i].count, numbers[i].role, numbers[i].first, numbers[i].second, /*repeats=*/true});
    }
    frame.caught_up = true;
    engine_.On(frame);
  }

  void Rise(Rank rank) {
    streams_.resize(kWorkers);
    streams_[rank] = Enter(rank);
  }
};

TEST_F(BothDieTest, ASuccessorGetsOutcomesOfTheEarlierMasterForItsOwnRepeatedPart) {
  const auto told = Before(Forward("a", 3));
  Return(0, {told});
  Return(2, {told});
  Rise(1);
  Contribute(1, Forward("a", 3));
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 3)), *told));
  EXPECT_THAT(engine_.Outcomes(streams_[0], Forward("a", 3)), IsEmpty()) << "it has had the outcome";
}

TEST_F(BothDieTest, TheOrderOfTheirReturnDoesNotMatter) {
  const auto told = Before(Forward("a", 3));
  Rise(1);
  Contribute(1, Forward("a", 3));
  Return(2, {told});
  EXPECT_EQ(engine_.log(streams_[1]).joined->run_id, kRun) << "the run of those who have a past";
  EXPECT_THAT(engine_.Outcomes(streams_[1], Forward("a", 3)), IsEmpty());
  Return(0, {told});
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 3)), *told));
}

TEST_F(BothDieTest, OneThatMissedAnOutcomeWaitsForTheSuccessor) {
  const auto told = Before(Forward("a", 3));
  Return(0, {told});
  Return(2, {});
  Contribute(2, Forward("a", 3));
  EXPECT_THAT(engine_.Outcomes(streams_[2], Forward("a", 3)), IsEmpty());
  Rise(1);
  EXPECT_THAT(engine_.Outcomes(streams_[2], Forward("a", 3)), IsEmpty());
  Contribute(1, Forward("a", 3));
  EXPECT_TRUE(SameOutcome(*Told(2, Forward("a", 3)), *told));
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 3)), *told));
}

TEST_F(BothDieTest, OneThatDiesAfterItHasComeBackIsWaitedForToo) {
  const auto told = Before(Forward("a", 3));
  Return(0, {told});
  Return(1, {});  // It does not hold the round any more.
  Return(2, {told});
  Die(1);
  Contribute(2, Forward("a", 4));
  Rise(1);
  Contribute(1, Forward("a", 3));
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 3)), *told));
}

// They had nothing left to do when their master died, and the one whose successor comes had its last step to repeat.
TEST_F(BothDieTest, ASuccessorThatComesAfterTheOthersHaveLeftGoesOnWithTheRun) {
  const auto told = Before(Forward("a", 3));
  for (const Rank rank : {0u, 2u}) {
    Return(rank, {told});
    engine_.Leave(streams_[rank]);
  }
  engine_.Advance(absl::Seconds(2));
  Rise(1);
  EXPECT_EQ(engine_.log(streams_[1]).joined->run_id, kRun);
  Contribute(1, Forward("a", 3));
  EXPECT_TRUE(SameOutcome(*Told(1, Forward("a", 3)), *told));
  Contribute(1, Forward("a", 4));
  EXPECT_THAT(Told(1, Forward("a", 4))->missing_ranks, ElementsAre(0, 2));
}

TEST_F(BothDieTest, AfterTheGroupIsForgottenANewRunBegins) {
  Return(0, {Before(Forward("a", 3))});
  engine_.Leave(streams_[0]);
  engine_.Advance(absl::Seconds(61));
  Rise(1);
  EXPECT_NE(engine_.log(streams_[1]).joined->run_id, kRun);
}

TEST_F(BothDieTest, ASuccessorThatMeetsAThirdMasterIsStillWaitedFor) {
  const auto told = Before(Forward("a", 3));
  Return(1, {});  // It had joined the second master, and contributed nothing yet.
  Return(0, {told});
  Return(2, {});
  Contribute(2, Forward("a", 3));
  EXPECT_THAT(engine_.Outcomes(streams_[2], Forward("a", 3)), IsEmpty());
  Contribute(1, Forward("a", 3));
  EXPECT_TRUE(SameOutcome(*Told(2, Forward("a", 3)), *told));
}

TEST_F(BothDieTest, WhereAllWaitForWhatIsLostTheyAreToldSo) {
  const auto told = Before(Forward("a", 3));
  Return(1, {});
  Return(0, {told});
  Return(2, {});
  for (const Rank rank : {0u, 1u}) {
    engine_.ContributeAndBlock(streams_[rank], Forward("a", 4), Of(rank, Forward("a", 4)));
  }
  EXPECT_THAT(engine_.Outcomes(streams_[0], Forward("a", 4)), IsEmpty());
  engine_.ContributeAndBlock(streams_[2], Forward("a", 3), Of(2, Forward("a", 3)));
  EXPECT_EQ(ReasonOf(*Told(2, Forward("a", 3))), kOutcomeLost);
  EXPECT_THAT(Told(2, Forward("a", 3))->error->ranks, ElementsAre(1));
  EXPECT_THAT(engine_.Outcomes(streams_[0], Forward("a", 4)), IsEmpty()) << "rank 2 may still come";
}

TEST_F(BothDieTest, AnotherResultIsNotToldAsTheRoundsOwn) {
  const auto told = Before(Forward("a", 3));
  Return(0, {told});
  Return(2, {told});
  Rise(1);
  Numbers other = Of(1, Forward("a", 3));
  other.first[0] += 1e-9;
  engine_.Contribute(streams_[1], Forward("a", 3), other);
  EXPECT_EQ(ReasonOf(*Told(1, Forward("a", 3))), kOutcomeLost);
}

TEST_F(BothDieTest, WithoutASuccessorTheWaitEndsWithTheGrace) {
  const auto told = Before(Forward("a", 3));
  Return(0, {told});
  Return(1, {});
  Return(2, {});
  Die(1);
  Contribute(2, Forward("a", 3));
  EXPECT_THAT(engine_.Outcomes(streams_[2], Forward("a", 3)), IsEmpty());
  engine_.Advance(absl::Seconds(31));
  EXPECT_EQ(ReasonOf(*Told(2, Forward("a", 3))), kOutcomeLost);
  EXPECT_THAT(Told(2, Forward("a", 3))->error->ranks, ElementsAre(1));
}

}  // namespace
}  // namespace syncbn::core
