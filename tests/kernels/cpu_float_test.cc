// The CPU's operations on float32 tensors: their statistics from differences in float32, and their outputs from factors
// of 29 bits.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "tests/kernels/cpu_cases.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels {
namespace {

using testing::Case;
using testing::Describe;
using testing::Doubles;
using testing::kSeed;
using testing::MakeCase;
using testing::Tensor;

constexpr Layout kLayouts[] = {Layout::kChannelsFirst, Layout::kChannelsLast};

TensorShape Float(int64_t batch, int64_t channels, int64_t spatial, Layout layout) {
  return {batch, channels, spatial, DataType::kFloat32, layout};
}

// The largest and the typical error of the channels' statistics: of m2, relative to it, and of the mean, in deviations.
struct Errors {
  double largest_m2 = 0, typical_m2 = 0, largest_mean = 0, typical_mean = 0;
};

Errors ErrorsOf(const Case& c) {
  Doubles mean(c.channels()), m2(c.channels());
  cpu::BatchNormStats({1}, c.shape, Tensor(DataType::kFloat32, c.x).data(), mean.data(), m2.data());
  const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), c.x);
  Errors errors;
  for (size_t i = 0; i < c.channels(); ++i) {
    const double true_m2 = static_cast<double>(want.m2[i]);
    const double deviation = std::sqrt(true_m2 / static_cast<double>(c.shape.values_per_channel()));
    const double of_m2 = std::abs(static_cast<double>(m2[i] - want.m2[i])) / true_m2;
    const double of_mean = std::abs(static_cast<double>(mean[i] - want.mean[i])) / deviation;
    errors.largest_m2 = std::fmax(errors.largest_m2, of_m2);
    errors.largest_mean = std::fmax(errors.largest_mean, of_mean);
    errors.typical_m2 += of_m2 * of_m2 / static_cast<double>(c.channels());
    errors.typical_mean += of_mean * of_mean / static_cast<double>(c.channels());
  }
  errors.typical_m2 = std::sqrt(errors.typical_m2);
  errors.typical_mean = std::sqrt(errors.typical_mean);
  return errors;
}

// A running variance rounds to 2^-24 of itself: statistics must not add to that.
TEST(CpuFloat, StatisticsKeepMoreDigitsThanFloat32) {
  std::mt19937_64 rng(kSeed + 21);
  for (Layout layout : kLayouts) {
    for (double ratio : {0.0, 0.5, 30.0, 1e4}) {
      SCOPED_TRACE(ratio);
      const Errors errors = ErrorsOf(MakeCase(Float(8, 256, 49, layout), ratio, &rng));
      EXPECT_LE(errors.largest_m2, 0x1p-25);
      EXPECT_LE(errors.typical_m2, 0x1p-28);
      EXPECT_LE(errors.largest_mean, 0x1p-25);
      EXPECT_LE(errors.typical_mean, 0x1p-28);
    }
  }
}

// Few values that occur often: a rounding of their difference from the pivot would be the same each time.
TEST(CpuFloat, StatisticsOfFewDistinctValuesAreExact) {
  std::mt19937_64 rng(kSeed + 22);
  for (Layout layout : kLayouts) {
    for (const TensorShape& shape :
         {Float(12, 19, 77, layout), Float(2, 3, 5000, layout), Float(900, 21, 1, Layout::kChannelsLast)}) {
      SCOPED_TRACE(Describe(shape));
      Case c = MakeCase(shape, 0, &rng);
      for (size_t i = 0; i < c.size(); ++i)
        c.x[i] = c.oracle().ChannelOf(i) % 2 == 0 ? rng() % 3 == 0 : 0.125 * (rng() % 9);
      const Errors errors = ErrorsOf(c);
      EXPECT_LE(errors.largest_m2, 1e-13);
      EXPECT_LE(errors.largest_mean, 1e-13);
    }
  }
}

TEST(CpuFloat, StatisticsHoldWhereDifferencesDoNot) {
  std::mt19937_64 rng(kSeed + 23);
  for (Layout layout : kLayouts) {
    const TensorShape shape = Float(30, 45, 49, layout);
    SCOPED_TRACE(Describe(shape));
    Case c = MakeCase(shape, 0, &rng);
    std::vector<int> seen(c.channels());
    for (size_t i = 0; i < c.size(); ++i) {
      const size_t channel = c.oracle().ChannelOf(i);
      const int before = seen[channel]++;
      // The largest distance is infinite in float32; the smallest numbers; the first values far from all others.
      if (channel % 4 == 0) c.x[i] = c.x[i] > 0 ? 3e38 : -3e38;
      if (channel % 4 == 1) c.x[i] *= 1e-41;
      if (channel % 4 == 2 && before < 4) c.x[i] = 1e6;
    }
    c.x = Tensor(DataType::kFloat32, c.x).values();
    const Errors errors = ErrorsOf(c);
    EXPECT_LE(errors.largest_m2, 0x1p-24);
    EXPECT_LE(errors.largest_mean, 0x1p-24);
  }
}

// Returns the number with 29 bits that is nearest to v.
double Rounded(double v) {
  int exponent;
  const double fraction = std::frexp(v, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 29)), exponent - 29);
}

