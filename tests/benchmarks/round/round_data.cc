#include "tests/benchmarks/round/round_data.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace syncbn::benchmarks {
namespace {

int64_t CountOf(uint32_t rank) { return rank + 1; }
double MeanOf(uint32_t rank, uint64_t variant, uint32_t channel) { return rank + 3.0 * variant + 0.25 * channel; }
double M2Of(uint32_t rank, uint64_t variant, uint32_t channel) { return (rank + 1.0) * (1.0 + variant + channel % 5); }

bool Near(absl::Span<const double> a, const std::vector<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](double x, double y) { return std::abs(x - y) <= 1e-12 * std::max(1.0, std::abs(y)); });
}

}  // namespace

RoundData::RoundData(uint32_t world_size, uint32_t rank, uint32_t channels) : own_(kVariants), expected_(kVariants) {
  for (uint64_t v = 0; v < kVariants; ++v) {
    own_[v].count = CountOf(rank);
    for (uint32_t r = 0; r < world_size; ++r) expected_[v].count += CountOf(r);
    for (uint32_t c = 0; c < channels; ++c) {
      own_[v].mean.push_back(MeanOf(rank, v, c));
      own_[v].m2.push_back(M2Of(rank, v, c));
      // From the definition, in two passes.
      const double n = static_cast<double>(expected_[v].count);
      double mean = 0.0;
      for (uint32_t r = 0; r < world_size; ++r) mean += CountOf(r) / n * MeanOf(r, v, c);
      double var = 0.0;
      for (uint32_t r = 0; r < world_size; ++r) {
        var += (M2Of(r, v, c) + CountOf(r) * std::pow(MeanOf(r, v, c) - mean, 2)) / n;
      }
      expected_[v].mean.push_back(mean);
      expected_[v].var.push_back(var);
    }
  }
}

bool RoundData::Matches(uint64_t round, const MergedView& result) const {
  const Expected& expected = expected_[round % kVariants];
  return result.count == expected.count && Near(result.mean, expected.mean) && Near(result.var, expected.var);
}

}  // namespace syncbn::benchmarks
