// The CPU's four operations against the long-double oracle, and against themselves: on every instruction set that this
// machine has, for several numbers of threads, at odd addresses and in place.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/plan.h"
#include "tests/kernels/cpu_cases.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels {
namespace {

using testing::Bytes;
using testing::Case;
using testing::Describe;
using testing::Doubles;
using testing::Draw;
using testing::DrawTensor;
using testing::Get;
using testing::kSeed;
using testing::kTypes;
using testing::MakeCase;
using testing::OnTarget;
using testing::Tensor;

// The distance between neighbours of `value` in a type.
double Ulp(DataType type, double value) {
  struct Traits {
    int fraction_bits, min_exponent;
  };
  const Traits traits[] = {{23, -126}, {52, -1022}, {10, -14}, {7, -126}};
  const Traits& t = traits[static_cast<int>(type)];
  const int exponent = value == 0 ? t.min_exponent : std::max(std::ilogb(value), t.min_exponent);
  return std::ldexp(1.0, exponent - t.fraction_bits);
}

// `got` is `want` rounded once, but for a few roundings of the arithmetic: in float64 of numbers up to about a hundred;
// in float32, for the 16-bit types, of terms whose sizes add up to `size`. Beside float32, factors have 29 bits.
void ExpectRounded(DataType type, const Doubles& got, const syncbn::testing::Wide& want, const Doubles& size) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = static_cast<double>(std::abs(static_cast<long double>(got[i]) - want[i]));
    const double factors = type == DataType::kFloat32 ? 0x1p-29 * size[i] : 0;
    const double arithmetic = SizeOf(type) == 2 ? 8 * 0x1p-24 * size[i] : 2e-13 + factors;
    const double bound = 0.5 * Ulp(type, static_cast<double>(want[i])) * (1 + 1e-12) + arithmetic;
    ASSERT_LE(error, bound) << "element " << i << " got " << got[i] << " want " << static_cast<double>(want[i]);
  }
}

// The sizes of the terms of a forward pass's outputs, and of a backward pass's gradients.
Doubles ForwardSizes(const Case& c) {
  Doubles sizes(c.size());
  for (size_t i = 0; i < c.size(); ++i) {
    const size_t channel = c.oracle().ChannelOf(i);
    sizes[i] =
        std::abs((c.x[i] - c.mean[channel]) * c.scale[channel]) + std::abs(c.shift[channel]) + std::abs(c.residual[i]);
  }
  return sizes;
}

Doubles BackwardSizes(const Case& c) {
  Doubles sizes(c.size());
  for (size_t i = 0; i < c.size(); ++i) {
    const size_t channel = c.oracle().ChannelOf(i);
    sizes[i] = std::abs(c.scale[channel]) * (std::abs(c.dy[i]) + std::abs(c.mean_dy[channel]) +
                                             std::abs((c.x[i] - c.mean[channel]) * c.projection[channel]));
  }
  return sizes;
}

// Shapes that meet every path: whole and partial vectors, folded and long rows, several chunks, splits and blocks.
std::vector<TensorShape> Shapes() {
  std::vector<TensorShape> shapes;
  const int64_t extents[][3] = {{1, 1, 1},    {0, 3, 4},   {3, 2, 0},    {2, 1, 4097},  {5, 3, 49},    {64, 16, 1},
                                {33, 3, 7},   {7, 5, 1},   {2, 27, 31},  {301, 65, 1},  {40, 130, 9},  {2, 3, 20011},
                                {6, 200, 35}, {3, 1, 257}, {1500, 8, 2}, {9000, 12, 1}, {2, 64, 1024}, {3, 300, 3}};
  for (const auto& e : extents) {
    for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      for (DataType type : kTypes) shapes.push_back({e[0], e[1], e[2], type, layout});
    }
  }
  std::mt19937_64 rng(kSeed);
  for (int i = 0; i < 60; ++i) {
    const auto extent = [&rng](uint64_t max) { return static_cast<int64_t>(rng() % max); };
    shapes.push_back({extent(30), 1 + extent(150), extent(60), kTypes[rng() % 4],
                      rng() % 2 == 0 ? Layout::kChannelsFirst : Layout::kChannelsLast});
  }
  return shapes;
}

