// Counts of a group's rounds and contributions by their result, since the group began.

#ifndef SYNCBN_SERVER_CORE_ROUND_STATISTICS_H_
#define SYNCBN_SERVER_CORE_ROUND_STATISTICS_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "server/core/duration_histogram.h"
#include "server/core/types.h"

namespace syncbn::core {

// Counts by reason. Reasons are those of error.h, which are few.
class ReasonCounts {
 public:
  void Add(const char* reason) {
    for (auto& [known, count] : counts_) {
      if (std::strcmp(known, reason) == 0) {
        ++count;
        return;
      }
    }
    counts_.push_back({reason, 1});
  }

  // In the order of their first occurrence.
  const std::vector<std::pair<const char*, uint64_t>>& counts() const { return counts_; }

 private:
  std::vector<std::pair<const char*, uint64_t>> counts_;
};

// The rounds of one phase.
struct PhaseStatistics {
  DurationHistogram durations;  // Completed rounds.
  ReasonCounts failed;
};

struct RoundStatistics {
  std::array<PhaseStatistics, 3> phases;  // By phase.
  uint64_t accepted = 0;                  // Contributions that counted.
  uint64_t repeated = 0;                  // Those that a round in flight held already.
  uint64_t replayed = 0;                  // Those that were answered with the outcome of an ended round.
  ReasonCounts rejected;                  // Contributions that were answered with an error of their own.

  PhaseStatistics& of(Phase phase) { return phases[static_cast<size_t>(phase) - 1]; }
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_ROUND_STATISTICS_H_
