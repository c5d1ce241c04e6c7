// Repeated contributions: with the same numbers, with others, and too late.

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

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

const Numbers kNumbers{4, {1.0, 2.0}, {0.5, 0.25}};
const Numbers kOthers{4, {1.0, 2.5}, {0.5, 0.25}};

class ReplayTest : public ::testing::Test {
 protected:
  explicit ReplayTest(Limits limits = Limits()) : engine_(limits) {}

  void JoinAll(uint32_t world_size) {
    for (Rank rank = 0; rank < world_size; ++rank) {
      workers_.push_back(engine_.Join(rank, world_size, {BatchNormLayer("bn", 2)}));
    }
  }
  void CompleteForward(uint64_t sequence) {
    for (const StreamId worker : workers_) engine_.Contribute(worker, Forward("bn", sequence), kNumbers);
  }
  // A new process of this rank joins.
  StreamId Restart(Rank rank) {
    engine_.Close(workers_[rank]);
    const auto world_size = static_cast<uint32_t>(workers_.size());
    return workers_[rank] = engine_.Join(rank, world_size, {BatchNormLayer("bn", 2)});
  }

  Engine engine_;
  std::vector<StreamId> workers_;
};

TEST_F(ReplayTest, SameNumbersGetTheSameOutcome) {
  JoinAll(2);
  CompleteForward(0);
  const auto outcome = engine_.Outcome(workers_[0], Forward("bn", 0));
  const StreamId again = engine_.Reconnect(workers_[0]);
  engine_.Contribute(again, Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.Outcome(again, Forward("bn", 0)), outcome) << "the very object";
  EXPECT_EQ(engine_.ended().size(), 1u);
  EXPECT_EQ(engine_.Layer("bn").running.updates, 1u);
}

TEST_F(ReplayTest, FailuresAreReplayedToo) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  engine_.Advance(absl::Minutes(10));
  const auto outcome = engine_.Outcome(workers_[0], Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*outcome), kRoundTimeout);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  EXPECT_THAT(engine_.Outcomes(workers_[0], Forward("bn", 0)), ElementsAre(outcome, outcome));
}

TEST_F(ReplayTest, OtherNumbersAreAnErrorAndTheFirstStand) {
  JoinAll(2);
  CompleteForward(0);
  const auto outcome = engine_.Outcome(workers_[1], Forward("bn", 0));
  engine_.Contribute(workers_[0], Forward("bn", 0), kOthers);
  const auto refusal = engine_.log(workers_[0]).outcomes.back();
  EXPECT_EQ(refusal->error->code, absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ReasonOf(*refusal), kPayloadChanged);
  EXPECT_EQ(engine_.log(workers_[1]).outcomes.size(), 1u) << "told to the sender alone";
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.log(workers_[0]).outcomes.back(), outcome);
}

TEST_F(ReplayTest, AChangedRoleIsAChangedPayload) {
  JoinAll(1);
  CompleteForward(0);
  Numbers numbers = kNumbers;
  numbers.role = BackwardRole::kNone;
  engine_.Contribute(workers_[0], Forward("bn", 0), numbers);
  EXPECT_EQ(ReasonOf(*engine_.log(workers_[0]).outcomes.back()), kPayloadChanged);
}

TEST_F(ReplayTest, AfterARestartTheMessageSaysWhatToDo) {
  JoinAll(2);
  CompleteForward(0);
  const StreamId reborn = Restart(0);
  engine_.Contribute(reborn, Forward("bn", 0), kOthers);
  const auto refusal = engine_.Outcome(reborn, Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*refusal), kPayloadChanged);
  EXPECT_THAT(refusal->error->message, HasSubstr("must resume at a sequence that is greater than any used before"));
}

TEST_F(ReplayTest, InFlightTheSameNumbersCountOnce) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  const StreamId again = engine_.Reconnect(workers_[0]);
  EXPECT_THAT(engine_.Contribute(again, Forward("bn", 0), kNumbers), IsEmpty());
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.Outcome(again, Forward("bn", 0))->count, 8);
  EXPECT_EQ(engine_.ended()[0].contributors, 2u);
}

TEST_F(ReplayTest, InFlightOtherNumbersAreRefused) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  engine_.Contribute(workers_[0], Forward("bn", 0), kOthers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("bn", 0))), kPayloadChanged);
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.Outcome(workers_[1], Forward("bn", 0))->first, kNumbers.first);
}