// The results of all operations for a case, as bytes.
struct Results {
  Doubles mean, m2;
  Bytes y, y_relu, y_masked, mask;
  Doubles sum_dy[3], sum_dy_xmu[3];  // By gate: open, mask, forward.
  Bytes dx[3], d_residual[3];
};

Results RunAll(const Case& c, int threads, size_t offset = 0) {
  const cpu::Context context = {threads};
  const DataType type = c.shape.type;
  const Tensor x(type, c.x, offset), dy(type, c.dy, offset), residual(type, c.residual, offset);
  Results r;
  r.mean.resize(c.channels());
  r.m2.resize(c.channels());
  cpu::BatchNormStats(context, c.shape, x.data(), r.mean.data(), r.m2.data());
  const auto elemt = [&](const Epilogue& epilogue) {
    Tensor y(type, c.size(), offset);
    cpu::BatchNormElemt(context, c.shape, x.data(), c.forward(), epilogue, y.data());
    return y.content();
  };
  r.mask.resize(ReluMaskBytes(c.shape.size()), 0xAA);
  r.y = elemt({});
  r.y_relu = elemt({nullptr, true, nullptr});
  r.y_masked = elemt({residual.data(), true, r.mask.data()});
  const ReluGate gates[3] = {{}, {r.mask.data(), {}}, {nullptr, c.forward()}};
  for (int g = 0; g < 3; ++g) {
    r.sum_dy[g].resize(c.channels());
    r.sum_dy_xmu[g].resize(c.channels());
    cpu::BatchNormBackwardReduce(context, c.shape, dy.data(), x.data(), c.mean.data(), gates[g], r.sum_dy[g].data(),
                                 r.sum_dy_xmu[g].data());
    Tensor dx(type, c.size(), offset), d_residual(type, c.size(), offset);
    cpu::BatchNormBackwardElemt(context, c.shape, dy.data(), x.data(), c.backward(), gates[g], dx.data(),
                                d_residual.data());
    r.dx[g] = dx.content();
    r.d_residual[g] = d_residual.content();
  }
  return r;
}

bool SameBits(const Doubles& a, const Doubles& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void ExpectSame(const Results& a, const Results& b) {
  EXPECT_TRUE(SameBits(a.mean, b.mean));
  EXPECT_TRUE(SameBits(a.m2, b.m2));
  EXPECT_EQ(a.y, b.y);
  EXPECT_EQ(a.y_relu, b.y_relu);
  EXPECT_EQ(a.y_masked, b.y_masked);
  EXPECT_EQ(a.mask, b.mask);
  for (int g = 0; g < 3; ++g) {
    EXPECT_TRUE(SameBits(a.sum_dy[g], b.sum_dy[g])) << g;
    EXPECT_TRUE(SameBits(a.sum_dy_xmu[g], b.sum_dy_xmu[g])) << g;
    EXPECT_EQ(a.dx[g], b.dx[g]) << g;
    EXPECT_EQ(a.d_residual[g], b.d_residual[g]) << g;
  }
}

Doubles ValuesOf(DataType type, const Bytes& bytes) {
  Doubles values(bytes.size() / SizeOf(type));
  for (size_t i = 0; i < values.size(); ++i) values[i] = Get(type, bytes.data() + i * SizeOf(type));
  return values;
}

// The relative error of sums: some hundred roundings in float64, or in float32 a few that do not cancel.
double SumTolerance(const TensorShape& shape) { return cpu::ReducesInFloat32(shape) ? 2e-7 : 1e-13; }

void CheckStats(const Case& c, const Results& r) {
  const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), c.x);
  const bool single = cpu::ReducesInFloat32(c.shape);
  const double values = static_cast<double>(c.shape.values_per_channel());
  for (size_t i = 0; i < c.channels(); ++i) {
    const double mean = static_cast<double>(want.mean[i]);
    const double m2 = static_cast<double>(want.m2[i]);
    const double deviation = single ? std::sqrt(m2 / values) : 0.0;
    const double of_type =
        c.shape.type == DataType::kFloat32 ? 2e-8 : 2e-7;  // Where differences are in float32, and sums.
    ASSERT_NEAR(r.mean[i], mean, 1e-13 * (1 + std::abs(mean)) + of_type * deviation);
    ASSERT_NEAR(r.m2[i], m2, (single ? of_type : 1e-9) * m2 + 1e-20 * mean * mean) << "channel " << i;
  }
}

