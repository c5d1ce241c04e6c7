// A master that has lost its memory: its workers report the rounds that have ended, and repeat what they had sent.

#include <cstdint>
#include <limits>
#include <memory>
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

using testing::Backward;
using ::testing::ElementsAre;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Numbers;
using testing::ReasonOf;
using testing::Sum;

constexpr uint64_t kRun = 77;
constexpr uint64_t kIncarnation = 5;

// A group of three that an earlier master has lost. Rank r contributes `Of(r)`.
class RestoredTest : public ::testing::Test {
 protected:
  static Numbers Of(Rank rank) { return {2 + rank, {0.1 + rank}, {0.7 * (rank + 1)}}; }

  // Returns the outcome that an earlier master told of a round to which `ranks` had contributed.
  static std::shared_ptr<const RoundOutcome> Told(const RoundKey& key, const std::vector<Rank>& ranks) {
    testing::Engine earlier;
    std::vector<StreamId> workers;
    for (Rank rank = 0; rank < 3; ++rank) workers.push_back(Enter(earlier, rank, 0, 0));
    for (Rank rank = 0; rank < 3; ++rank) {
      if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) earlier.Leave(workers[rank]);
    }
    for (const Rank rank : ranks) {
      if (key.phase == Phase::kBackward) earlier.Contribute(workers[rank], Forward(key.layer, key.sequence), Of(rank));
    }
    for (const Rank rank : ranks) {
      Numbers numbers = Of(rank);
      if (key.phase == Phase::kSum) numbers.second.clear();
      earlier.Contribute(workers[rank], key, numbers);
    }
    return earlier.Outcome(workers[ranks.front()], key);
  }

  static EndedReport ReportOf(const RoundOutcome& told) {
    EndedReport report;
    report.key = told.key;
    report.error = told.error;
    report.missing_ranks = told.missing_ranks;
    report.digest = told.digest;
    report.count = told.key.phase == Phase::kForward ? told.count : 0;
    report.backward_required = told.backward_required;
    report.abstaining_ranks = told.abstaining_ranks;
    return report;
  }

  static StreamId Enter(testing::Engine& engine, Rank rank, uint64_t run, uint64_t incarnation,
                        std::vector<Rank> left = {}) {
    core::Join join = testing::MakeJoin(rank, 3);
    join.run_id = run;
    join.incarnation = incarnation;
    join.left_ranks = std::move(left);
    join.config = config_;
    const StreamId stream = engine.Join(join);
    engine.Declare(stream, {testing::BatchNormLayer("a", 1), testing::SumLayer("s", 1)});
    return stream;
  }

  StreamId Return(Rank rank, std::vector<Rank> left = {}) {
    return Enter(engine_, rank, kRun, kIncarnation, std::move(left));
  }

  // A worker's stream that breaks behind its join.
  void JoinAndDie(Rank rank) {
    core::Join join = testing::MakeJoin(rank, 3);
    join.run_id = kRun;
    join.incarnation = kIncarnation;
    engine_.Close(engine_.Join(join));
  }

  // Has a worker send what it holds: rounds that it was told the end of, and one that it was not.
  void Send(StreamId stream, const std::vector<std::shared_ptr<const RoundOutcome>>& told, Rank rank,
            const std::vector<RoundKey>& asked = {}, bool repeats = true, std::vector<Rank> left = {}) {
    FrameReceived frame;
    frame.stream = stream;
    frame.left_ranks = std::move(left);
    const Numbers numbers = Of(rank);
    const auto contribution = [&numbers](const RoundKey& key, bool repeat) {
      return Contribution{key,
                          key.phase == Phase::kForward ? numbers.count : 0,
                          numbers.role,
                          numbers.first,
                          key.phase == Phase::kSum ? absl::Span<const double>() : numbers.second,
                          repeat};
    };
    for (const auto& outcome : told) {
      frame.ended.push_back(ReportOf(*outcome));
      if (repeats && !outcome->error.has_value()) frame.contributions.push_back(contribution(outcome->key, true));
    }
    for (const RoundKey& key : asked) frame.contributions.push_back(contribution(key, false));
    frame.caught_up = true;
    frame.blocked_on = asked;
    engine_.On(frame);
  }

  // Has a worker tell the end of a round, before it has sent all. It says nothing of what it has forgotten: that comes
  // last, and the stream may break before.
  void Report(StreamId stream, const RoundOutcome& told) {
    FrameReceived frame;
    frame.stream = stream;
    frame.ended = {ReportOf(told)};
    engine_.On(frame);
  }

  // Has a worker say that it has sent all, and forgotten these rounds and those before.
  void Forget(StreamId stream, std::vector<RoundKey> keys) {
    FrameReceived frame;
    frame.stream = stream;
    frame.caught_up = true;
    frame.forgotten = std::move(keys);
    engine_.On(frame);
  }

  static inline GroupConfig config_;
  testing::Engine engine_;
};

