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
  // One loop for each vector, and no branch within: the compiler makes vectors of them.
  const auto update = [momentum](const std::vector<double>& from, std::vector<double>& running, auto observe) {
    const double* const observed = from.data();
    double* __restrict const to = running.data();
    for (size_t c = 0; c < running.size(); ++c) to[c] = kernels::UpdateRunning(to[c], observe(observed[c]), momentum);
  };
  update(forward.first, mean, [](double observed) { return observed; });
  if (!has_variance) return;
  update(forward.second, var,
         [&](double biased) { return kernels::RunningVariance(biased, forward.count, spec.biased_running_variance); });
}

}  // namespace syncbn::core
