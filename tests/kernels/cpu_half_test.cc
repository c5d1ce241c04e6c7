// The CPU's operations on the 16-bit types: their arithmetic is float32's, one operation at a time, and float64's where
// float32 cannot hold what there is.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "tests/kernels/cpu_cases.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels {
namespace {

using testing::Case;
using testing::Describe;
using testing::Doubles;
using testing::Get;
using testing::kSeed;
using testing::MakeCase;
using testing::OnTarget;
using testing::Put;
using testing::Tensor;

constexpr DataType kHalfTypes[] = {DataType::kFloat16, DataType::kBFloat16};

// The forward pass's output before its rounding to a 16-bit type: computed in float32, or in float64 where float32
// cannot hold the scale.
double Output(double x, double scale, double shift) {
  if (std::abs(scale) > 0x1p100 || std::abs(scale) < 0x1p-100) return x * scale + shift;
  const float product = static_cast<float>(x) * static_cast<float>(scale);
  return product + static_cast<float>(shift);
}

// x is exact in the type, and the scale carries it to where it must be rounded.
void CheckScaled(DataType type, const Doubles& x, double scale, double shift) {
  const TensorShape shape = {1, 1, static_cast<int64_t>(x.size()), type, Layout::kChannelsFirst};
  const double zero = 0;
  Tensor y(type, x.size());
  cpu::BatchNormElemt({1}, shape, Tensor(type, x).data(), {&zero, &scale, &shift}, {}, y.data());
  const Doubles got = y.values();
  for (size_t i = 0; i < x.size(); ++i) {
    uint8_t bytes[8];
    Put(type, Output(x[i], scale, shift), bytes);
    const double want = Get(type, bytes);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got[i]));
    } else {
      ASSERT_EQ(got[i], want) << x[i] << " * " << scale << " + " << shift;
      ASSERT_EQ(std::signbit(got[i]), std::signbit(want)) << x[i] << " * " << scale << " + " << shift;
    }
  }
}

TEST(CpuHalf, RoundsToNearestEven) {
  for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
    Doubles all;
    for (int bits = 0; bits < 0x10000; ++bits) {
      const uint16_t half = static_cast<uint16_t>(bits);
      all.push_back(type == DataType::kFloat16 ? Float16ToDouble(half) : BFloat16ToDouble(half));
    }
    for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
      const OnTarget on_target(target);
      SCOPED_TRACE(hwy::TargetName(target));
      CheckScaled(type, all, 1, -0.0);
      // Half of everything meets the ties of the subnormals; 1 + 2^-11 or 2^-8 those of the normal numbers. A nudge on
      // top of a tie decides it.
      for (double tie : {0.5, 0.25, 0.75, 1 + 0x1p-11, 1 + 0x1p-8, 1 + 0x1p-9, 1.5}) {
        for (double nudge : {0.0, 0x1p-20, -0x1p-20}) CheckScaled(type, all, tie * (1 + nudge), -0.0);
      }
      CheckScaled(type, all, 1e30, -0.0);
      CheckScaled(type, all, 1e300, -0.0);
      CheckScaled(type, all, -1e-300, -0.0);
      if (HasFailure()) return;
    }
  }
}

// Planes that are shorter than a vector, that a vector does not divide, and longer; rows of all lengths.
std::vector<TensorShape> Shapes() {
  std::vector<TensorShape> shapes;
  const int64_t extents[][3] = {{3, 5, 2},   {4, 7, 9},   {3, 3, 16},  {2, 9, 49}, {5, 2, 1000},
                                {40, 27, 1}, {37, 64, 1}, {9, 301, 3}, {1, 1, 77}, {2, 512, 49}};
  for (const auto& e : extents) {
    for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      for (DataType type : kHalfTypes) shapes.push_back({e[0], e[1], e[2], type, layout});
    }
  }
  return shapes;
}

// One channel's coefficients: the mean rounded to float32, and what it loses in the constant term.
struct Channel {
  float mean, scale, shift, mean_dy, projection;

  Channel(const Case& c, size_t i)
      : mean(static_cast<float>(c.mean[i])),
        scale(static_cast<float>(c.scale[i])),
        shift(static_cast<float>(c.shift[i] + (mean - c.mean[i]) * c.scale[i])),
        mean_dy(static_cast<float>(c.mean_dy[i] + (mean - c.mean[i]) * c.projection[i])),
        projection(static_cast<float>(c.projection[i])) {}