// Also returns where the gate of the masked output is open.
std::vector<bool> CheckForward(const Case& c, const Results& r) {
  const DataType type = c.shape.type;
  const auto want = [&](const Doubles& residual, bool relu) {
    return syncbn::testing::Forward(c.oracle(), c.x, c.mean, c.scale, c.shift, residual, relu);
  };
  const Doubles sizes = ForwardSizes(c);
  ExpectRounded(type, ValuesOf(type, r.y), want({}, false), sizes);
  ExpectRounded(type, ValuesOf(type, r.y_relu), want({}, true), sizes);
  const Doubles masked = ValuesOf(type, r.y_masked);
  ExpectRounded(type, masked, want(c.residual, true), sizes);
  std::vector<bool> open(c.size());
  for (size_t i = 0; i < c.size(); ++i) {
    open[i] = masked[i] > 0;
    EXPECT_EQ((r.mask[i / 8] >> (i % 8) & 1) != 0, open[i]) << i;
  }
  if (c.size() % 8 != 0) {
    EXPECT_EQ(r.mask.back() >> (c.size() % 8), 0);
  }
  return open;
}

void CheckBackward(const Case& c, const Results& r, const std::vector<bool>& open, int g) {
  const DataType type = c.shape.type;
  const syncbn::testing::OracleSums sums = syncbn::testing::BackwardReduce(c.oracle(), c.dy, c.x, c.mean, open);
  const double tolerance = SumTolerance(c.shape);
  for (size_t i = 0; i < c.channels(); ++i) {
    ASSERT_NEAR(r.sum_dy[g][i], static_cast<double>(sums.sum_dy[i]),
                tolerance * static_cast<double>(sums.magnitude_dy[i]));
    ASSERT_NEAR(r.sum_dy_xmu[g][i], static_cast<double>(sums.sum_dy_xmu[i]),
                tolerance * static_cast<double>(sums.magnitude_dy_xmu[i]));
  }
  ExpectRounded(type, ValuesOf(type, r.dx[g]),
                syncbn::testing::Backward(c.oracle(), c.dy, c.x, c.mean, c.scale, c.mean_dy, c.projection, open),
                BackwardSizes(c));
  const Doubles d_residual = ValuesOf(type, r.d_residual[g]);
  for (size_t i = 0; i < c.size(); ++i) ASSERT_EQ(d_residual[i], open[i] ? c.dy[i] : 0.0);
}

TEST(CpuBatchNorm, MatchesTheOracle) {
  std::mt19937_64 rng(kSeed + 1);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 0.5, &rng);
    const Results r = RunAll(c, 1);
    CheckStats(c, r);
    const std::vector<bool> masked = CheckForward(c, r);
    // The forward gate is the unmasked output's.
    const Doubles relu = ValuesOf(shape.type, r.y_relu);
    std::vector<bool> forward(c.size());
    for (size_t i = 0; i < c.size(); ++i) forward[i] = relu[i] > 0;
    CheckBackward(c, r, std::vector<bool>(c.size(), true), 0);
    CheckBackward(c, r, masked, 1);
    CheckBackward(c, r, forward, 2);
    if (HasFatalFailure()) return;
  }
}

TEST(CpuBatchNorm, EqualBitsForAnyNumberOfThreads) {
  std::mt19937_64 rng(kSeed + 2);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 3, &rng);
    const Results one = RunAll(c, 1);
    for (int threads : {2, 3, 8}) ExpectSame(one, RunAll(c, threads));
    if (HasFailure()) return;
  }
}

