// The engine's records of its rounds and members, for inspection.

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/duration_histogram.h"
#include "server/core/error.h"
#include "server/core/flight_recorder.h"
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
using ::testing::Pair;
using ::testing::SizeIs;
using testing::Sum;
using testing::SumLayer;

const Numbers kOne{0, {1.0}, {}};

// Two members, and the sum "loss".
class RecordsTest : public ::testing::Test {
 protected:
  void Complete(uint64_t sequence, absl::Duration lateness) {
    engine_.Contribute(first_, Sum("loss", sequence), kOne);
    engine_.Advance(lateness);
    engine_.Contribute(second_, Sum("loss", sequence), kOne);
  }

  Engine engine_;
  const StreamId first_ = engine_.Join(0, 2, {SumLayer("loss", 1)});
  const StreamId second_ = engine_.Join(1, 2, {SumLayer("loss", 1)});
};

TEST(DurationHistogramTest, QuantilesLieWithinTheirBuckets) {
  DurationHistogram histogram;
  EXPECT_EQ(histogram.Quantile(0.5), absl::ZeroDuration());
  for (int i = 0; i < 99; ++i) histogram.Add(absl::Microseconds(200));
  histogram.Add(absl::Seconds(1));
  EXPECT_GT(histogram.Quantile(0.5), absl::Microseconds(100));
  EXPECT_LE(histogram.Quantile(0.5), absl::Microseconds(250));
  EXPECT_GT(histogram.Quantile(1.0), absl::Milliseconds(900));
  EXPECT_EQ(histogram.sum(), absl::Microseconds(99 * 200) + absl::Seconds(1));
  EXPECT_EQ(histogram.in_bucket(1), 99u);
  histogram.Add(absl::Hours(1));
  EXPECT_EQ(histogram.in_bucket(DurationHistogram::kBounds), 1u);
  EXPECT_EQ(histogram.Quantile(1.0), DurationHistogram::Bound(DurationHistogram::kBounds - 1));
}

TEST_F(RecordsTest, ARoundKeepsTheArrivalOfEachRank) {
  Complete(3, absl::Milliseconds(7));
  const GroupView view = engine_.View();
  ASSERT_THAT(view.recent, SizeIs(1));
  const RecordedRound& round = view.recent.front();
  EXPECT_EQ(round.key, Sum("loss", 3));
  EXPECT_STREQ(round.reason, "");
  EXPECT_EQ(round.duration, absl::Milliseconds(7));
  EXPECT_EQ(round.arrived, 2u);
  ASSERT_THAT(round.arrivals, SizeIs(2));  // The latest first.
  EXPECT_EQ(round.arrivals[0].rank, 1u);
  EXPECT_EQ(round.arrivals[0].after, absl::Milliseconds(7));
  EXPECT_EQ(round.arrivals[1].after, absl::ZeroDuration());
}

TEST_F(RecordsTest, LatenessShowsWhoMakesTheOthersWait) {
  for (uint64_t sequence = 0; sequence < 10; ++sequence) Complete(sequence, absl::Milliseconds(20));
  const GroupView view = engine_.View();
  EXPECT_EQ(view.members[0].lateness.sum(), absl::ZeroDuration());
  EXPECT_EQ(view.members[1].lateness.sum(), absl::Milliseconds(200));
  EXPECT_EQ(view.members[1].lateness.count(), 10u);
  EXPECT_EQ(view.members[1].last_contribution->key, Sum("loss", 9));
  const PhaseStatistics& sums = view.statistics.phases[static_cast<size_t>(Phase::kSum) - 1];
  EXPECT_EQ(sums.durations.count(), 10u);
  EXPECT_EQ(view.statistics.accepted, 20u);
}

TEST_F(RecordsTest, AFailureOutlastsTheRoundsThatFollow) {
  engine_.Contribute(first_, Sum("loss", 0), Numbers{0, {1.0, 2.0}, {}});  // Too long: the round fails.
  for (uint64_t sequence = 1; sequence <= FlightRecorder::kMostRounds + 5; ++sequence) {
    Complete(sequence, absl::Milliseconds(1));
  }
  const GroupView view = engine_.View();
  EXPECT_THAT(view.recent, SizeIs(FlightRecorder::kMostRounds));
  EXPECT_EQ(view.recent.front().key.sequence, FlightRecorder::kMostRounds + 5);
  EXPECT_EQ(view.recent.back().key.sequence, 6u);
  ASSERT_THAT(view.failures, SizeIs(1));
  EXPECT_EQ(view.failures.front().key, Sum("loss", 0));
  EXPECT_STREQ(view.failures.front().error->reason, kInvalidContribution);
}

TEST(FlightRecorderTest, ItsMemoryIsBoundedInALargeGroup) {
  EXPECT_EQ(FlightRecorder(2).capacity(), FlightRecorder::kMostRounds);
  EXPECT_GE(FlightRecorder(1 << 20).capacity(), 1u);
  EXPECT_LE(FlightRecorder(4096).capacity() * 4096 * sizeof(uint32_t), FlightRecorder::kMostBytes);
}