// Two that have taken the places of others disagree, and the master takes that for a dispute until one comes that knows
// more.
TEST_F(RestoredTest, ADisputeOfSuccessorsEndsWhereTheirPredecessorsHadAgreed) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  for (const Rank rank : {1, 2}) {
    engine_.Declare(engine_.Join(testing::MakeJoin(rank, 3)), {testing::BatchNormLayer("a", 1 + rank)});
  }
  EXPECT_TRUE(engine_.Layer("a").summary.conflict.has_value());
  const StreamId survivor = Return(0);
  Send(survivor, {told}, 0, {Backward("a", 4)});
  EXPECT_FALSE(engine_.Layer("a").summary.conflict.has_value());
  EXPECT_THAT(engine_.Outcomes(survivor, Backward("a", 4)), IsEmpty()) << "the others may come to it";
}

TEST_F(RestoredTest, WhoMissedAnOutcomeGetsTheSameBits) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(third, {}, 2, {Forward("a", 4)});
  Send(first, {told}, 0);
  EXPECT_THAT(engine_.Outcomes(third, Forward("a", 4)), IsEmpty());
  Send(second, {told}, 1);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(third, Forward("a", 4)), *told));
  EXPECT_THAT(engine_.Outcomes(first, Forward("a", 4)), IsEmpty()) << "it has the outcome";
  EXPECT_EQ(engine_.Layer("a").running.updates, 1u);
}

TEST_F(RestoredTest, WhatNobodyWaitsForIsSilentAndFreed) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {told}, 0);
  EXPECT_EQ(engine_.View().summary.rounds_in_flight, 0u);
  EXPECT_THAT(engine_.View().pending, IsEmpty());
  Send(second, {told}, 1);
  Send(third, {told}, 2);
  for (const StreamId worker : {first, second, third}) {
    EXPECT_THAT(engine_.log(worker).outcomes, IsEmpty());
    EXPECT_THAT(engine_.log(worker).late_rounds, IsEmpty());
  }
  engine_.Advance(absl::Minutes(20));
  EXPECT_FALSE(engine_.log(first).closed);
}

TEST_F(RestoredTest, NobodyIsBlockedOnARoundThatItOnlyRepeats) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1);
  Send(first, {told}, 0);
  FrameReceived frame;
  frame.stream = first;
  frame.blocked_on = {Forward("a", 4)};
  engine_.On(frame);
  EXPECT_THAT(engine_.View().members[0].blocked_on, IsEmpty());
  Send(second, {told}, 1);
  Send(Return(2), {told}, 2);  // All have caught up, so that the round is dropped.
  EXPECT_THAT(engine_.log(first).outcomes, IsEmpty());
}

TEST_F(RestoredTest, ARosterStaysAsItWas) {
  // Rank 2 had left before; its late contribution does not count now either.
  const auto told = Told(Forward("a", 4), {0, 1});
  ASSERT_THAT(told->missing_ranks, ElementsAre(2));
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(third, {}, 2, {Forward("a", 4)});
  Send(second, {}, 1, {Forward("a", 4)});
  Send(first, {told}, 0);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(second, Forward("a", 4)), *told));
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(third, Forward("a", 4)), *told));
}

TEST_F(RestoredTest, ABackwardRoundFollowsAForwardRoundOfBefore) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const auto backward = Told(Backward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {forward, backward}, 0);
  Send(second, {forward, backward}, 1);
  Send(third, {forward}, 2, {Backward("a", 4)});
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(third, Backward("a", 4)), *backward));
}

TEST_F(RestoredTest, ABackwardRoundNeedsNobodysForwardNumbers) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {forward}, 0, {Backward("a", 4)}, /*repeats=*/false);
  Send(second, {forward}, 1, {Backward("a", 4)}, /*repeats=*/false);
  Send(third, {forward}, 2, {Backward("a", 4)}, /*repeats=*/false);
  EXPECT_EQ(engine_.Outcome(third, Backward("a", 4))->count, forward->count);
}

