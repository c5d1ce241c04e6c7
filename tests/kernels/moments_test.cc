#include "kernels/moments.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/coefficients.h"

namespace syncbn {
namespace {

constexpr uint64_t kSeed = 20240611;

struct Exact {
  long double mean = 0, m2 = 0;
};

Exact ExactOf(const std::vector<double>& values) {
  Exact exact;
  for (double v : values) exact.mean += v;
  exact.mean /= static_cast<long double>(values.size());
  for (double v : values) exact.m2 += (v - exact.mean) * (v - exact.mean);
  return exact;
}

Moments MomentsOf(const std::vector<double>& values) {
  if (values.empty()) return {};
  const Exact exact = ExactOf(values);
  return {static_cast<int64_t>(values.size()), static_cast<double>(exact.mean), static_cast<double>(exact.m2)};
}

std::vector<double> Normal(std::mt19937_64* rng, size_t count, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  std::vector<double> values(count);
  for (double& v : values) v = normal(*rng);
  return values;
}

TEST(Moments, MergeMatchesTheUnion) {
  RecordProperty("seed", static_cast<int>(kSeed));
  std::mt19937_64 rng(kSeed);
  for (double mean : {0.0, 1.0, 1e4, -1e6}) {
    for (int round = 0; round < 50; ++round) {
      std::vector<double> all;
      Moments merged;
      for (int part = 0; part < 5; ++part) {
        const std::vector<double> values = Normal(&rng, rng() % 40, mean, 1.0);
        merged = Merge(merged, MomentsOf(values));
        all.insert(all.end(), values.begin(), values.end());
      }
      if (all.empty()) continue;
      const Exact exact = ExactOf(all);
      EXPECT_EQ(merged.count, static_cast<int64_t>(all.size())) << "seed " << kSeed;
      EXPECT_NEAR(merged.mean, static_cast<double>(exact.mean), 1e-15 * (1 + std::abs(mean)) * 8);
      EXPECT_NEAR(merged.m2, static_cast<double>(exact.m2), 1e-9 * (1 + static_cast<double>(exact.m2)));
    }
  }
}

TEST(Moments, EmptyIsTheIdentityBitForBit) {
  const Moments a = {3, -0.0, 0x1.23456789abcdep-3};
  for (const Moments& merged : {Merge(a, {}), Merge({}, a)}) {
    EXPECT_EQ(merged.count, 3);
    EXPECT_TRUE(std::signbit(merged.mean));
    EXPECT_EQ(merged.m2, a.m2);
  }
  EXPECT_EQ(Merge({}, {}).count, 0);
}

TEST(Moments, MergeTakesCountsPast32Bits) {
  const int64_t big = int64_t{1} << 40;
  const Moments merged = Merge({big, 1.0, 5.0}, {big, 3.0, 7.0});
  EXPECT_EQ(merged.count, 2 * big);
  EXPECT_DOUBLE_EQ(merged.mean, 2.0);
  EXPECT_DOUBLE_EQ(merged.m2, 12.0 + 4.0 * static_cast<double>(big) / 2.0);
}

TEST(Moments, ShiftedSumsRebaseAndBecomeMoments) {
  std::mt19937_64 rng(kSeed + 1);
  for (double mean : {0.0, 10.0, -1e4}) {
    const std::vector<double> values = Normal(&rng, 100, mean, 2.0);
    ShiftedSums sums;
    sums.pivot = values[0];
    for (double v : values) {
      ++sums.count;
      sums.sum += v - sums.pivot;
      sums.sum_squares += (v - sums.pivot) * (v - sums.pivot);
    }
    const Exact exact = ExactOf(values);
    for (const ShiftedSums& s : {sums, Rebase(sums, mean), Rebase(Rebase(sums, mean + 1), mean - 1)}) {
      const Moments moments = ToMoments(s);
      EXPECT_EQ(moments.count, 100);
      EXPECT_NEAR(moments.mean, static_cast<double>(exact.mean), 1e-15 * (1 + std::abs(mean)) * 8) << kSeed;
      EXPECT_NEAR(moments.m2, static_cast<double>(exact.m2), 1e-10 * static_cast<double>(exact.m2)) << kSeed;
    }
  }
}

TEST(Moments, M2IsNeverNegativeAndNanPasses) {
  EXPECT_EQ(ToMoments({2, 0.0, 2.0, 2.0 - 1e-12}).m2, 0.0);
  EXPECT_TRUE(std::isnan(ToMoments({2, 0.0, 1.0, std::nan("")}).m2));
  EXPECT_EQ(ToMoments({}).count, 0);
}

TEST(Coefficients, EpsilonModes) {
  using kernels::InverseStd;
  EXPECT_DOUBLE_EQ(InverseStd(3.0, 1.0, EpsMode::kAdd), 0.5);
  EXPECT_DOUBLE_EQ(InverseStd(4.0, 1.0, EpsMode::kClamp), 0.5);
  EXPECT_DOUBLE_EQ(InverseStd(0.1, 0.25, EpsMode::kClamp), 2.0);
  EXPECT_TRUE(std::isnan(InverseStd(std::nan(""), 1.0, EpsMode::kAdd)));
  EXPECT_TRUE(std::isnan(InverseStd(std::nan(""), 1.0, EpsMode::kClamp)));
}

TEST(Coefficients, Projection) {
  using kernels::Projection;
  EXPECT_DOUBLE_EQ(Projection(8.0, 2, 3.0, 1.0, EpsMode::kAdd), 1.0);
  EXPECT_EQ(Projection(8.0, 0, 3.0, 1.0, EpsMode::kAdd), 0.0);
  EXPECT_EQ(Projection(8.0, 2, 0.5, 1.0, EpsMode::kClamp), 0.0);
}

TEST(Coefficients, RunningStatistics) {
  const kernels::RunningUpdate unbiased(5, 0.1, false);
  EXPECT_DOUBLE_EQ(unbiased.Mean(1.0, 2.0), 1.1);
  EXPECT_DOUBLE_EQ(unbiased.Var(1.0, 2.0), 1.15);  // 0.9 + 0.1 * 2 * 5/4.
  EXPECT_DOUBLE_EQ(kernels::RunningUpdate(5, 0.1, true).Var(1.0, 2.0), 1.1);
}

TEST(Coefficients, SmallRoundsMoveOnlyWhatTheyTell) {
  const kernels::RunningUpdate empty(0, 0.1, false);
  EXPECT_FALSE(empty.moves_mean());
  EXPECT_FALSE(empty.moves_var());
  const kernels::RunningUpdate single(1, 0.1, false);
  EXPECT_TRUE(single.moves_mean());
  EXPECT_FALSE(single.moves_var());
  EXPECT_TRUE(kernels::RunningUpdate(1, 0.1, true).moves_var());
}

}  // namespace
}  // namespace syncbn
