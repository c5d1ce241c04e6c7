// The CPU's operations on problems that are drawn to break them: against the long-double oracle, on every instruction
// set with the same bits, and in memory beside pages that must not be touched.
//
// SYNCBN_HOSTILE_CASES and SYNCBN_HOSTILE_SEED choose how many problems there are, and which.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/plan.h"
#include "tests/kernels/cpu_cases.h"
#include "tests/kernels/guarded_memory.h"
#include "tests/kernels/hostile_cases.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels {
namespace {

using testing::Bytes;
using testing::Case;
using testing::Describe;
using testing::Doubles;
using testing::GuardedMemory;
using testing::HostileDraw;
using testing::OnTarget;
using testing::Put;
using testing::RangeOf;
using testing::Tensor;
using testing::TypeRange;

constexpr int kGates = 3;  // Open, by a mask, and computed again.

// Tells which parts the epilogue of a forward pass has.
struct Choices {
  bool residual, relu, mask;
};

struct Results {
  Doubles mean, m2;
  Doubles y, relu;  // As drawn, and with a ReLU alone.
  Bytes mask;
  Doubles sum_dy[kGates], sum_dy_xmu[kGates];
  Doubles dx[kGates], d_residual[kGates];
};

// Runs the operations in guarded memory.
class Runner {
 public:
  // `gap` bytes lie between each array and its guard; doubles have none.
  Runner(GuardedMemory* memory, const Case& c, const Choices& choices, int threads, size_t gap, bool at_end)
      : memory_(memory), case_(c), choices_(choices), context_{threads}, type_(c.shape.type) {
    memory_->Clear(gap, at_end);
    x_ = Copy(c.x);
    dy_ = Copy(c.dy);
    residual_ = Copy(c.residual);
    forward_ = {Copied(c.mean), Copied(c.scale), Copied(c.shift)};
    backward_ = {forward_.mean, forward_.scale, Copied(c.mean_dy), Copied(c.projection)};
    out_ = memory_->Bytes(c.size() * SizeOf(type_));
    d_residual_ = memory_->Bytes(c.size() * SizeOf(type_));
    mask_ = memory_->Bytes(ReluMaskBytes(c.shape.size()));
    first_ = memory_->Doubles(c.channels());
    second_ = memory_->Doubles(c.channels());
  }

  Results Run(const Bytes& gate_mask) {
    Results r;
    cpu::BatchNormStats(context_, case_.shape, x_, first_, second_);
    r.mean.assign(first_, first_ + case_.channels());
    r.m2.assign(second_, second_ + case_.channels());
    r.relu = Forward({nullptr, true, nullptr});
    r.y = Forward({choices_.residual ? residual_ : nullptr, choices_.relu, choices_.mask ? mask_ : nullptr});
    if (choices_.mask) r.mask.assign(mask_, mask_ + ReluMaskBytes(case_.shape.size()));
    std::copy(gate_mask.begin(), gate_mask.end(), mask_);
    const ReluGate gates[kGates] = {{}, {mask_, {}}, {nullptr, forward_}};
    for (int g = 0; g < kGates; ++g) Backward(gates[g], g, &r);
    return r;
  }

 private:
  uint8_t* Copy(const Doubles& values) {
    uint8_t* const to = memory_->Bytes(values.size() * SizeOf(type_));
    for (size_t i = 0; i < values.size(); ++i) Put(type_, values[i], to + i * SizeOf(type_));
    return to;
  }

  double* Copied(const Doubles& vector) {
    double* const to = memory_->Doubles(vector.size());
    std::copy(vector.begin(), vector.end(), to);
    return to;
  }

