#include "server/core/merge.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/error.h"
#include "tests/testing/moments_oracle.h"

namespace syncbn::core {
namespace {

using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

LayerSpec Spec(uint32_t channels) {
  LayerSpec spec;
  spec.name = "bn";
  spec.channels = channels;
  return spec;
}

RoundOutcome Merged(Phase phase, const Payloads& payloads, uint32_t channels) {
  RoundOutcome outcome;
  outcome.key = {"bn", 0, phase};
  if (phase == Phase::kForward) {
    MergeForward(payloads, channels, outcome);
  } else {
    MergeSums(payloads, channels, outcome);
  }
  return outcome;
}

Payload Moments(int64_t count, std::vector<double> mean, std::vector<double> m2) {
  Payload payload;
  payload.count = count;
  payload.first = std::move(mean);
  payload.second = std::move(m2);
  return payload;
}

// ---- Forward, against the values themselves -------------------------------------------------------------------------

struct Split {
  std::string name;
  std::vector<int> counts;  // By rank.
};

class MergeSplitTest : public ::testing::TestWithParam<std::tuple<Split, double>> {};

TEST_P(MergeSplitTest, AgreesWithTheWholeBatch) {
  const auto& [split, offset] = GetParam();
  constexpr uint32_t kChannels = 3;
  constexpr unsigned kSeed = 20240817;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  std::normal_distribution<double> normal(offset, 1.0);
  std::vector<std::vector<double>> all(kChannels);
  Payloads payloads;
  for (size_t rank = 0; rank < split.counts.size(); ++rank) {
    Payload payload;
    payload.count = split.counts[rank];
    for (uint32_t c = 0; c < kChannels; ++c) {
      std::vector<double> values(split.counts[rank]);
      for (double& value : values) value = normal(random) * (c + 1);
      all[c].insert(all[c].end(), values.begin(), values.end());
      const testing::ExactMoments exact = testing::MomentsOf(values);
      payload.first.push_back(static_cast<double>(exact.mean));
      payload.second.push_back(static_cast<double>(exact.m2));
    }
    payloads.emplace(static_cast<Rank>(rank), std::move(payload));
  }
  const RoundOutcome outcome = Merged(Phase::kForward, payloads, kChannels);
  for (uint32_t c = 0; c < kChannels; ++c) {
    const testing::ExactMoments exact = testing::MomentsOf(all[c]);
    ASSERT_EQ(outcome.count, exact.count);
    const long double var = exact.count == 0 ? 0.0L : exact.m2 / exact.count;
    EXPECT_NEAR(outcome.first[c], static_cast<double>(exact.mean), 1e-15 * (std::fabs(offset) + 1.0) * (c + 1));
    EXPECT_NEAR(outcome.second[c], static_cast<double>(var), 1e-11 * static_cast<double>(var)) << "channel " << c;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MergeSplitTest,
    ::testing::Combine(::testing::Values(Split{"Even", {64, 64, 64, 64}}, Split{"Uneven", {1, 500, 3, 60}},
                                         Split{"Empties", {0, 100, 0, 28}}, Split{"FirstOnly", {128, 0, 0, 0}},
                                         Split{"LastOnly", {0, 0, 0, 128}}, Split{"OneEach", {1, 1, 1, 1}},
                                         Split{"CountOne", {0, 1, 0, 0}}, Split{"AllEmpty", {0, 0, 0, 0}},
                                         Split{"One", {777}}),
                       ::testing::Values(0.0, 1.0, -1e2, 1e4)),
    [](const auto& info) {
      return std::get<0>(info.param).name + "Offset" +
             std::to_string(std::llabs(std::llround(std::get<1>(info.param))));
    });

TEST(MergeForwardTest, AllEmptyIsZeroThroughout) {
  const RoundOutcome outcome = Merged(Phase::kForward, {{0, Moments(0, {}, {})}, {1, Moments(0, {}, {})}}, 2);
  EXPECT_EQ(outcome.count, 0);
  EXPECT_EQ(outcome.first, std::vector<double>({0.0, 0.0}));
  EXPECT_EQ(outcome.second, std::vector<double>({0.0, 0.0}));
}

TEST(MergeForwardTest, CountOneHasVarianceZero) {
  const RoundOutcome outcome = Merged(Phase::kForward, {{0, Moments(0, {}, {})}, {3, Moments(1, {5.5}, {0.0})}}, 1);
  EXPECT_EQ(outcome.count, 1);
  EXPECT_EQ(outcome.first, std::vector<double>({5.5}));
  EXPECT_EQ(outcome.second, std::vector<double>({0.0}));
}

TEST(MergeForwardTest, EmptyBatchIsTheIdentityBitForBit) {
  const Payload part = Moments(7, {0.1}, {0.3});
  const RoundOutcome alone = Merged(Phase::kForward, {{1, part}}, 1);
  // The mean of an empty batch has no weight.
  const RoundOutcome with_empties =
      Merged(Phase::kForward, {{0, Moments(0, {}, {})}, {1, part}, {2, Moments(0, {1e9}, {1e9})}}, 1);
  EXPECT_EQ(alone.first, with_empties.first);
  EXPECT_EQ(alone.second, with_empties.second);
}

// Channels are computed several at a time, and the last ones singly. The bits must be the same.
TEST(MergeForwardTest, AChannelsBitsDependOnThatChannelAlone) {
  constexpr unsigned kSeed = 7;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  std::lognormal_distribution<double> value(0.0, 8.0);
  for (uint32_t channels = 1; channels <= 19; ++channels) {
    Payloads payloads;
    for (Rank rank = 0; rank < 5; ++rank) {
      std::vector<double> mean(channels), m2(channels);
      for (double& x : mean) x = value(random) - 1.0;
      for (double& x : m2) x = value(random);
      payloads.emplace(rank, Moments(1 + 3 * rank, std::move(mean), std::move(m2)));
    }
    const RoundOutcome whole = Merged(Phase::kForward, payloads, channels);
    for (uint32_t c = 0; c < channels; ++c) {
      Payloads one;
      for (const auto& [rank, payload] : payloads) {
        one.emplace(rank, Moments(payload.count, {payload.first[c]}, {payload.second[c]}));
      }
      const RoundOutcome alone = Merged(Phase::kForward, one, 1);
      EXPECT_EQ(whole.first[c], alone.first[0]) << "channel " << c << " of " << channels;
      EXPECT_EQ(whole.second[c], alone.second[0]) << "channel " << c << " of " << channels;
    }
  }
}

TEST(MergeForwardTest, BackwardIsRequiredIfAnyoneRequiresIt) {
  const auto required = [](BackwardRole a, BackwardRole b) {
    Payloads payloads = {{0, Moments(0, {}, {})}, {1, Moments(0, {}, {})}};
    payloads[0].backward_role = a;
    payloads[1].backward_role = b;
    return Merged(Phase::kForward, payloads, 1).backward_required;
  };
  EXPECT_TRUE(required(BackwardRole::kRequired, BackwardRole::kNone));
  EXPECT_TRUE(required(BackwardRole::kIfRequired, BackwardRole::kRequired));
  EXPECT_FALSE(required(BackwardRole::kIfRequired, BackwardRole::kIfRequired));
  EXPECT_FALSE(required(BackwardRole::kIfRequired, BackwardRole::kNone));
}

// ---- Sums -----------------------------------------------------------------------------------------------------------

TEST(MergeSumsTest, AddsInOrderOfRank) {
  // In this order the small term survives; in the other one it does not.
  const Payloads payloads = {
      {0, Moments(0, {1e16}, {1.0})}, {1, Moments(0, {-1e16}, {2.0})}, {2, Moments(0, {1.0}, {4.0})}};
  const RoundOutcome outcome = Merged(Phase::kBackward, payloads, 1);
  EXPECT_EQ(outcome.first, std::vector<double>({1.0}));
  EXPECT_EQ(outcome.second, std::vector<double>({7.0}));
}

TEST(MergeSumsTest, EmptyBatchAddsNothing) {
  const RoundOutcome outcome = Merged(Phase::kBackward, {{0, Moments(0, {}, {})}, {1, Moments(0, {3.0}, {4.0})}}, 1);
  EXPECT_EQ(outcome.first, std::vector<double>({3.0}));
  EXPECT_EQ(outcome.second, std::vector<double>({4.0}));
}

TEST(MergeSumsTest, VectorHasNoSecondPart) {
  const RoundOutcome outcome =
      Merged(Phase::kSum, {{0, Moments(0, {1.5, 2.0}, {})}, {1, Moments(0, {1.0, -2.0}, {})}}, 2);
  EXPECT_EQ(outcome.first, std::vector<double>({2.5, 0.0}));
  EXPECT_TRUE(outcome.second.empty());
}

// ---- Refusals -------------------------------------------------------------------------------------------------------

struct BadCase {
  std::string name;
  Phase phase;
  int64_t count;
  std::vector<double> first;
  std::vector<double> second;
  const char* reason;  // Empty if the contribution is acceptable.
  std::string named;   // Part of the message.
};

class CheckNumbersTest : public ::testing::TestWithParam<BadCase> {};

TEST_P(CheckNumbersTest, RefusesAndNames) {
  const BadCase& bad = GetParam();
  Contribution contribution;
  contribution.key = {"bn", 9, bad.phase};
  contribution.count = bad.count;
  contribution.first = bad.first;
  contribution.second = bad.second;
  const std::optional<Error> error = CheckNumbers(contribution, Spec(2), 5, Limits());
  EXPECT_STREQ(error.has_value() ? error->reason : "", bad.reason);
  if (!error.has_value()) return;
  EXPECT_EQ(error->code, absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(error->ranks, std::vector<Rank>({5}));
  EXPECT_THAT(error->message, HasSubstr("rank 5"));
  EXPECT_THAT(error->message, HasSubstr("\"bn\""));
  EXPECT_THAT(error->message, HasSubstr(bad.named));
}

INSTANTIATE_TEST_SUITE_P(
    All, CheckNumbersTest,
    ::testing::Values(
        BadCase{"Good", Phase::kForward, 4, {1, 2}, {3, 4}, "", ""},
        BadCase{"EmptyBatch", Phase::kForward, 0, {}, {}, "", ""},
        BadCase{"EmptyBatchWithVectors", Phase::kForward, 0, {0, 0}, {0, 0}, "", ""},
        BadCase{"EmptyBackward", Phase::kBackward, 0, {}, {}, "", ""},
        BadCase{"GreatestMagnitudes", Phase::kForward, 4, {0x1p500, -0x1p500}, {0x1p1000, 0}, "", ""},
        BadCase{"ShortMean", Phase::kForward, 4, {1}, {3, 4}, kInvalidContribution, "1 elements of mean"},
        BadCase{"LongMean", Phase::kForward, 4, {1, 2, 3}, {3, 4}, kInvalidContribution, "3 elements of mean"},
        BadCase{"NoMean", Phase::kForward, 4, {}, {}, kInvalidContribution, "0 elements of mean"},
        BadCase{"ShortM2", Phase::kForward, 4, {1, 2}, {3}, kInvalidContribution, "1 elements of m2"},
        BadCase{"NoVector", Phase::kSum, 0, {}, {}, kInvalidContribution, "0 elements of value"},
        BadCase{"ShortSum", Phase::kBackward, 0, {1}, {1, 2}, kInvalidContribution, "sum_dy"},
        BadCase{"HalfASum", Phase::kBackward, 0, {}, {1, 2}, kInvalidContribution, "0 elements of sum_dy and 2"},
        BadCase{"OtherHalfOfASum", Phase::kBackward, 0, {1, 2}, {}, kInvalidContribution, "sum_dy and 0 of sum_dy_xmu"},
        BadCase{"NegativeCount", Phase::kForward, -1, {1, 2}, {3, 4}, kInvalidContribution, "count = -1"},
        BadCase{"GreatestCount", Phase::kForward, int64_t{1} << 40, {1, 2}, {3, 4}, "", ""},
        BadCase{"HugeCount", Phase::kForward, (int64_t{1} << 40) + 1, {1, 2}, {3, 4}, kInvalidContribution, "count = "},
        BadCase{"NegativeM2", Phase::kForward, 4, {1, 2}, {3, -4}, kInvalidContribution, "m2[1] = -4"},
        BadCase{"MinusInfiniteM2", Phase::kForward, 4, {1, 2}, {-kInfinity, 4}, kInvalidContribution, "m2[0] = -inf"},
        BadCase{"NanMean", Phase::kForward, 4, {1, kNan}, {3, 4}, kNotFinite, "mean[1] = nan"},
        BadCase{"NanM2", Phase::kForward, 4, {1, 2}, {kNan, 4}, kNotFinite, "m2[0] = nan"},
        BadCase{"InfiniteMean", Phase::kForward, 4, {-kInfinity, 2}, {3, 4}, kNotFinite, "mean[0] = -inf"},
        BadCase{"HugeMean", Phase::kForward, 4, {0x1.1p500, 2}, {3, 4}, kNotFinite, "mean[0]"},
        BadCase{"HugeM2", Phase::kForward, 4, {1, 2}, {3, 0x1.1p1000}, kNotFinite, "m2[1]"},
        BadCase{"EmptyBatchWithHalf", Phase::kForward, 0, {0, 0}, {}, kInvalidContribution, "mean and 0 of m2"},
        BadCase{"HugeGradient", Phase::kBackward, 0, {1, 2}, {3, 0x1.1p500}, "", ""},
        BadCase{"InfiniteGradient", Phase::kBackward, 0, {kInfinity, 2}, {kNan, -kInfinity}, "", ""},
        BadCase{"NanVector", Phase::kSum, 0, {kNan, -kInfinity}, {}, "", ""}),
    [](const auto& info) { return info.param.name; });

TEST(CheckNumbersPlaceTest, FindsABadNumberWhereverItIs) {
  for (uint32_t channels = 1; channels <= 19; ++channels) {
    const std::vector<double> good(channels, 1.0);
    Contribution contribution;
    contribution.key = {"bn", 0, Phase::kForward};
    contribution.count = 2;
    for (uint32_t c = 0; c < channels; ++c) {
      std::vector<double> bad = good;
      bad[c] = -kNan;
      contribution.first = bad;
      contribution.second = good;
      auto error = CheckNumbers(contribution, Spec(channels), 0, Limits());
      ASSERT_TRUE(error.has_value()) << "channel " << c << " of " << channels;
      EXPECT_THAT(error->message, HasSubstr("mean[" + std::to_string(c) + "]"));
      bad[c] = -1e-300;
      contribution.first = good;
      contribution.second = bad;
      error = CheckNumbers(contribution, Spec(channels), 0, Limits());
      ASSERT_TRUE(error.has_value()) << "channel " << c << " of " << channels;
      EXPECT_THAT(error->message, HasSubstr("m2[" + std::to_string(c) + "]"));
      bad[c] = -0.0;
      EXPECT_FALSE(CheckNumbers(contribution, Spec(channels), 0, Limits()).has_value());
    }
  }
}

TEST(CheckNumbersPolicyTest, PropagatingLayersTakeAnyMagnitudeButNoNegativeSquares) {
  LayerSpec spec = Spec(2);
  spec.numeric_policy = NumericPolicy::kPropagate;
  const std::vector<double> mean = {kNan, kInfinity};
  const std::vector<double> m2 = {kInfinity, kNan};
  const std::vector<double> negative = {0.0, -1.0};
  Contribution contribution{{"bn", 0, Phase::kForward}, 4, BackwardRole::kRequired, mean, m2};
  EXPECT_FALSE(CheckNumbers(contribution, spec, 0, Limits()).has_value());
  contribution.second = negative;
  EXPECT_STREQ(CheckNumbers(contribution, spec, 0, Limits())->reason, kInvalidContribution);
}

TEST(CheckMergedTest, SaysWhichChannelOverflows) {
  // Each mean is within bounds; the square of their distance, times 2^39, is not.
  const int64_t count = int64_t{1} << 40;
  const Payloads payloads = {{0, Moments(count, {1.0, 0x1p500}, {0, 0})}, {1, Moments(count, {1.0, -0x1p500}, {0, 0})}};
  const RoundOutcome outcome = Merged(Phase::kForward, payloads, 2);
  const std::optional<Error> error = CheckMerged(outcome, Spec(2));
  ASSERT_TRUE(error.has_value());
  EXPECT_STREQ(error->reason, kNotFinite);
  EXPECT_THAT(error->message, HasSubstr("m2[1]"));
  LayerSpec propagating = Spec(2);
  propagating.numeric_policy = NumericPolicy::kPropagate;
  EXPECT_FALSE(CheckMerged(outcome, propagating).has_value());
}

TEST(CheckMergedTest, SumsMayOverflow) {
  for (const Phase phase : {Phase::kBackward, Phase::kSum}) {
    Payloads payloads = {{0, Moments(0, {1.6e308}, {1.0})}, {1, Moments(0, {1.6e308}, {2.0})}};
    if (phase == Phase::kSum) payloads[0].second = payloads[1].second = {};
    const RoundOutcome outcome = Merged(phase, payloads, 1);
    EXPECT_EQ(outcome.first[0], kInfinity);
    EXPECT_FALSE(CheckMerged(outcome, Spec(1)).has_value());
  }
}

TEST(CheckMergedTest, TakesTheGreatestThatCanBeMerged) {
  const Payloads payloads = {{0, Moments(2, {0x1p500}, {0x1p1000})}, {1, Moments(2, {-0x1p500}, {0x1p1000})}};
  const RoundOutcome outcome = Merged(Phase::kForward, payloads, 1);
  EXPECT_FALSE(CheckMerged(outcome, Spec(1)).has_value());
  EXPECT_EQ(outcome.first[0], 0.0);
  EXPECT_EQ(outcome.second[0], (2 * 0x1p1000 + 4 * 0x1p1000) / 4);
}

// ---- Replays --------------------------------------------------------------------------------------------------------

TEST(SameNumbersTest, ComparesBits) {
  const Payload payload = Moments(3, {0.0, kNan}, {1.0, 2.0});
  const std::vector<double> first = payload.first;
  const std::vector<double> second = payload.second;
  Contribution same{{"bn", 0, Phase::kForward}, 3, BackwardRole::kRequired, first, second};
  EXPECT_TRUE(SameNumbers(payload, same));
  EXPECT_EQ(Digest(payload), Digest(same));
  const std::vector<double> minus_zero = {-0.0, kNan};
  std::vector<Contribution> others(5, same);
  others[0].count = 4;
  others[1].backward_role = BackwardRole::kNone;
  others[2].first = minus_zero;
  others[3].second = absl::MakeConstSpan(second).first(1);
  others[4].first = second;
  others[4].second = first;
  for (const Contribution& other : others) {
    EXPECT_FALSE(SameNumbers(payload, other));
    EXPECT_NE(Digest(payload), Digest(other));
  }
}

TEST(ResultDigestTest, IsTheSameInEveryMaster) {
  // Numbers of another implementation. Workers bring digests to the next master.
  RoundOutcome outcome;
  outcome.count = 7;
  outcome.backward_required = true;
  outcome.missing_ranks = {1};
  outcome.abstaining_ranks = {0, 2};
  outcome.first = {0.5, -3.0, 1e300};
  outcome.second = {0.0, 2.0, 0.25};
  EXPECT_EQ(ResultDigest(outcome), 0x2b947c4ad381007fu);
  RoundOutcome sum;
  sum.first = {1.0, 2.0};
  EXPECT_EQ(ResultDigest(sum), 0x741ad2414f5ea783u);
  RoundOutcome odd;
  odd.count = 3;
  odd.missing_ranks = {2};
  odd.first = {1.0};
  EXPECT_EQ(ResultDigest(odd), 0x44a99ff3ea2c88c9u);
}

}  // namespace
}  // namespace syncbn::core
