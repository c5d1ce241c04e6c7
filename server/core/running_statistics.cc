#include "server/core/running_statistics.h"

#include "kernels/coefficients.h"

namespace syncbn::core {

void RunningStatistics::Update(const LayerSpec& spec, const RoundOutcome& forward) {
  if (forward.count == 0) return;
  if (mean.empty()) {
    mean.assign(spec.channels, 0.0);
    var.assign(spec.channels, 1.0);
  }
  ++updates;
  const double momentum = spec.momentum.value_or(1.0 / static_cast<double>(updates));
  const bool has_variance = forward.count > 1 || spec.biased_running_variance;
  for (uint32_t c = 0; c < spec.channels; ++c) {
    mean[c] = kernels::UpdateRunning(mean[c], forward.first[c], momentum);
    if (!has_variance) continue;
    const double observed = kernels::RunningVariance(forward.second[c], forward.count, spec.biased_running_variance);
    var[c] = kernels::UpdateRunning(var[c], observed, momentum);
  }
}

}  // namespace syncbn::core
