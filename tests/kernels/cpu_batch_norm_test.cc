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

// Before Highway, whose targets it limits.
// clang-format off
#include "kernels/cpu/targets.h"
// clang-format on

#include "hwy/highway.h"
#include "kernels/cpu/batch_norm.h"
#include "kernels/half.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels {
namespace {

using Bytes = std::vector<uint8_t>;
using Doubles = std::vector<double>;

constexpr uint64_t kSeed = 4242;
constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16};

void Put(DataType type, double value, uint8_t* to) {
  const float single = static_cast<float>(value);
  const uint16_t half = type == DataType::kFloat16 ? Float16FromDouble(value) : BFloat16FromDouble(value);
  if (type == DataType::kFloat64) {
    std::memcpy(to, &value, 8);
  } else if (type == DataType::kFloat32) {
    std::memcpy(to, &single, 4);
  } else {
    std::memcpy(to, &half, 2);
  }
}

double Get(DataType type, const uint8_t* from) {
  if (type == DataType::kFloat64) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (type == DataType::kFloat32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  return type == DataType::kFloat16 ? Float16ToDouble(half) : BFloat16ToDouble(half);
}

// A tensor's bytes, `offset` past an address that malloc aligned.
class Tensor {
 public:
  Tensor(DataType type, size_t size, size_t offset = 0)
      : type_(type), offset_(offset), bytes_(size * Width() + offset) {}
  Tensor(DataType type, const Doubles& values, size_t offset = 0) : Tensor(type, values.size(), offset) {
    for (size_t i = 0; i < values.size(); ++i) Put(type, values[i], data() + i * Width());
  }

  uint8_t* data() { return bytes_.data() + offset_; }
  const uint8_t* data() const { return bytes_.data() + offset_; }
  size_t size() const { return (bytes_.size() - offset_) / Width(); }
  Bytes content() const { return Bytes(bytes_.begin() + static_cast<std::ptrdiff_t>(offset_), bytes_.end()); }

  Doubles values() const {
    Doubles values(size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = Get(type_, data() + i * Width());
    return values;
  }

 private:
  size_t Width() const { return SizeOf(type_); }

  DataType type_;
  size_t offset_;
  Bytes bytes_;
};

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

// `got` is `want` rounded once, but for a few roundings in float64 of numbers up to about a hundred.
void ExpectRounded(DataType type, const Doubles& got, const testing::Wide& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = static_cast<double>(std::abs(static_cast<long double>(got[i]) - want[i]));
    const double bound = 0.5 * Ulp(type, static_cast<double>(want[i])) * (1 + 1e-12) + 2e-13;
    ASSERT_LE(error, bound) << "element " << i << " got " << got[i] << " want " << static_cast<double>(want[i]);
  }
}

// One random problem: a shape and everything that the operations read.
struct Case {
  TensorShape shape;
  Doubles x, dy, residual;  // Exactly representable in the type.
  Doubles mean, scale, shift, mean_dy, projection;

  testing::OracleShape oracle() const {
    return {static_cast<size_t>(shape.batch), static_cast<size_t>(shape.channels), static_cast<size_t>(shape.spatial),
            shape.layout == Layout::kChannelsLast};
  }
  ForwardCoefficients forward() const { return {mean.data(), scale.data(), shift.data()}; }
  BackwardCoefficients backward() const { return {mean.data(), scale.data(), mean_dy.data(), projection.data()}; }
  size_t channels() const { return static_cast<size_t>(shape.channels); }
  size_t size() const { return static_cast<size_t>(shape.size()); }
};

std::string Describe(const TensorShape& s) {
  const char* const types[] = {"float32", "float64", "float16", "bfloat16"};
  return std::to_string(s.batch) + "x" + std::to_string(s.channels) + "x" + std::to_string(s.spatial) + " " +
         types[static_cast<int>(s.type)] + (s.layout == Layout::kChannelsLast ? " channels last" : " channels first") +
         ", seed " + std::to_string(kSeed);
}

Doubles Draw(std::mt19937_64* rng, size_t size, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  Doubles values(size);
  for (double& v : values) v = normal(*rng);
  return values;
}

Doubles DrawTensor(std::mt19937_64* rng, const TensorShape& shape, double mean) {
  return Tensor(shape.type, Draw(rng, static_cast<size_t>(shape.size()), mean, 1.0)).values();
}

Case MakeCase(const TensorShape& shape, double mean, std::mt19937_64* rng) {
  Case c;
  c.shape = shape;
  c.x = DrawTensor(rng, shape, mean);
  c.dy = DrawTensor(rng, shape, 0.1);
  c.residual = DrawTensor(rng, shape, 0);
  c.mean = Draw(rng, c.channels(), mean, 0.1);
  c.scale = Draw(rng, c.channels(), 0, 2);
  c.shift = Draw(rng, c.channels(), 0, 1);
  c.mean_dy = Draw(rng, c.channels(), 0, 0.1);
  c.projection = Draw(rng, c.channels(), 0, 0.1);
  return c;
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

void CheckStats(const Case& c, const Results& r) {
  const testing::OracleStats want = testing::Stats(c.oracle(), c.x);
  for (size_t i = 0; i < c.channels(); ++i) {
    const double mean = static_cast<double>(want.mean[i]);
    const double m2 = static_cast<double>(want.m2[i]);
    ASSERT_NEAR(r.mean[i], mean, 1e-13 * (1 + std::abs(mean)));
    ASSERT_NEAR(r.m2[i], m2, 1e-9 * m2 + 1e-20 * mean * mean) << "channel " << i;
  }
}

// Also returns where the gate of the masked output is open.
std::vector<bool> CheckForward(const Case& c, const Results& r) {
  const DataType type = c.shape.type;
  const auto want = [&](const Doubles& residual, bool relu) {
    return testing::Forward(c.oracle(), c.x, c.mean, c.scale, c.shift, residual, relu);
  };
  ExpectRounded(type, ValuesOf(type, r.y), want({}, false));
  ExpectRounded(type, ValuesOf(type, r.y_relu), want({}, true));
  const Doubles masked = ValuesOf(type, r.y_masked);
  ExpectRounded(type, masked, want(c.residual, true));
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
  const testing::OracleSums sums = testing::BackwardReduce(c.oracle(), c.dy, c.x, c.mean, open);
  for (size_t i = 0; i < c.channels(); ++i) {
    ASSERT_NEAR(r.sum_dy[g][i], static_cast<double>(sums.sum_dy[i]), 1e-13 * static_cast<double>(sums.magnitude_dy[i]));
    ASSERT_NEAR(r.sum_dy_xmu[g][i], static_cast<double>(sums.sum_dy_xmu[i]),
                1e-13 * static_cast<double>(sums.magnitude_dy_xmu[i]));
  }
  ExpectRounded(type, ValuesOf(type, r.dx[g]),
                testing::Backward(c.oracle(), c.dy, c.x, c.mean, c.scale, c.mean_dy, c.projection, open));
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

// Runs everything on one instruction set only, while it lives.
class OnTarget {
 public:
  explicit OnTarget(int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  ~OnTarget() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

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
        const testing::OracleStats want = testing::Stats(c.oracle(), values);
        for (size_t i = 0; i < 4; ++i) {
          EXPECT_NEAR(m2[i] / static_cast<double>(want.m2[i]), 1.0, 1e-6) << ratio << " seed " << kSeed;
          EXPECT_NEAR(mean[i], static_cast<double>(want.mean[i]), 1e-12 * ratio);
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

// Identity coefficients over float64 cannot change the type, so rounding is seen through the residual: x is exact in
// the type, the scale carries it to where it must be rounded.
void CheckScaled(DataType type, const Doubles& x, double scale, double shift) {
  const TensorShape shape = {1, 1, static_cast<int64_t>(x.size()), type, Layout::kChannelsFirst};
  const double zero = 0;
  Tensor y(type, x.size());
  cpu::BatchNormElemt({1}, shape, Tensor(type, x).data(), {&zero, &scale, &shift}, {}, y.data());
  const Doubles got = y.values();
  for (size_t i = 0; i < x.size(); ++i) {
    uint8_t bytes[8];
    Put(type, x[i] * scale + shift, bytes);
    const double want = Get(type, bytes);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got[i]));
    } else {
      ASSERT_EQ(got[i], want) << x[i] << " * " << scale << " + " << shift;
      ASSERT_EQ(std::signbit(got[i]), std::signbit(want)) << x[i] << " * " << scale << " + " << shift;
    }
  }
}

TEST(CpuBatchNorm, HalfTypesRoundOnceToNearestEven) {
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
      // Half of everything meets the ties of the subnormals; 1 + 2^-11 or 2^-8 those of the normal numbers. A nudge of
      // 2^-40 on top of a tie is lost if float32 comes in between.
      for (double tie : {0.5, 0.25, 0.75, 1 + 0x1p-11, 1 + 0x1p-8, 1 + 0x1p-9, 1.5}) {
        for (double nudge : {0.0, 0x1p-40, -0x1p-40}) CheckScaled(type, all, tie * (1 + nudge), -0.0);
      }
      CheckScaled(type, all, 1e30, -0.0);
      CheckScaled(type, all, 1e300, -0.0);
      CheckScaled(type, all, -1e-300, -0.0);
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace syncbn::kernels