TEST_F(RecordsTest, ContributionsAreCountedByTheirResult) {
  engine_.Contribute(first_, Sum("loss", 0), kOne);
  engine_.Contribute(first_, Sum("loss", 0), kOne);                   // Repeated.
  engine_.Contribute(first_, Sum("loss", 0), Numbers{0, {2.0}, {}});  // Changed.
  engine_.Contribute(second_, Sum("loss", 0), kOne);                  // Ends the round.
  engine_.Contribute(second_, Sum("loss", 0), kOne);                  // Replayed.
  engine_.Contribute(second_, Sum("unknown", 0), kOne);
  const RoundStatistics statistics = engine_.View().statistics;
  EXPECT_EQ(statistics.accepted, 2u);
  EXPECT_EQ(statistics.repeated, 1u);
  EXPECT_EQ(statistics.replayed, 1u);
  std::vector<std::pair<std::string, uint64_t>> rejected;
  for (const auto& [reason, count] : statistics.rejected.counts()) rejected.emplace_back(reason, count);
  EXPECT_THAT(rejected, ElementsAre(Pair(kPayloadChanged, 1), Pair(::testing::_, 1)));
}

TEST_F(RecordsTest, AFailedRoundSaysWhatItsMissingRanksDidLast) {
  Complete(4, absl::ZeroDuration());
  engine_.Advance(absl::Seconds(2));
  engine_.Contribute(first_, Sum("loss", 5), kOne);
  engine_.Close(second_);
  engine_.Advance(absl::Seconds(1));
  const auto outcome = engine_.Outcome(first_, Sum("loss", 5));
  EXPECT_THAT(outcome->error->message, HasSubstr("rank 1 contributed last to the sum 4 of vector \"loss\", 2.05s"));
  EXPECT_STREQ(engine_.View().failures.front().reason, kWorkerLost);
}

TEST_F(RecordsTest, AMissingRankThatHasNeverContributedIsSaidToHaveNot) {
  engine_.Contribute(first_, Sum("loss", 0), kOne);
  engine_.Advance(absl::Minutes(11));
  const auto outcome = engine_.Outcome(first_, Sum("loss", 0));
  EXPECT_THAT(outcome->error->message, HasSubstr("rank 1 has contributed nothing yet"));
}

TEST_F(RecordsTest, MembersAreToldAsTheyComeAndGo) {
  engine_.Close(second_);
  const StreamId again = engine_.Reconnect(second_);
  engine_.Leave(again);
  const std::vector<MemberChanged>& changes = engine_.changes();
  ASSERT_THAT(changes, SizeIs(5));
  EXPECT_EQ(changes[1].state, MemberState::kPresent);
  EXPECT_EQ(changes[1].present, 2u);
  EXPECT_FALSE(changes[1].returned);
  EXPECT_EQ(changes[2].state, MemberState::kLost);
  EXPECT_EQ(changes[2].stream, second_);
  EXPECT_TRUE(changes[3].returned);
  EXPECT_EQ(changes[4].state, MemberState::kLeft);
  EXPECT_EQ(changes[4].stream, again);
  EXPECT_EQ(changes[4].rank, 1u);
  EXPECT_EQ(engine_.View().joins, 3u);
}

TEST_F(RecordsTest, ARefusedJoinIsTold) {
  engine_.Join(0, 3);
  ASSERT_THAT(engine_.refused(), SizeIs(1));
  EXPECT_EQ(engine_.refused()[0].rank, 0u);
  EXPECT_STREQ(engine_.refused()[0].error.reason, kGroupConfigMismatch);
  EXPECT_THAT(engine_.View().refused_joins.counts(), ElementsAre(Pair(::testing::StrEq(kGroupConfigMismatch), 1)));
}

TEST(ChannelSummaryTest, NamesConstantAndExplodingChannels) {
  Engine engine;
  const StreamId only = engine.Join(0, 1, {BatchNormLayer("bn", 4)});
  const auto summary = [&] { return engine.coordinator().ListLayers(Engine::group())->front().channels; };
  EXPECT_FALSE(summary().has_value());
  engine.Contribute(only, Forward("bn", 0), Numbers{4, {1.0, 7.0, 3e4, -2.0}, {4.0, 0.0, 4.0, 8.0}});
  ASSERT_TRUE(summary().has_value());
  EXPECT_THAT(summary()->constant_channels, ElementsAre(1));
  EXPECT_THAT(summary()->exploding_channels, ElementsAre(2));
  EXPECT_EQ(summary()->greatest_var, 2.0);
  EXPECT_EQ(summary()->greatest_mean, 3e4);
}

}  // namespace
}  // namespace syncbn::core