TEST_F(ReplayTest, InFlightARestartedWorkerReplacesItsPredecessor) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  const StreamId reborn = Restart(0);
  engine_.Contribute(reborn, Forward("bn", 0), kOthers);
  EXPECT_THAT(engine_.log(reborn).outcomes, IsEmpty());
  engine_.Contribute(workers_[1], Forward("bn", 0), kOthers);
  const auto outcome = engine_.Outcome(workers_[1], Forward("bn", 0));
  EXPECT_EQ(outcome->first, kOthers.first);
  EXPECT_EQ(outcome->count, 8);
  EXPECT_EQ(engine_.ended()[0].contributors, 2u);
}

TEST_F(ReplayTest, WhatAPredecessorSentStandsUntilItIsReplaced) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  const StreamId reborn = Restart(0);
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.Outcome(reborn, Forward("bn", 0))->count, 8);
}

// ---- Forgotten rounds -----------------------------------------------------------------------------------------------

class ShortMemoryTest : public ReplayTest {
 protected:
  static Limits FewRounds() {
    Limits limits;
    limits.retained_rounds = 3;
    return limits;
  }
  ShortMemoryTest() : ReplayTest(FewRounds()) {}
};

TEST_F(ShortMemoryTest, RoundsFarBehindTheNewestAreExpired) {
  JoinAll(2);
  Numbers numbers = kNumbers;
  numbers.role = BackwardRole::kNone;  // No backward round is awaited.
  for (uint64_t sequence = 0; sequence < 6; ++sequence) {
    for (const StreamId worker : workers_) engine_.Contribute(worker, Forward("bn", sequence), numbers);
  }
  const StreamId again = engine_.Reconnect(workers_[0]);
  for (uint64_t sequence = 0; sequence < 6; ++sequence) engine_.Contribute(again, Forward("bn", sequence), numbers);
  for (uint64_t sequence = 0; sequence < 6; ++sequence) {
    const auto outcome = engine_.Outcome(again, Forward("bn", sequence));
    EXPECT_EQ(ReasonOf(*outcome), sequence < 2 ? kRoundExpired : "") << sequence << ": 3 behind is remembered";
  }
  EXPECT_EQ(engine_.ended().size(), 6u) << "an expired key begins no round";
  EXPECT_THAT(engine_.View().pending, IsEmpty());
}

// A recurrent network uses a layer many times before the backward pass, which runs in reverse.
class RecurrentTest : public ReplayTest, public ::testing::WithParamInterface<uint64_t> {};

TEST_P(RecurrentTest, AwaitedForwardRoundsAreKept) {
  JoinAll(2);
  const uint64_t uses = GetParam();
  for (uint64_t sequence = 0; sequence < uses; ++sequence) CompleteForward(sequence);
  for (uint64_t sequence = uses; sequence-- > 0;) {
    const Numbers sums{0, {1.0, static_cast<double>(sequence)}, {1.0, 1.0}};
    for (const StreamId worker : workers_) engine_.Contribute(worker, Backward("bn", sequence), sums);
    const auto outcome = engine_.Outcome(workers_[1], Backward("bn", sequence));
    ASSERT_EQ(ReasonOf(*outcome), "") << sequence << ": " << outcome->error->message;
    EXPECT_EQ(outcome->count, 8);
    EXPECT_THAT(outcome->first, ElementsAre(2.0, 2.0 * sequence));
  }
  // The rounds that ended last can be replayed, although their sequences are far behind.
  const StreamId again = workers_[0] = engine_.Reconnect(workers_[0]);
  engine_.Contribute(again, Backward("bn", 5), {0, {1.0, 5.0}, {1.0, 1.0}});
  EXPECT_EQ(engine_.Outcome(again, Backward("bn", 5)), engine_.Outcome(workers_[1], Backward("bn", 5)));
  // A forward round that has had its backward round is forgotten like others.
  CompleteForward(uses + 500);
  engine_.Contribute(again, Forward("bn", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(again, Forward("bn", 0))), kRoundExpired);
}

INSTANTIATE_TEST_SUITE_P(Uses, RecurrentTest, ::testing::Values(128, 129, 300, 1000));

TEST(AwaitedLimitTest, TheErrorNamesTheLimit) {
  Limits limits;
  limits.max_awaited_bytes = 20'000;
  limits.max_retained_bytes = 1;
  Engine engine(limits);
  const StreamId worker = engine.Join(0, 1, {BatchNormLayer("bn", 2)});
  for (uint64_t sequence = 0; sequence < 1000; ++sequence) engine.Contribute(worker, Forward("bn", sequence), kNumbers);
  const Numbers sums{0, {1.0, 1.0}, {1.0, 1.0}};
  engine.Contribute(worker, Backward("bn", 0), sums);
  const auto refusal = engine.Outcome(worker, Backward("bn", 0));
  EXPECT_EQ(ReasonOf(*refusal), kRoundExpired);
  EXPECT_THAT(refusal->error->message, HasSubstr("max_awaited_bytes = 20000"));
  engine.Contribute(worker, Backward("bn", 999), sums);
  EXPECT_EQ(ReasonOf(*engine.Outcome(worker, Backward("bn", 999))), "");
  engine.Contribute(worker, Forward("bn", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.log(worker).outcomes.back()), kRoundExpired) << "it begins no second round";
}