TEST(CpuFloat, OutputsAreSumsOfExactProducts) {
  std::mt19937_64 rng(kSeed + 24);
  for (Layout layout : kLayouts) {
    for (const TensorShape& shape : {Float(5, 3, 49, layout), Float(3, 40, 130, layout), Float(70, 65, 1, layout)}) {
      SCOPED_TRACE(Describe(shape));
      const Case c = MakeCase(shape, 2, &rng);
      const Tensor x(shape.type, c.x), dy(shape.type, c.dy);
      Tensor y(shape.type, c.size()), dx(shape.type, c.size());
      cpu::BatchNormElemt({1}, shape, x.data(), c.forward(), {}, y.data());
      cpu::BatchNormBackwardElemt({1}, shape, dy.data(), x.data(), c.backward(), {nullptr, c.forward()}, dx.data(),
                                  nullptr);
      const Doubles outputs = y.values(), gradients = dx.values();
      for (size_t i = 0; i < c.size(); ++i) {
        const size_t channel = c.oracle().ChannelOf(i);
        const double factor = Rounded(c.scale[channel]);
        const double product = c.x[i] * factor;
        const double output = product + (c.shift[channel] - c.mean[channel] * factor);
        ASSERT_EQ(outputs[i], static_cast<double>(static_cast<float>(output))) << i;
        const double slope = Rounded(-c.scale[channel] * c.projection[channel]);
        const double of_x = c.x[i] * slope;
        const double of_dy = (output > 0 ? c.dy[i] : 0) * factor;
        const double rest = -factor * c.mean_dy[channel] - slope * c.mean[channel];
        ASSERT_EQ(gradients[i], static_cast<double>(static_cast<float>(of_dy + (of_x + rest)))) << i;
      }
    }
  }
}

// Outputs next to 0, and such as float32 cannot compute: the sums' gate must be the forward pass's, which is in
// float64.
TEST(CpuFloat, TheGateOfSumsIsTheForwardPasss) {
  std::mt19937_64 rng(kSeed + 25);
  constexpr double kScales[] = {0x1.8p0, -0x1p30, 0x1p-140, 0x1p110, 0x1p-100, 0x1p300};
  for (int64_t batch : {3, 300}) {
    for (Layout layout : kLayouts) {
      Case c = MakeCase(Float(batch, 43, 7, layout), 0, &rng);
      SCOPED_TRACE(Describe(c.shape));
      for (size_t i = 0; i < c.channels(); ++i) {
        c.scale[i] = kScales[i % 6] * (1 + 0x1p-28 * static_cast<double>(rng() % 9));
        c.mean[i] = 1 + 0x1p-23 * static_cast<double>(rng() % 3);
        c.shift[i] = i % 7 == 0 ? 0 : c.scale[i] * 0x1p-26 * static_cast<double>(rng() % 9);
        if (i % 11 == 0) c.shift[i] = c.scale[i] * 0x1p90;
      }
      for (double& x : c.x) {
        const double close = 1 + 0x1p-23 * static_cast<double>(rng() % 7) - 0x1p-24 * static_cast<double>(rng() % 3);
        x = rng() % 50 == 0 ? 0x1p-140 * static_cast<double>(rng() % 5) : close;
      }
      for (double& dy : c.dy) dy = static_cast<double>(1 + rng() % 8);
      const Tensor x(c.shape.type, c.x), dy(c.shape.type, c.dy);
      Tensor y(c.shape.type, c.size());
      cpu::BatchNormElemt({1}, c.shape, x.data(), c.forward(), {nullptr, true, nullptr}, y.data());
      Doubles want(c.channels()), sum_dy(c.channels()), sum_dy_xmu(c.channels());
      const Doubles outputs = y.values();
      for (size_t i = 0; i < c.size(); ++i) want[c.oracle().ChannelOf(i)] += outputs[i] > 0 ? c.dy[i] : 0;
      for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
        const testing::OnTarget on_target(target);
        cpu::BatchNormBackwardReduce({1}, c.shape, dy.data(), x.data(), c.mean.data(), {nullptr, c.forward()},
                                     sum_dy.data(), sum_dy_xmu.data());
        EXPECT_EQ(sum_dy, want) << hwy::TargetName(target);
      }
    }
  }
}

// A factor beyond all others must neither fail nor depend on the instruction set.
TEST(CpuFloat, TakesAnyFactor) {
  const TensorShape shape = Float(1, 1, 3, Layout::kChannelsFirst);
  const Doubles x = {0, 0x1p-149, 2};
  const double zero = 0;
  for (double scale : {0.0, 0x1p-1060, 0x1p-810, 0x1p-300, 0x1p300, 0x1p1000}) {
    Tensor y(shape.type, x.size());
    cpu::BatchNormElemt({1}, shape, Tensor(shape.type, x).data(), {&zero, &scale, &zero}, {}, y.data());
    for (size_t i = 0; i < x.size(); ++i)
      EXPECT_EQ(y.values()[i], static_cast<double>(static_cast<float>(x[i] * scale)));
  }
}

}  // namespace
}  // namespace syncbn::kernels