  float Output(float x) const {
    const float product = (x - mean) * scale;
    return product + shift;
  }
  float Gradient(float dy, float x) const {
    const float product = (x - mean) * projection;
    return scale * (dy - mean_dy - product);
  }
};

TEST(CpuHalf, ComputesInFloat32) {
  std::mt19937_64 rng(kSeed + 11);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 2, &rng);
    Tensor y(shape.type, c.size()), dx(shape.type, c.size()), want_y(shape.type, c.size()),
        want_dx(shape.type, c.size());
    const Tensor x(shape.type, c.x), dy(shape.type, c.dy);
    cpu::BatchNormElemt({1}, shape, x.data(), c.forward(), {}, y.data());
    cpu::BatchNormBackwardElemt({1}, shape, dy.data(), x.data(), c.backward(), {nullptr, c.forward()}, dx.data(),
                                nullptr);
    for (size_t i = 0; i < c.size(); ++i) {
      const Channel channel(c, c.oracle().ChannelOf(i));
      const float at = static_cast<float>(c.x[i]);
      const float output = channel.Output(at);
      const float gradient = output > 0 ? static_cast<float>(c.dy[i]) : 0;
      Put(shape.type, output, want_y.data() + 2 * i);
      Put(shape.type, channel.Gradient(gradient, at), want_dx.data() + 2 * i);
    }
    EXPECT_EQ(y.content(), want_y.content());
    EXPECT_EQ(dx.content(), want_dx.content());
    if (HasFailure()) return;
  }
}

// Outputs that are rounding errors alone: the gates of both backward operations must round as the forward pass did.
TEST(CpuHalf, TheGateRoundsAsTheForwardPassDid) {
  std::mt19937_64 rng(kSeed + 12);
  for (int64_t batch : {3, 700}) {
    for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      for (DataType type : kHalfTypes) {
        Case c = MakeCase({batch, 19, 7, type, layout}, 0, &rng);
        SCOPED_TRACE(Describe(c.shape));
        for (size_t i = 0; i < c.channels(); ++i) {
          c.scale[i] =
              (1.1 + 0.1 * static_cast<double>(i)) * 0x1p20;  // A float16's rounding errors are no subnormals then.
          // Above 0 in float64 for one sign of the product; in float32 that small a part is lost.
          c.shift[i] = c.mean[i] * c.scale[i] * (1 + (i % 3 == 0 ? 0x1p-20 : 0x1p-27));
        }
        for (double& x : c.x) x = 0;
        const Tensor x(type, c.x), dy(type, Doubles(c.size(), 1.0));
        Tensor y(type, c.size()), dx(type, c.size()), d_residual(type, c.size());
        cpu::BatchNormElemt({1}, c.shape, x.data(), c.forward(), {nullptr, true, nullptr}, y.data());
        const ReluGate gate = {nullptr, c.forward()};
        cpu::BatchNormBackwardElemt({1}, c.shape, dy.data(), x.data(), c.backward(), gate, dx.data(),
                                    d_residual.data());
        Doubles sum_dy(c.channels()), sum_dy_xmu(c.channels()), open(c.channels(), 0);
        cpu::BatchNormBackwardReduce({1}, c.shape, dy.data(), x.data(), c.mean.data(), gate, sum_dy.data(),
                                     sum_dy_xmu.data());
        const Doubles outputs = y.values(), gradients = d_residual.values();
        for (size_t i = 0; i < c.size(); ++i) {
          ASSERT_EQ(gradients[i], outputs[i] > 0 ? 1.0 : 0.0) << i;
          open[c.oracle().ChannelOf(i)] += outputs[i] > 0 ? 1.0 : 0.0;
        }
        EXPECT_EQ(sum_dy, open);
        EXPECT_NE(open, Doubles(c.channels(), 0));
      }
    }
  }
}