TEST_F(ShortMemoryTest, ARoundInFlightIsNotExpiredByNewerOnes) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  CompleteForward(50);
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", 0))), "");
}

// ---- Numbers far ahead ----------------------------------------------------------------------------------------------

// A single worker uses a sequence far ahead, by malice or because it resumed wrongly: the rounds of the others go on.
class FarAheadTest : public ReplayTest, public ::testing::WithParamInterface<uint64_t> {};

TEST_P(FarAheadTest, AFailedForwardRoundMakesNoOtherOld) {
  JoinAll(2);
  CompleteForward(0);
  engine_.Contribute(workers_[1], Forward("bn", GetParam()), kNumbers);
  engine_.Advance(*engine_.View().config.round_timeout);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", GetParam()))), kRoundTimeout);
  CompleteForward(1);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", 1))), "");
  for (const StreamId worker : workers_) engine_.Contribute(worker, Backward("bn", 1), {0, {1.0, 1.0}, {1.0, 1.0}});
  EXPECT_EQ(engine_.Outcome(workers_[0], Backward("bn", 1))->count, 8);
  // The failure is still remembered.
  engine_.Contribute(workers_[0], Forward("bn", GetParam()), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("bn", GetParam()))), kRoundTimeout);
  EXPECT_THAT(engine_.View().pending, IsEmpty());
}

TEST_P(FarAheadTest, NorDoesAFailedSum) {
  JoinAll(2);
  for (const StreamId worker : workers_) engine_.Declare(worker, {testing::SumLayer("s", 1)});
  const testing::Numbers value{0, {1.0}, {}};
  engine_.Contribute(workers_[1], testing::Sum("s", GetParam()), value);
  engine_.Advance(*engine_.View().config.round_timeout);
  for (const StreamId worker : workers_) engine_.Contribute(worker, testing::Sum("s", 0), value);
  EXPECT_EQ(engine_.Outcome(workers_[0], testing::Sum("s", 0))->first, std::vector<double>(1, 2.0));
}

TEST_P(FarAheadTest, ABackwardRoundNeedsItsForwardRoundThere) {
  JoinAll(2);
  CompleteForward(0);
  engine_.Contribute(workers_[1], Backward("bn", GetParam()), {0, {1.0, 1.0}, {1.0, 1.0}});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Backward("bn", GetParam()))), kForwardRoundUnknown);
  for (const StreamId worker : workers_) engine_.Contribute(worker, Backward("bn", 0), {0, {1.0, 1.0}, {1.0, 1.0}});
  EXPECT_EQ(engine_.Outcome(workers_[0], Backward("bn", 0))->count, 8);
}

// Under a policy that lets one worker complete a round alone.
TEST_P(FarAheadTest, NorDoesOneThatAProceedingGroupCompletesWithItsSenderAlone) {
  GroupConfig config;
  config.missing_policy = MissingPolicy::kProceed;
  config.min_workers = 1;
  for (Rank rank = 0; rank < 2; ++rank) {
    Join join = testing::MakeJoin(rank, 2);
    join.config = config;
    workers_.push_back(engine_.Join(join));
    engine_.Declare(workers_.back(), {BatchNormLayer("bn", 2)});
  }
  engine_.Contribute(workers_[1], Forward("bn", GetParam()), kNumbers);
  engine_.Advance(*engine_.View().config.round_timeout);
  EXPECT_EQ(engine_.Outcome(workers_[1], Forward("bn", GetParam()))->count, 4);
  CompleteForward(0);
  EXPECT_EQ(engine_.Outcome(workers_[0], Forward("bn", 0))->count, 8);
}

INSTANTIATE_TEST_SUITE_P(All, FarAheadTest, ::testing::Values(1000, 1000000, uint64_t{1} << 63, UINT64_MAX),
                         [](const auto& info) { return std::to_string(info.param); });