  Doubles ValuesAt(const uint8_t* from) const {
    Doubles values(case_.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = testing::Get(type_, from + i * SizeOf(type_));
    return values;
  }

  Doubles Forward(const Epilogue& epilogue) {
    cpu::BatchNormElemt(context_, case_.shape, x_, forward_, epilogue, out_);
    return ValuesAt(out_);
  }

  void Backward(const ReluGate& gate, int g, Results* r) {
    cpu::BatchNormBackwardReduce(context_, case_.shape, dy_, x_, forward_.mean, gate, first_, second_);
    r->sum_dy[g].assign(first_, first_ + case_.channels());
    r->sum_dy_xmu[g].assign(second_, second_ + case_.channels());
    cpu::BatchNormBackwardElemt(context_, case_.shape, dy_, x_, backward_, gate, out_, d_residual_);
    r->dx[g] = ValuesAt(out_);
    r->d_residual[g] = ValuesAt(d_residual_);
  }

  GuardedMemory* const memory_;
  const Case& case_;
  const Choices choices_;
  const cpu::Context context_;
  const DataType type_;
  uint8_t *x_, *dy_, *residual_, *out_, *d_residual_, *mask_;
  double *first_, *second_;
  ForwardCoefficients forward_;
  BackwardCoefficients backward_;
};

// Equal bits, or two NaN.
bool Same(const Doubles& a, const Doubles& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(double)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

void ExpectSame(const Results& a, const Results& b) {
  EXPECT_TRUE(Same(a.mean, b.mean));
  EXPECT_TRUE(Same(a.m2, b.m2));
  EXPECT_TRUE(Same(a.y, b.y));
  EXPECT_TRUE(Same(a.relu, b.relu));
  EXPECT_EQ(a.mask, b.mask);
  for (int g = 0; g < kGates; ++g) {
    EXPECT_TRUE(Same(a.sum_dy[g], b.sum_dy[g])) << g;
    EXPECT_TRUE(Same(a.sum_dy_xmu[g], b.sum_dy_xmu[g])) << g;
    EXPECT_TRUE(Same(a.dx[g], b.dx[g])) << g;
    EXPECT_TRUE(Same(a.d_residual[g], b.d_residual[g])) << g;
  }
}

// The sizes of an output's terms: those of products that are computed with x - mean and a factor, those that are
// computed with x and the mean apart, and the others; `values` are x and the mean. Factors beside float32 have 29 bits,
// and the 16-bit types' arithmetic 24.
struct Terms {
  double products, apart, others, factor, values;

  // Tells whether infinity may be on the way to a finite output, or a second one to an infinite output.
  bool Overflow(DataType type, bool finite) const {
    const double largest = SizeOf(type) == 2 ? 0x1p118 : 0x1p1000;
    const auto overflows = [&](double size) { return std::isfinite(size) ? size > largest : finite; };
    return overflows(products) || overflows(apart) || overflows(others) || (SizeOf(type) != 2 && overflows(values));
  }

  double Error(DataType type) const {
    const double sizes = products + others;
    if (type == DataType::kFloat64) return 0x1p-50 * sizes + 0x1p-1070 * (1 + factor);
    if (type == DataType::kFloat32) return 0x1p-28 * sizes + 0x1p-50 * (sizes + apart);
    return 0x1p-21 * sizes + 0x1p-45 * apart + 0x1p-148 * (1 + factor);
  }
};

// Expects `want`, rounded once to the type, but for the arithmetic's own roundings.
void ExpectRounded(DataType type, double got, long double want, const Terms& terms) {
  const TypeRange& range = RangeOf(type);
  if (std::isnan(want)) {
    ASSERT_TRUE(std::isnan(got)) << got;
    return;
  }
  if (std::isinf(want)) {
    ASSERT_FALSE(std::isfinite(got)) << got;
    if (terms.Overflow(type, false)) return;
    ASSERT_EQ(got, static_cast<double>(want));
    return;
  }
  if (terms.Overflow(type, true)) return;
  const double size = static_cast<double>(std::abs(want));
  const double bound = 0.5 * range.UlpAt(size) * (1 + 1e-9) + terms.Error(type);
  if (size + bound >= range.largest && std::isinf(got)) return;
  ASSERT_LE(static_cast<double>(std::abs(static_cast<long double>(got) - want)), bound)
      << "got " << got << " want " << static_cast<double>(want);
}

void CheckStats(const Case& c, const Results& r) {
  const syncbn::testing::OracleStats want = syncbn::testing::Stats(c.oracle(), c.x);
  const bool single = cpu::ReducesInFloat32(c.shape);
  const double rounding = !single ? 1e-12 : c.shape.type == DataType::kFloat32 ? 2e-8 : 5e-7;
  const double values = static_cast<double>(c.shape.values_per_channel());
  Doubles largest(c.channels());
  for (size_t i = 0; i < c.size(); ++i) {
    double& size = largest[c.oracle().ChannelOf(i)];
    size = std::isnan(c.x[i]) ? c.x[i] : std::max(size, std::abs(c.x[i]));
    if (std::isnan(size)) size = std::numeric_limits<double>::infinity();
  }
  for (size_t i = 0; i < c.channels(); ++i) {
    SCOPED_TRACE("channel " + std::to_string(i));
    if (std::isinf(largest[i])) {
      ASSERT_FALSE(std::isfinite(r.mean[i])) << r.mean[i];
      ASSERT_FALSE(std::isfinite(r.m2[i])) << r.m2[i];
      continue;
    }
    if (largest[i] > 1e150) continue;  // Squares are infinite.
    const double m2 = static_cast<double>(want.m2[i]);
    const double deviation = values == 0 ? 0 : std::sqrt(m2 / values);
    const double place = 0x1p-50 * largest[i];
    // A variance that is 0 in float32 may be 0.
    const double nothing = single && SizeOf(c.shape.type) == 2 ? values * 0x1p-149 : 1e-300;
    ASSERT_NEAR(r.mean[i], static_cast<double>(want.mean[i]), place + rounding * deviation + 0x1p-1070);
    ASSERT_NEAR(r.m2[i], m2, rounding * m2 + values * place * (deviation + place) + nothing);
  }
}

void CheckForward(const Case& c, const Choices& choices, const Results& r) {
  const DataType type = c.shape.type;
  const auto check = [&](const Doubles& got, const Doubles& residual, bool relu) {
    const syncbn::testing::Wide want =
        syncbn::testing::Forward(c.oracle(), c.x, c.mean, c.scale, c.shift, residual, relu);
    for (size_t i = 0; i < c.size(); ++i) {
      const size_t channel = c.oracle().ChannelOf(i);
      const double scale = std::abs(c.scale[channel]);
      const double added = residual.empty() ? 0 : std::abs(residual[i]);
      const double values = std::abs(c.x[i]) + std::abs(c.mean[channel]);
      const Terms terms = {std::abs(c.x[i] - c.mean[channel]) * scale, values * scale,
                           std::abs(c.shift[channel]) + added, scale, values};
      SCOPED_TRACE("element " + std::to_string(i));
      ASSERT_NO_FATAL_FAILURE(ExpectRounded(type, got[i], want[i], terms));
    }
  };
  ASSERT_NO_FATAL_FAILURE(check(r.relu, {}, true));
  ASSERT_NO_FATAL_FAILURE(check(r.y, choices.residual ? c.residual : Doubles(), choices.relu));
  for (size_t i = 0; i < 8 * r.mask.size(); ++i) {
    ASSERT_EQ((r.mask[i / 8] >> (i % 8) & 1) != 0, i < c.size() && r.y[i] > 0) << i;
  }
}

void CheckSums(const Case& c, const Doubles& sum_dy, const Doubles& sum_dy_xmu, const std::vector<bool>& open) {
  const syncbn::testing::OracleSums want = syncbn::testing::BackwardReduce(c.oracle(), c.dy, c.x, c.mean, open);
  const bool single = cpu::ReducesInFloat32(c.shape);
  const double tolerance = single ? 5e-7 : 1e-13;
  // Terms that are 0 in float32 may be 0.
  const double nothing = single ? static_cast<double>(c.shape.values_per_channel()) * 0x1p-149 : 0x1p-1040;
  const auto check = [&](double got, long double sum, long double magnitude) {
    if (!std::isfinite(sum)) {
      ASSERT_FALSE(std::isfinite(got)) << got;
    } else if (magnitude < 0x1p1000L) {
      ASSERT_NEAR(got, static_cast<double>(sum), tolerance * static_cast<double>(magnitude) + nothing);
    }
  };
  for (size_t i = 0; i < c.channels(); ++i) {
    SCOPED_TRACE("channel " + std::to_string(i));
    ASSERT_NO_FATAL_FAILURE(check(sum_dy[i], want.sum_dy[i], want.magnitude_dy[i]));
    ASSERT_NO_FATAL_FAILURE(check(sum_dy_xmu[i], want.sum_dy_xmu[i], want.magnitude_dy_xmu[i]));
  }
}

void CheckGradients(const Case& c, const Doubles& dx, const Doubles& d_residual, const std::vector<bool>& open) {
  const syncbn::testing::Wide want =
      syncbn::testing::Backward(c.oracle(), c.dy, c.x, c.mean, c.scale, c.mean_dy, c.projection, open);
  for (size_t i = 0; i < c.size(); ++i) {
    SCOPED_TRACE("element " + std::to_string(i));
    const size_t channel = c.oracle().ChannelOf(i);
    const double dy = open[i] ? c.dy[i] : 0;
    const double scale = std::abs(c.scale[channel]), slope = scale * std::abs(c.projection[channel]);
    const double values = std::abs(c.x[i]) + std::abs(c.mean[channel]);
    const Terms terms = {std::abs(c.x[i] - c.mean[channel]) * slope, values * slope,
                         (std::abs(dy) + std::abs(c.mean_dy[channel])) * scale, scale, values};
    ASSERT_NO_FATAL_FAILURE(ExpectRounded(c.shape.type, dx[i], want[i], terms));
    ASSERT_TRUE(d_residual[i] == dy || (std::isnan(d_residual[i]) && std::isnan(dy))) << d_residual[i];
  }
}

void CheckBackward(const Case& c, const Results& r, const Bytes& gate_mask) {
  std::vector<bool> open[kGates];
  for (size_t i = 0; i < c.size(); ++i) {
    open[0].push_back(true);
    open[1].push_back((gate_mask[i / 8] >> (i % 8) & 1) != 0);
    open[2].push_back(r.relu[i] > 0);  // A gate rounds as the forward pass did.
  }
  for (int g = 0; g < kGates; ++g) {
    SCOPED_TRACE("gate " + std::to_string(g));
    ASSERT_NO_FATAL_FAILURE(CheckSums(c, r.sum_dy[g], r.sum_dy_xmu[g], open[g]));
    ASSERT_NO_FATAL_FAILURE(CheckGradients(c, r.dx[g], r.d_residual[g], open[g]));
  }
}

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

TEST(CpuHostile, MatchesTheOracleOnEveryInstructionSet) {
  const uint64_t cases = FromEnvironment("SYNCBN_HOSTILE_CASES", 600);
  const uint64_t seed = FromEnvironment("SYNCBN_HOSTILE_SEED", 1);
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  GuardedMemory memory(size_t{9} * 70 * 70 * sizeof(double) + 16);
  for (uint64_t i = 0; i < cases; ++i) {
    HostileDraw draw(seed + i);
    const Case c = draw.MakeHostileCase();
    const bool relu = draw.OneIn(2);
    const Choices choices = {draw.OneIn(2), relu, relu && draw.OneIn(2)};
    Bytes gate_mask(ReluMaskBytes(c.shape.size()));
    for (uint8_t& byte : gate_mask) byte = static_cast<uint8_t>(draw.Below(256));
    SCOPED_TRACE(Describe(c.shape) + ", SYNCBN_HOSTILE_SEED=" + std::to_string(seed + i));
    const auto run = [&] {
      const int threads = static_cast<int>(1 + draw.Below(3));
      const size_t gap = static_cast<size_t>(draw.Below(9));
      return Runner(&memory, c, choices, threads, gap, draw.OneIn(2)).Run(gate_mask);
    };
    const Results native = run();
    ASSERT_NO_FATAL_FAILURE(CheckStats(c, native));
    ASSERT_NO_FATAL_FAILURE(CheckForward(c, choices, native));
    ASSERT_NO_FATAL_FAILURE(CheckBackward(c, native, gate_mask));
    for (int64_t target : targets) {
      SCOPED_TRACE(hwy::TargetName(target));
      const OnTarget on_target(target);
      ExpectSame(native, run());
    }
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace syncbn::kernels
