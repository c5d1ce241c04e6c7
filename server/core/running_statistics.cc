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
  const kernels::RunningUpdate update(forward.count, momentum, spec.biased_running_variance);
  // One loop for each vector, without a branch inside, so that the compiler vectorizes them.
  const auto each = [](const std::vector<double>& from, std::vector<double>& running, auto blend) {
    const double* const observed = from.data();
    double* __restrict const to = running.data();
    for (size_t c = 0; c < running.size(); ++c) to[c] = blend(to[c], observed[c]);
  };
  each(forward.first, mean, [&update](double running, double observed) { return update.Mean(running, observed); });
  if (!update.moves_var()) return;
  each(forward.second, var, [&update](double running, double observed) { return update.Var(running, observed); });
}

}  // namespace syncbn::core