TEST_F(ReplayTest, ManyFailuresAreForgottenOldestFirst) {
  Limits limits;
  JoinAll(2);
  const Numbers bad{4, {std::nan(""), 1.0}, {1.0, 1.0}};
  for (uint64_t i = 0; i <= limits.retained_failures; ++i) {
    engine_.Contribute(workers_[0], Forward("bn", 1'000'000 - i), bad);
  }
  engine_.Contribute(workers_[1], Forward("bn", 1'000'000), kNumbers);
  EXPECT_THAT(engine_.Outcomes(workers_[1], Forward("bn", 1'000'000)), IsEmpty()) << "it begins anew";
  engine_.Contribute(workers_[1], Forward("bn", 999'999), kNumbers);
  EXPECT_EQ(engine_.Outcomes(workers_[1], Forward("bn", 999'999)).size(), 1u);
}

class SmallMemoryTest : public ReplayTest {
 protected:
  // The vectors of a round of two channels take 32 bytes, and the record of its two contributors some more.
  static Limits FewBytes() {
    Limits limits;
    limits.max_retained_bytes = 250;
    return limits;
  }
  SmallMemoryTest() : ReplayTest(FewBytes()) {}
};

TEST_F(SmallMemoryTest, ResultsAreForgottenOldestFirstButNotWhoContributed) {
  JoinAll(2);
  for (uint64_t sequence = 0; sequence < 10; ++sequence) CompleteForward(sequence);
  const StreamId again = engine_.Reconnect(workers_[0]);
  engine_.Contribute(again, Forward("bn", 0), kNumbers);
  const auto expired = engine_.Outcome(again, Forward("bn", 0));
  EXPECT_EQ(ReasonOf(*expired), kRoundExpired);
  EXPECT_THAT(expired->error->message, HasSubstr("max_retained_bytes = 250"));
  engine_.Contribute(again, Forward("bn", 9), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(again, Forward("bn", 9))), "");
  // The forward round's contributors and count are still known, so its backward round can begin.
  engine_.Contribute(again, Backward("bn", 0), {0, {1.0, 1.0}, {1.0, 1.0}});
  engine_.Contribute(workers_[1], Backward("bn", 0), {0, {1.0, 1.0}, {1.0, 1.0}});
  EXPECT_EQ(engine_.Outcome(again, Backward("bn", 0))->count, 8);
  // Changed numbers are still distinguished from the same ones.
  engine_.Contribute(workers_[1], Forward("bn", 0), kOthers);
  EXPECT_EQ(ReasonOf(*engine_.log(workers_[1]).outcomes.back()), kPayloadChanged);
}

TEST_F(SmallMemoryTest, ErrorsCountTowardsIt) {
  JoinAll(2);
  const Numbers bad{4, {std::nan(""), 1.0}, {1.0, 1.0}};
  for (uint64_t sequence = 0; sequence < 10; ++sequence) engine_.Contribute(workers_[0], Forward("bn", sequence), bad);
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", 0))), kRoundExpired);
  engine_.Contribute(workers_[1], Forward("bn", 9), kNumbers);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", 9))), kNotFinite);
}

TEST_F(SmallMemoryTest, TheNewestFourAreKeptWhateverTheirSize) {
  workers_.push_back(engine_.Join(0, 1, {BatchNormLayer("wide", 100)}));
  const Numbers wide{1, std::vector<double>(100, 1.0), std::vector<double>(100, 0.0)};
  for (uint64_t sequence = 0; sequence < 5; ++sequence) {
    engine_.Contribute(workers_[0], Forward("wide", sequence), wide);
  }
  for (uint64_t sequence = 0; sequence < 5; ++sequence) {
    engine_.Contribute(workers_[0], Forward("wide", sequence), wide);
    EXPECT_EQ(ReasonOf(*engine_.log(workers_[0]).outcomes.back()), sequence == 0 ? kRoundExpired : "") << sequence;
  }
}

TEST_F(ReplayTest, InFlightOtherNumbersAreRefusedBeforeTheyAreChecked) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  engine_.Contribute(workers_[0], Forward("bn", 0), {4, {NAN, 1.0}, {1.0, 1.0}});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("bn", 0))), kPayloadChanged);
  engine_.Contribute(workers_[1], Forward("bn", 0), kNumbers);
  EXPECT_EQ(engine_.Outcome(workers_[1], Forward("bn", 0))->first, kNumbers.first);
}

// The second incarnation has contributed too, though with the numbers of the first. Workers that wait for it must learn
// that it is gone.
TEST_F(ReplayTest, ARestartedWorkerThatResendsHasContributed) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("bn", 0), kNumbers);
  const StreamId second = Restart(0);
  engine_.Contribute(second, Forward("bn", 0), kNumbers);
  engine_.Contribute(workers_[1], Forward("bn", 1), kNumbers);
  Restart(0);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("bn", 1))), kWorkerLost);
}

}  // namespace
}  // namespace syncbn::core