TEST(CpuBatchNorm, EqualBitsOnEveryInstructionSet) {
  std::mt19937_64 rng(kSeed + 3);
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, -2, &rng);
    const Results native = RunAll(c, 1);
    for (int64_t target : targets) {
      SCOPED_TRACE(hwy::TargetName(target));
      const OnTarget on_target(target);
      ASSERT_STREQ(cpu::InstructionSet(), hwy::TargetName(target));
      ExpectSame(native, RunAll(c, 1));
    }
    if (HasFailure()) return;
  }
}

TEST(CpuBatchNorm, TakesAnyAddress) {
  std::mt19937_64 rng(kSeed + 4);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 1, &rng);
    ExpectSame(RunAll(c, 1, 0), RunAll(c, 1, 1));
    ExpectSame(RunAll(c, 1, 0), RunAll(c, 1, 6));
    if (HasFailure()) return;
  }
}

TEST(CpuBatchNorm, WorksInPlace) {
  std::mt19937_64 rng(kSeed + 5);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 1, &rng);
    const Results want = RunAll(c, 1);
    for (int threads : {1, 3}) {
      Tensor x(shape.type, c.x), residual(shape.type, c.residual), dy(shape.type, c.dy);
      Bytes mask(want.mask.size());
      const cpu::Context context = {threads};
      cpu::BatchNormElemt(context, shape, x.data(), c.forward(), {residual.data(), true, mask.data()}, residual.data());
      EXPECT_EQ(residual.content(), want.y_masked);
      EXPECT_EQ(mask, want.mask);
      cpu::BatchNormBackwardElemt(context, shape, dy.data(), x.data(), c.backward(), {mask.data(), {}}, dy.data(),
                                  nullptr);
      EXPECT_EQ(dy.content(), want.dx[1]);
      cpu::BatchNormElemt(context, shape, x.data(), c.forward(), {}, x.data());
      EXPECT_EQ(x.content(), want.y);
    }
    if (HasFailure()) return;
  }
}

// The gate's forward pass has a mean of its own, which need not be the one that the sums are about.
TEST(CpuBatchNorm, TheGateUsesItsOwnMean) {
  std::mt19937_64 rng(kSeed + 6);
  for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
    Case c = MakeCase({6, 5, 11, DataType::kFloat32, layout}, 0, &rng);
    const Results want = RunAll(c, 1);
    const Doubles forward_mean = c.mean;
    for (double& mean : c.mean) mean += 1;
    const ReluGate gate = {nullptr, {forward_mean.data(), c.scale.data(), c.shift.data()}};
    const Tensor x(c.shape.type, c.x), dy(c.shape.type, c.dy);
    Tensor dx(c.shape.type, c.size()), d_residual(c.shape.type, c.size());
    cpu::BatchNormBackwardElemt({1}, c.shape, dy.data(), x.data(), c.backward(), gate, dx.data(), d_residual.data());
    EXPECT_EQ(d_residual.content(), want.d_residual[2]);
    Doubles sum_dy(c.channels()), sum_dy_xmu(c.channels());
    cpu::BatchNormBackwardReduce({1}, c.shape, dy.data(), x.data(), c.mean.data(), gate, sum_dy.data(),
                                 sum_dy_xmu.data());
    EXPECT_TRUE(SameBits(sum_dy, want.sum_dy[2]));
    for (size_t i = 0; i < c.channels(); ++i) {
      EXPECT_NEAR(sum_dy_xmu[i], want.sum_dy_xmu[2][i] - want.sum_dy[2][i], 1e-10);
    }
  }
}