TEST_F(RestoredTest, AFailureIsTheSameForThoseWhoMissedIt) {
  auto failed = std::make_shared<RoundOutcome>();
  failed->key = Sum("s", 1);
  failed->error = MakeError(absl::StatusCode::kUnavailable, kWorkerLost, "rank 1 was lost", {1});
  const StreamId first = Return(0), third = Return(2);
  Send(third, {}, 2, {Sum("s", 1)});
  Send(first, {failed}, 0);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Sum("s", 1))), kWorkerLost);
  EXPECT_THAT(engine_.Outcome(third, Sum("s", 1))->error->ranks, ElementsAre(1));
  const StreamId second = Return(1);
  Send(second, {}, 1, {Sum("s", 1)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(second, Sum("s", 1))), kWorkerLost);
}

TEST_F(RestoredTest, AFailedBackwardRoundIsToldThoughItsForwardRoundIsForgotten) {
  auto failed = std::make_shared<RoundOutcome>();
  failed->key = Backward("a", 4);
  failed->error = MakeError(absl::StatusCode::kUnavailable, kWorkerLost, "rank 1 was lost", {1});
  const StreamId first = Return(0), third = Return(2);
  Send(third, {}, 2, {Forward("a", 4)});
  FrameReceived frame;
  frame.stream = first;
  frame.ended = {ReportOf(*failed)};
  frame.caught_up = true;
  frame.forgotten = {Forward("a", 7)};
  engine_.On(frame);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Forward("a", 4))), kOutcomeLost);
  engine_.Contribute(third, Backward("a", 4), {0, {1.0}, {1.0}});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), kWorkerLost);
}

TEST_F(RestoredTest, WhatIsMissingIsNamed) {
  // Rank 1 has restarted, and holds nothing of what its predecessor had sent.
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), third = Return(2);
  Send(third, {}, 2, {Forward("a", 4)});
  Send(first, {told}, 0);
  EXPECT_THAT(engine_.Outcomes(third, Forward("a", 4)), IsEmpty()) << "rank 1 may come back";
  Enter(engine_, 1, 0, 0);
  const auto outcome = engine_.Outcome(third, Forward("a", 4));
  EXPECT_EQ(ReasonOf(*outcome), kOutcomeLost);
  EXPECT_TRUE(outcome->refused);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(1));
  EXPECT_THAT(outcome->error->message, HasSubstr("forward round 4 of layer \"a\""));
  // All are blocked now, on different rounds: no deadlock is found among what straddles the restart.
  EXPECT_THAT(engine_.Outcomes(first, Forward("a", 4)), IsEmpty());
}

TEST_F(RestoredTest, ASuccessorMayGiveTheNumbersOfItsPredecessor) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), reborn = Enter(engine_, 1, 0, 0), third = Return(2);
  Send(first, {told}, 0);
  engine_.Contribute(reborn, Forward("a", 4), Of(1));
  Send(third, {told}, 2);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(reborn, Forward("a", 4)), *told));
}

TEST_F(RestoredTest, OtherNumbersThanBeforeAreFound) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), reborn = Enter(engine_, 1, 0, 0), third = Return(2);
  Send(first, {told}, 0);
  engine_.Contribute(reborn, Forward("a", 4), Of(2));
  Send(third, {told}, 2);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(reborn, Forward("a", 4))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(reborn, Forward("a", 4))->error->message, HasSubstr("another result"));
}

TEST_F(RestoredTest, ADeadlockIsFoundOnceAllHaveCaughtUp) {
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {}, 0, {Sum("s", 0)});
  Send(second, {}, 1, {Sum("s", 1)});
  engine_.ContributeAndBlock(third, Sum("s", 2), {0, {1.0}, {}});
  EXPECT_THAT(engine_.ended(), IsEmpty()) << "rank 2 has not sent all";
  Send(third, {}, 2, {Sum("s", 3)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(first, Sum("s", 0))), kDeadlock);
}

