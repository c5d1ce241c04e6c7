// The formulas of batch normalization for one channel, in float64, for host and device.

#ifndef SYNCBN_KERNELS_COEFFICIENTS_H_
#define SYNCBN_KERNELS_COEFFICIENTS_H_

#include <cmath>
#include <cstdint>

#include "kernels/eps_mode.h"
#include "kernels/host_device.h"

namespace syncbn::kernels {

// `var` is the biased variance. A NaN variance gives NaN in both modes.
SYNCBN_HOST_DEVICE inline double InverseStd(double var, double eps, EpsMode mode) {
  if (mode == EpsMode::kAdd) return 1.0 / sqrt(var + eps);
  return 1.0 / sqrt(var < eps ? eps : var);
}

// The factor of (x - mean) in dx / (weight * invstd): invstd^2 * sum_dy_xmu / N, and 0 where the clamp holds the
// variance fixed, since the output then no longer depends on it. `count` is the global one; 0 gives 0.
SYNCBN_HOST_DEVICE inline double Projection(double sum_dy_xmu, int64_t count, double var, double eps, EpsMode mode) {
  if (count == 0 || (mode == EpsMode::kClamp && var < eps)) return 0.0;
  const double invstd = InverseStd(var, eps, mode);
  return invstd * invstd * (sum_dy_xmu / static_cast<double>(count));
}

// The update of running statistics by one round, the same for all channels:
//   running <- (1 - momentum) * running + momentum * observed, as torch weighs them.
// The observed variance is M2/(N-1), or M2/N if `biased`.
class RunningUpdate {
 public:
  // `count`: the round's values in each channel, over all workers.
  SYNCBN_HOST_DEVICE RunningUpdate(int64_t count, double momentum, bool biased)
      : moves_mean_(count > 0), moves_var_(count > 1 || (biased && count == 1)), momentum_(momentum) {
    const double n = static_cast<double>(count);
    if (moves_var_ && !biased) correction_ = n / (n - 1.0);
  }

  // False for a round without values, which leaves running statistics as they are.
  SYNCBN_HOST_DEVICE bool moves_mean() const { return moves_mean_; }
  // False for such a round, and where the unbiased variance of a single value would be needed.
  SYNCBN_HOST_DEVICE bool moves_var() const { return moves_var_; }

  // The running statistics after the round. `var` is the round's biased variance.
  SYNCBN_HOST_DEVICE double Mean(double running, double mean) const { return Blend(running, mean); }
  SYNCBN_HOST_DEVICE double Var(double running, double var) const { return Blend(running, var * correction_); }

 private:
  SYNCBN_HOST_DEVICE double Blend(double running, double observed) const {
    return (1.0 - momentum_) * running + momentum_ * observed;
  }

  bool moves_mean_;
  bool moves_var_;
  double momentum_;
  double correction_ = 1.0;  // From the biased variance to the observed one.
};

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_COEFFICIENTS_H_