// Channels side by side whose squares float32 holds, or which are too small or too large for it; channels of one value;
// an outlier, or a value far from all others, in front.
Case ManyRanges(const TensorShape& shape, std::mt19937_64* rng) {
  Case c = MakeCase(shape, 0, rng);
  constexpr double kScales[] = {1, 1e-30, 1e-20, 1e-6, 3, 1e3, 1e15, 1e22, 1e36};
  std::vector<bool> seen(c.channels());
  for (size_t i = 0; i < c.size(); ++i) {
    const size_t channel = c.oracle().ChannelOf(i);
    const double scale = shape.type == DataType::kFloat16 ? (channel % 3 == 0 ? 1e-3 : 1e2) : kScales[channel % 9];
    c.x[i] *= scale;
    c.dy[i] *= channel % 2 == 0 ? 1 / scale : 1;
    if (channel % 9 == 4) c.x[i] = 3;
    if (channel % 9 == 3 && !seen[channel]) c.x[i] = 100;
    if (channel % 9 == 5) c.x[i] += seen[channel] ? 6e4 : -6e4;
    seen[channel] = true;
  }
  c.x = Tensor(shape.type, c.x).values();
  c.dy = Tensor(shape.type, c.dy).values();
  const syncbn::testing::OracleStats stats = syncbn::testing::Stats(c.oracle(), c.x);
  for (size_t i = 0; i < c.channels(); ++i) c.mean[i] = static_cast<double>(stats.mean[i]);
  return c;
}

TEST(CpuHalf, SumsHoldInEveryRange) {
  std::mt19937_64 rng(kSeed + 13);
  for (DataType type : kHalfTypes) {
    for (const TensorShape& shape :
         {TensorShape{30, 45, 49, type, Layout::kChannelsFirst}, TensorShape{2, 18, 5000, type, Layout::kChannelsFirst},
          TensorShape{30, 45, 49, type, Layout::kChannelsLast},
          TensorShape{300, 160, 1, type, Layout::kChannelsLast}}) {
      SCOPED_TRACE(Describe(shape));
      const Case c = ManyRanges(shape, &rng);
      const Tensor x(type, c.x), dy(type, c.dy);
      Doubles mean(c.channels()), m2(c.channels()), sum_dy(c.channels()), sum_dy_xmu(c.channels());
      cpu::BatchNormStats({1}, shape, x.data(), mean.data(), m2.data());
      cpu::BatchNormBackwardReduce({1}, shape, dy.data(), x.data(), c.mean.data(), {}, sum_dy.data(),
                                   sum_dy_xmu.data());
      const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), c.x);
      const syncbn::testing::OracleSums sums =
          syncbn::testing::BackwardReduce(c.oracle(), c.dy, c.x, c.mean, std::vector<bool>(c.size(), true));
      for (size_t i = 0; i < c.channels(); ++i) {
        const double true_m2 = static_cast<double>(want.m2[i]);
        const double deviation = std::sqrt(true_m2 / static_cast<double>(shape.values_per_channel()));
        EXPECT_NEAR(m2[i], true_m2, 5e-7 * true_m2) << i;
        EXPECT_NEAR(mean[i], static_cast<double>(want.mean[i]), 5e-7 * deviation + 1e-15 * std::abs(c.mean[i])) << i;
        EXPECT_NEAR(sum_dy[i], static_cast<double>(sums.sum_dy[i]), 5e-7 * static_cast<double>(sums.magnitude_dy[i]))
            << i;
        EXPECT_NEAR(sum_dy_xmu[i], static_cast<double>(sums.sum_dy_xmu[i]),
                    5e-7 * static_cast<double>(sums.magnitude_dy_xmu[i]))
            << i;
      }
      if (HasFailure()) return;
    }
  }
}

// Bounds what reaches a running variance, which is float32: sums in float32 must not add to its rounding.
TEST(CpuHalf, VarianceIsAsGoodAsFloat32) {
  std::mt19937_64 rng(kSeed + 14);
  for (DataType type : kHalfTypes) {
    for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      const TensorShape shape = {8, 256, 49, type, layout};
      const Case c = MakeCase(shape, 0.5, &rng);
      Doubles mean(c.channels()), m2(c.channels());
      cpu::BatchNormStats({1}, shape, Tensor(type, c.x).data(), mean.data(), m2.data());
      const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), c.x);
      double squares = 0;
      for (size_t i = 0; i < c.channels(); ++i) {
        const double error = m2[i] / static_cast<double>(want.m2[i]) - 1;
        EXPECT_LE(std::abs(error), 2 * 0x1p-24) << i;
        squares += error * error;
      }
      EXPECT_LE(std::sqrt(squares / static_cast<double>(c.channels())), 0.5 * 0x1p-24);
    }
  }
}

}  // namespace
}  // namespace syncbn::kernels