TEST_F(RestoredTest, WhatAMemberHasForgottenIsNotWaitedFor) {
  const StreamId first = Return(0), second = Return(1);
  Send(second, {}, 1, {Sum("s", 3)});
  Forget(first, {Sum("s", 9)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(second, Sum("s", 3))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(second, Sum("s", 3))->error->ranks, ElementsAre(0));
  const StreamId third = Return(2);
  Send(third, {}, 2, {Sum("s", 5)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Sum("s", 5))), kOutcomeLost);
}

TEST_F(RestoredTest, ForgottenBackwardRoundsAreNotWaitedFor) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(third, {forward}, 2, {Backward("a", 4)});
  Send(second, {forward}, 1);
  EXPECT_THAT(engine_.Outcomes(third, Backward("a", 4)), IsEmpty());
  Forget(first, {Forward("a", 6), Backward("a", 5)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(third, Backward("a", 4))->error->ranks, ElementsAre(0));
}

TEST_F(RestoredTest, ABackwardRoundThatBeginsLaterMayBeForgottenToo) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1);
  Forget(first, {Forward("a", 6), Backward("a", 5)});
  Send(second, {forward}, 1);
  engine_.Leave(first);
  engine_.Leave(second);
  const StreamId third = Return(2);
  Send(third, {forward}, 2, {Backward("a", 4)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(third, Backward("a", 4))->error->ranks, ElementsAre(0));
}

TEST_F(RestoredTest, WhoHoldsAForwardRoundHasNotForgottenItsBackwardRound) {
  // Backward rounds run in the reverse order: the greater ones have ended, and were forgotten.
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {forward}, 0);
  Send(third, {forward}, 2, {Backward("a", 4)});
  Report(second, *forward);
  Forget(second, {Forward("a", 9), Backward("a", 9)});
  EXPECT_THAT(engine_.Outcomes(third, Backward("a", 4)), IsEmpty());
  engine_.Contribute(first, Backward("a", 4), Of(0));
  engine_.Contribute(second, Backward("a", 4), Of(1));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), "");
}

TEST_F(RestoredTest, ABackwardRoundThatWasReportedBeforeItsForwardRoundHasEnded) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const auto backward = Told(Backward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(first, {backward}, 0);  // It holds nothing of the forward round any more.
  Send(second, {backward}, 1);
  engine_.Leave(first);
  engine_.Leave(second);
  Send(third, {forward}, 2, {Backward("a", 4)});
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), kOutcomeLost) << "it has ended with their numbers";
}

TEST_F(RestoredTest, AReportOfALaterBackwardRoundEndsTheWaitForEarlierOnes) {
  const auto forward = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1), third = Return(2);
  Send(third, {forward}, 2, {Backward("a", 4)});
  Send(second, {forward}, 1);
  EXPECT_THAT(engine_.Outcomes(third, Backward("a", 4)), IsEmpty());
  Report(first, *Told(Backward("a", 5), {0, 1, 2}));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(third, Backward("a", 4))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(third, Backward("a", 4))->error->ranks, ElementsAre(0));
}

TEST_F(RestoredTest, BadNumbersAreNotThoseThatARoundCompletedWith) {
  const auto told = Told(Forward("a", 4), {0, 1, 2});
  const StreamId first = Return(0), reborn = Enter(engine_, 1, 0, 0), third = Return(2);
  Send(first, {told}, 0);
  Numbers bad = Of(1);
  bad.first[0] = std::numeric_limits<double>::quiet_NaN();
  engine_.Contribute(reborn, Forward("a", 4), bad);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(reborn, Forward("a", 4))), kPayloadChanged);
  engine_.Contribute(reborn, Forward("a", 4), Of(1));
  Send(third, {told}, 2);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcomes(reborn, Forward("a", 4)).back(), *told));
}

TEST_F(RestoredTest, NumbersThatOverflowAreNotThoseThatARoundCompletedWith) {
  const Numbers large{int64_t{1} << 39, {3e150}, {0.0}};
  const Numbers other{int64_t{1} << 39, {-3e150}, {0.0}};
  const StreamId first = Return(0), reborn = Enter(engine_, 1, 0, 0);
  FrameReceived frame;
  frame.stream = first;
  frame.ended.emplace_back();
  frame.ended[0].key = Forward("a", 4);
  frame.ended[0].missing_ranks = {2};
  frame.ended[0].count = 2 * large.count;
  frame.contributions = {{Forward("a", 4), large.count, large.role, large.first, large.second, /*repeats=*/true}};
  engine_.On(frame);
  engine_.Contribute(reborn, Forward("a", 4), other);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(reborn, Forward("a", 4))), kOutcomeLost);
  EXPECT_THAT(engine_.Outcome(reborn, Forward("a", 4))->error->message, HasSubstr("another result"));
}

