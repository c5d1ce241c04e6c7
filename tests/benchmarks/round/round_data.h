// The contributions of the round benchmark's workers, and the expected results.

#ifndef SYNCBN_TESTS_BENCHMARKS_ROUND_ROUND_DATA_H_
#define SYNCBN_TESTS_BENCHMARKS_ROUND_ROUND_DATA_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace syncbn::benchmarks {

struct Contribution {
  int64_t count = 0;
  std::vector<double> mean;
  std::vector<double> m2;
};

struct MergedView {
  int64_t count = 0;
  absl::Span<const double> mean;
  absl::Span<const double> var;
};

// Contributions that differ from rank to rank, from channel to channel, and from one round to the next (they repeat
// after kVariants rounds). A mix-up of any of these shows in the result.
class RoundData {
 public:
  static constexpr uint64_t kVariants = 4;

  RoundData(uint32_t world_size, uint32_t rank, uint32_t channels);

  const Contribution& own(uint64_t round) const { return own_[round % kVariants]; }
  // True if `result` equals the merged contributions of all ranks to this round, within rounding.
  bool Matches(uint64_t round, const MergedView& result) const;

 private:
  struct Expected {
    int64_t count = 0;
    std::vector<double> mean, var;
  };

  std::vector<Contribution> own_;
  std::vector<Expected> expected_;
};

}  // namespace syncbn::benchmarks

#endif  // SYNCBN_TESTS_BENCHMARKS_ROUND_ROUND_DATA_H_
