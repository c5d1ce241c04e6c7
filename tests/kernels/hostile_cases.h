// Random problems that are drawn to break the CPU's operations: small extents of every kind, and values at the ends of
// a type's range, or far from 0, or not numbers, beside channels of ordinary ones.

#ifndef SYNCBN_TESTS_KERNELS_HOSTILE_CASES_H_
#define SYNCBN_TESTS_KERNELS_HOSTILE_CASES_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/batch_norm.h"
#include "tests/kernels/cpu_cases.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels::testing {

// The ends of a type's range.
struct TypeRange {
  int fraction_bits, min_exponent;
  double largest;

  double smallest() const { return std::ldexp(1.0, min_exponent - fraction_bits); }

  // Returns the distance between neighbours of a value.
  double UlpAt(double value) const {
    const int exponent = value == 0 || !std::isfinite(value) ? min_exponent : std::max(std::ilogb(value), min_exponent);
    return std::ldexp(1.0, exponent - fraction_bits);
  }
};

inline const TypeRange& RangeOf(DataType type) {
  static const TypeRange ranges[] = {{23, -126, std::numeric_limits<float>::max()},
                                     {52, -1022, std::numeric_limits<double>::max()},
                                     {10, -14, 65504.0},
                                     {7, -126, 0x1.FEp127}};
  return ranges[static_cast<int>(type)];
}

class HostileDraw {
 public:
  explicit HostileDraw(uint64_t seed) : rng_(seed) {}

  int64_t Below(int64_t n) { return static_cast<int64_t>(rng_() % static_cast<uint64_t>(n)); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  double Normal() { return normal_(rng_); }
  double Sign() { return OneIn(2) ? -1 : 1; }

  TensorShape Shape() {
    const int64_t few = OneIn(3) ? 9 : 71;
    return {Below(10), 1 + Below(70), 1 + Below(few), kTypes[Below(4)],
            OneIn(2) ? Layout::kChannelsFirst : Layout::kChannelsLast};
  }

  // Returns one of the kinds of channels; ordinary ones are as frequent as all others.
  int Kind() { return OneIn(2) ? 0 : static_cast<int>(1 + Below(kKinds - 1)); }

  // Returns values of a tensor, whose channels are all of one kind or each of its own.
  Doubles Values(const TensorShape& shape, const syncbn::testing::OracleShape& oracle) {
    const bool mixed = OneIn(2);
    const int all = Kind();
    std::vector<Channel> channels;
    for (size_t i = 0; i < oracle.channels; ++i) channels.push_back(MakeChannel(shape.type, mixed ? Kind() : all));
    Doubles values(oracle.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = Value(&channels[oracle.ChannelOf(i)]);
    if (!values.empty() && OneIn(4)) {
      const double bad[] = {std::nan(""), std::numeric_limits<double>::infinity(),
                            -std::numeric_limits<double>::infinity()};
      values[static_cast<size_t>(Below(static_cast<int64_t>(values.size())))] = bad[Below(3)];
    }
    return Tensor(shape.type, values).values();
  }

  Case MakeHostileCase() {
    Case c;
    c.shape = Shape();
    const syncbn::testing::OracleShape oracle = c.oracle();
    c.x = Values(c.shape, oracle);
    c.dy = Values(c.shape, oracle);
    c.residual = Values(c.shape, oracle);
    const syncbn::testing::OracleStats stats = syncbn::testing::Stats(oracle, c.x);
    const double values = static_cast<double>(std::max<int64_t>(1, c.shape.values_per_channel()));
    for (size_t i = 0; i < c.channels(); ++i) AddCoefficients(stats, i, values, &c);
    for (size_t i = 0; i < c.size(); ++i) {
      // Outputs that are rounding errors alone.
      const size_t channel = oracle.ChannelOf(i);
      const double shift = -(c.x[i] - c.mean[channel]) * c.scale[channel];
      if (OneIn(1000) && std::isfinite(shift)) c.shift[channel] = shift;
    }
    return c;
  }

 private:
  static constexpr int kKinds = 10;

  struct Channel {
    int kind;
    double mean, deviation;
    bool begun;
  };

  Channel MakeChannel(DataType type, int kind) {
    const TypeRange& range = RangeOf(type);
    const double scale = std::exp2(static_cast<double>(Below(21) - 10));
    switch (kind) {
      case 1:  // A mean of up to 1e4 deviations.
        return {kind, scale * std::pow(10.0, static_cast<double>(1 + Below(4))) * Sign(), scale, false};
      case 2:  // Near the largest number.
        return {kind, OneIn(2) ? 0 : 0.7 * range.largest * Sign(), 0.1 * range.largest, false};
      case 3:  // Subnormal numbers.
        return {kind, 0, 20 * range.smallest(), false};
      case 4:  // Near the smallest normal number.
        return {kind, 0, std::ldexp(4.0, range.min_exponent), false};
      case 5:  // One value.
        return {kind, Normal() * scale, 0, false};
      case 6:  // An outlier that comes first.
      case 7:  // Few distinct values.
      case 8:  // Zeros of either sign.
        return {kind, 0, scale, false};
      case 9:  // Squares that float32 does not hold, or numbers whose squares it loses.
        return {kind, 0, std::exp2(static_cast<double>(Below(200) - 100)), false};
      default:
        return {0, Normal() * scale, scale, false};
    }
  }

  double Value(Channel* channel) {
    const bool first = !channel->begun;
    channel->begun = true;
    if (channel->kind == 6 && first) return 1e4 * channel->deviation * Sign();
    if (channel->kind == 7) return channel->deviation * static_cast<double>(Below(4));
    if (channel->kind == 8) return 0 * Sign();
    return channel->mean + channel->deviation * Normal();
  }

  void AddCoefficients(const syncbn::testing::OracleStats& stats, size_t channel, double values, Case* c) {
    const double mean = static_cast<double>(stats.mean[channel]);
    const double deviation = std::sqrt(static_cast<double>(stats.m2[channel]) / values);
    const bool usable = std::isfinite(deviation) && deviation > 0;
    const double per_deviation = usable ? 1 / deviation : 1;
    c->mean.push_back(std::isfinite(mean) ? mean + (OneIn(4) && usable ? deviation * Normal() : 0) : Normal());
    c->scale.push_back(OneIn(20) ? 0 : Normal() * std::fmin(per_deviation, OneIn(2) ? 1e3 : 1e30));
    c->shift.push_back(OneIn(3) ? 0 : Normal());
    c->mean_dy.push_back(OneIn(3) ? 0 : Normal());
    c->projection.push_back(OneIn(3) ? 0 : Normal() * std::fmin(per_deviation, 1e30));
  }

  std::mt19937_64 rng_;
  std::normal_distribution<double> normal_;
};

}  // namespace syncbn::kernels::testing

#endif  // SYNCBN_TESTS_KERNELS_HOSTILE_CASES_H_