TEST_F(RestoredTest, ARoundThatOneHadLeftBeforeCompletes) {
  const StreamId first = Return(0, {2}), second = Return(1, {2});
  Send(first, {}, 0, {Sum("s", 4)}, /*repeats=*/true, /*left=*/{2});
  EXPECT_THAT(engine_.Outcomes(first, Sum("s", 4)), IsEmpty());
  Send(second, {}, 1, {Sum("s", 4)});
  const auto outcome = engine_.Outcome(second, Sum("s", 4));
  EXPECT_EQ(ReasonOf(*outcome), "");
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(2));
}

TEST_F(RestoredTest, AMemberThatKnowsAnotherOutcomeIsDismissed) {
  config_.missing_policy = MissingPolicy::kProceed;
  config_.min_workers = 2;
  const auto told = Told(Sum("s", 4), {0, 1, 2});
  const StreamId first = Return(0), second = Return(1);
  Send(first, {}, 0, {Sum("s", 4)});
  Send(second, {}, 1, {Sum("s", 4)});
  engine_.Advance(absl::Minutes(10));  // The others go on without rank 2.
  ASSERT_EQ(ReasonOf(*engine_.Outcome(first, Sum("s", 4))), "");
  const StreamId third = Return(2);
  Send(third, {told}, 2);
  config_ = GroupConfig();
  EXPECT_EQ(engine_.log(third).close_reason(), kOutcomeChanged);
}

TEST_F(RestoredTest, WhoHasLeftIsKnownFromOthers) {
  const StreamId first = Return(0, {2}), second = Return(1, {2});
  Send(first, {}, 0, {Sum("s", 4)});
  Send(second, {}, 1, {Sum("s", 4)});
  // It may have ended under the earlier master, with numbers of rank 2, which may come back if nobody has acknowledged
  // its leave.
  engine_.Advance(absl::Milliseconds(1999));
  EXPECT_THAT(engine_.ended(), IsEmpty());
  engine_.Advance(absl::Milliseconds(1));
  const auto before = engine_.Outcome(second, Sum("s", 4));
  ASSERT_EQ(ReasonOf(*before), kOutcomeLost);
  EXPECT_THAT(before->error->ranks, ElementsAre(2));
  Send(first, {}, 0, {Sum("s", 5)});
  Send(second, {}, 1, {Sum("s", 5)});
  const auto outcome = engine_.Outcome(second, Sum("s", 5));
  EXPECT_EQ(ReasonOf(*outcome), "");
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(2));
  EXPECT_THAT(engine_.log(second).joined->membership.left_ranks, ElementsAre(2));
  const StreamId back = Return(2);  // A successor that the others had not heard of.
  EXPECT_FALSE(engine_.log(back).closed);
}

// It was told an outcome, and left; then the master died, before the others were told.
TEST_F(RestoredTest, ALeaverThatWasNotAcknowledgedBringsItsPart) {
  const auto told = Told(Sum("s", 4), {0, 1, 2});
  const StreamId first = Return(0, {2}), second = Return(1, {2});
  Send(first, {}, 0, {Sum("s", 4)});
  Send(second, {}, 1, {Sum("s", 4)});
  EXPECT_THAT(engine_.ended(), IsEmpty());
  const StreamId leaver = Return(2);
  Send(leaver, {told}, 2);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(first, Sum("s", 4)), *told));
  engine_.Leave(leaver);
  EXPECT_TRUE(engine_.log(leaver).closed) << "these workers do not say what they have read";
}

// Its stream breaks before it has repeated anything, and it comes again within the 2 s.
TEST_F(RestoredTest, ALeaverWhoseStreamBreaksMayStillBringItsPart) {
  const auto told = Told(Sum("s", 4), {0, 1, 2});
  const StreamId first = Return(0, {2}), second = Return(1, {2});
  Send(first, {}, 0, {Sum("s", 4)});
  Send(second, {}, 1, {Sum("s", 4)});
  JoinAndDie(2);
  EXPECT_THAT(engine_.ended(), IsEmpty());
  EXPECT_EQ(engine_.View().left, 1u);
  const StreamId leaver = Return(2);
  Send(leaver, {told}, 2);
  EXPECT_TRUE(testing::SameOutcome(*engine_.Outcome(first, Sum("s", 4)), *told));
}

