// Running statistics after a restart of the master: rounds that ended under the earlier one.

#include "server/core/running_statistics.h"

#include <cstdint>
#include <memory>
#include <optional>

#include "gtest/gtest.h"
#include "server/core/state.h"

namespace syncbn::core {
namespace {

const DeclarationPtr kDeclaration = [] {
  Declaration declaration;
  declaration.spec.name = "a";
  declaration.spec.channels = 1;
  return std::make_shared<const Declaration>(declaration);
}();

void Observe(RunningStatistics* statistics, uint64_t sequence) {
  RoundOutcome outcome;
  outcome.key = {"a", sequence, Phase::kForward};
  outcome.count = 2;
  outcome.first = {1.0};
  outcome.second = {1.0};
  EXPECT_TRUE(statistics->Observe(kDeclaration, outcome));
}

std::optional<MissingRounds> MissingOf(const RunningStatistics& statistics) {
  return statistics.View(kDeclaration->spec).missing;
}

// After rounds 0 to 3 under an earlier master.
RunningStatistics Resumed() {
  RunningStatistics earlier;
  for (uint64_t sequence = 0; sequence <= 3; ++sequence) Observe(&earlier, sequence);
  RunningStatistics statistics;
  statistics.Resume(*earlier.State());
  return statistics;
}

TEST(RunningStatisticsTest, AnEndedRoundIsMissingUntilItIsObserved) {
  RunningStatistics statistics = Resumed();
  for (const uint64_t sequence : {3u, 4u, 5u}) statistics.Expect(sequence);
  EXPECT_EQ(MissingOf(statistics), (MissingRounds{3, 6}));
  Observe(&statistics, 3);
  Observe(&statistics, 4);
  EXPECT_EQ(MissingOf(statistics), (MissingRounds{4, 6}));
  EXPECT_EQ(statistics.State()->missing, (MissingRounds{4, 6}));
  Observe(&statistics, 5);
  EXPECT_FALSE(MissingOf(statistics).has_value());
  EXPECT_FALSE(statistics.State()->missing.has_value());
}

TEST(RunningStatisticsTest, ARoundThatWasCountedIsNotExpected) {
  RunningStatistics statistics = Resumed();
  statistics.Expect(2);
  EXPECT_FALSE(MissingOf(statistics).has_value());
}

TEST(RunningStatisticsTest, WhatIsExpectedWidensAGap) {
  RunningStatistics statistics = Resumed();
  Observe(&statistics, 9);
  EXPECT_EQ(MissingOf(statistics), (MissingRounds{3, 9}));
  statistics.Expect(20);
  EXPECT_EQ(MissingOf(statistics), (MissingRounds{3, 21}));

  RunningStatistics from_nothing;
  from_nothing.ResumeFromNothing();
  from_nothing.Expect(0);
  EXPECT_EQ(MissingOf(from_nothing), std::nullopt) << "before the first update there is nothing to show";
  Observe(&from_nothing, 1);
  EXPECT_EQ(MissingOf(from_nothing), (MissingRounds{std::nullopt, 1}));
}

}  // namespace
}  // namespace syncbn::core