TEST(CpuBatchNorm, KeepsTheVarianceUnderALargeMean) {
  std::mt19937_64 rng(kSeed + 7);
  for (double ratio : {1e2, 1e3, 1e4}) {
    for (Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      for (int order = 0; order < 3; ++order) {
        TensorShape shape = {16, 4, 1000, DataType::kFloat32, layout};
        Doubles values = DrawTensor(&rng, shape, ratio);
        if (order == 1) std::sort(values.begin(), values.end());
        if (order == 2) values[0] = -1e6;  // An outlier that comes first.
        const Case c = {shape, values, {}, {}, {}, {}, {}, {}, {}};
        Doubles mean(4), m2(4);
        cpu::BatchNormStats({1}, shape, Tensor(shape.type, values).data(), mean.data(), m2.data());
        const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), values);
        for (size_t i = 0; i < 4; ++i) {
          EXPECT_NEAR(m2[i] / static_cast<double>(want.m2[i]), 1.0, 1e-6) << ratio << " seed " << kSeed;
          const double deviation = std::sqrt(static_cast<double>(want.m2[i]) / 16000);
          EXPECT_NEAR(mean[i], static_cast<double>(want.mean[i]), 1e-12 * ratio + 1e-9 * deviation);
        }
      }
    }
  }
}

TEST(CpuBatchNorm, EqualValuesHaveNoVariance) {
  for (DataType type : kTypes) {
    for (int64_t spatial : {1, 7, 5000}) {
      const TensorShape shape = {9, 2, spatial, type, Layout::kChannelsFirst};
      const Tensor x(type, Doubles(static_cast<size_t>(shape.size()), 0.099975586));
      Doubles mean(2), m2(2);
      cpu::BatchNormStats({1}, shape, x.data(), mean.data(), m2.data());
      EXPECT_NEAR(m2[0], 0, 1e-25);
      EXPECT_NEAR(mean[1], x.values()[0], 1e-16);
    }
  }
}

TEST(CpuBatchNorm, NoValuesGiveZeros) {
  for (const TensorShape& shape :
       {TensorShape{0, 3, 5}, TensorShape{5, 3, 0}, TensorShape{0, 3, 1, DataType::kFloat16, Layout::kChannelsLast}}) {
    Doubles mean(3, 7), m2(3, 7), sum_dy(3, 7), sum_dy_xmu(3, 7), zeros(3, 0);
    cpu::BatchNormStats({2}, shape, nullptr, mean.data(), m2.data());
    cpu::BatchNormBackwardReduce({2}, shape, nullptr, nullptr, zeros.data(), {}, sum_dy.data(), sum_dy_xmu.data());
    cpu::BatchNormElemt({2}, shape, nullptr, {zeros.data(), zeros.data(), zeros.data()}, {}, nullptr);
    cpu::BatchNormBackwardElemt({2}, shape, nullptr, nullptr, {zeros.data(), zeros.data(), zeros.data(), zeros.data()},
                                {}, nullptr, nullptr);
    for (const Doubles& v : {mean, m2, sum_dy, sum_dy_xmu}) EXPECT_EQ(v, zeros);
  }
}

TEST(CpuBatchNorm, NanStaysInItsChannel) {
  std::mt19937_64 rng(kSeed + 8);
  for (double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (TensorShape shape : Shapes()) {
      if (shape.size() == 0) continue;
      SCOPED_TRACE(Describe(shape));
      Case c = MakeCase(shape, 0, &rng);
      const Results good = RunAll(c, 1);
      const size_t at = rng() % c.size();
      const size_t channel = c.oracle().ChannelOf(at);
      c.x[at] = bad;
      const Results r = RunAll(c, 1);
      for (size_t i = 0; i < c.channels(); ++i) {
        if (i == channel) {
          EXPECT_FALSE(std::isfinite(r.mean[i]));
          EXPECT_FALSE(std::isfinite(r.m2[i]));
          EXPECT_FALSE(std::isfinite(r.sum_dy_xmu[0][i]));
        } else {
          EXPECT_EQ(r.mean[i], good.mean[i]);
          EXPECT_EQ(r.m2[i], good.m2[i]);
          EXPECT_EQ(r.sum_dy_xmu[0][i], good.sum_dy_xmu[0][i]);
        }
      }
      const Doubles y = ValuesOf(shape.type, r.y_relu);
      if (std::isnan(bad)) {
        EXPECT_TRUE(std::isnan(y[at]));
      }
      const Doubles before = ValuesOf(shape.type, good.y_relu);
      for (size_t i = 0; i < c.size(); ++i) {
        if (i == at) continue;
        ASSERT_EQ(y[i], before[i]);
      }
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace syncbn::kernels