TEST_F(RestoredTest, ALeaverThatDiesBehindItsJoinIsNotWaitedForAnyLonger) {
  const StreamId first = Return(0, {2}), second = Return(1, {2});
  Send(first, {}, 0, {Sum("s", 4)});
  Send(second, {}, 1, {Sum("s", 4)});
  JoinAndDie(2);
  engine_.Advance(absl::Milliseconds(1999));
  EXPECT_THAT(engine_.ended(), IsEmpty());
  engine_.Advance(absl::Milliseconds(1));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(second, Sum("s", 4))), kOutcomeLost);
}

// Its successor has nothing of what it had contributed, and says so by coming back: its stream broke behind its join.
TEST_F(RestoredTest, ALeaverWhoseSuccessorComesBackIsNotWaitedFor) {
  const auto told = Told(Sum("s", 4), {0, 1, 2});
  const StreamId first = Return(0, {2});
  core::Join join = testing::MakeJoin(2, 3);
  const StreamId successor = engine_.Join(join);
  join.run_id = kRun;
  join.incarnation = engine_.log(successor).joined->incarnation;
  engine_.Close(successor);
  Send(first, {told}, 0);
  const StreamId second = Return(1, {2});
  Send(second, {}, 1, {Sum("s", 4)});
  EXPECT_THAT(engine_.log(second).outcomes, IsEmpty()) << "a leaver may come back";
  engine_.Join(join);
  const auto outcome = engine_.Outcome(second, Sum("s", 4));
  ASSERT_EQ(ReasonOf(*outcome), kOutcomeLost);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(2));
}

TEST_F(RestoredTest, ANewRunGivesWayToOneInWhichRoundsHaveEnded) {
  const StreamId reborn = Enter(engine_, 1, 0, 0);
  ASSERT_NE(engine_.log(reborn).joined->run_id, kRun);
  const StreamId first = Return(0);
  EXPECT_FALSE(engine_.log(first).closed);
  EXPECT_EQ(engine_.log(reborn).joined->run_id, kRun) << "it is told so";
  Return(2);
  EXPECT_EQ(engine_.View().summary.present, 3u);
  core::Join stranger = testing::MakeJoin(2, 3);
  stranger.run_id = kRun + 1;
  stranger.incarnation = 1;
  EXPECT_EQ(engine_.log(engine_.Join(stranger)).close_reason(), kRunSuperseded);
}

TEST_F(RestoredTest, AWorkerWithoutAnOutcomeBelongsToAnyRun) {
  Return(0);
  core::Join join = testing::MakeJoin(1, 3);
  join.run_id = kRun + 1;
  join.incarnation = 1;
  join.without_outcome = true;
  const StreamId second = engine_.Join(join);
  EXPECT_FALSE(engine_.log(second).closed);
  EXPECT_EQ(engine_.log(second).joined->run_id, kRun);
}

TEST_F(RestoredTest, IncarnationsGrowThoughTheClockIsBehind) {
  const uint64_t later = static_cast<uint64_t>(absl::ToUnixMicros(engine_.now())) + 1'000'000'000;
  Enter(engine_, 0, kRun, later);
  const StreamId reborn = Enter(engine_, 1, 0, 0);
  EXPECT_GT(engine_.log(reborn).joined->incarnation, later);
}

TEST(MemoryTest, EachGroupOfEachProcessHasAnotherName) {
  const auto memory_of = [](uint64_t instance, const char* group) {
    Coordinator coordinator(Limits(), instance);
    FrameReceived frame;
    frame.stream = 1;
    frame.join = testing::MakeJoin(0, 1);
    frame.join->id.group = group;
    for (const Effect& effect : coordinator.On(frame, absl::FromUnixSeconds(1))) {
      if (const auto* joined = std::get_if<SendJoined>(&effect)) return joined->memory;
    }
    return uint64_t{0};
  };
  EXPECT_NE(memory_of(1, "g"), memory_of(2, "g"));
  EXPECT_NE(memory_of(1, "g"), 0u);
  EXPECT_EQ(memory_of(0, "g"), 0u);
}

}  // namespace
}  // namespace syncbn::core
