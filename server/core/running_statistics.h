// A layer's running mean and variance as the master keeps them, for inspection and for workers that begin again.

#ifndef SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_
#define SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_

#include <cstdint>
#include <vector>

#include "server/core/types.h"

namespace syncbn::core {

// From mean 0 and variance 1, one update for each forward round that completed with count > 0:
// running <- (1 - momentum) * running + momentum * observed. Without momentum: the average of all updates.
struct RunningStatistics {
  std::vector<double> mean;
  std::vector<double> var;
  uint64_t updates = 0;

  // The variance that goes in is M2/(N-1), or M2/N if the layer says so; at count 1 the former has no value and the
  // running variance stays.
  void Update(const LayerSpec& spec, const RoundOutcome& forward);
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_
