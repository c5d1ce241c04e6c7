// What a normalization multiplies and adds, from merged statistics: one channel at a time, in float64, on host and
// device.

#ifndef SYNCBN_KERNELS_COEFFICIENTS_H_
#define SYNCBN_KERNELS_COEFFICIENTS_H_

#include <cmath>
#include <cstdint>

#include "kernels/moments.h"

namespace syncbn::kernels {

// How epsilon keeps the inverse standard deviation finite.
enum class EpsMode : uint8_t {
  kAdd = 0,    // 1/sqrt(var + eps), as torch has it.
  kClamp = 1,  // 1/sqrt(max(var, eps)), as Synchronized-BatchNorm-PyTorch has it.
};

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

// running <- (1 - momentum) * running + momentum * observed, as torch weighs them.
SYNCBN_HOST_DEVICE inline double UpdateRunning(double running, double observed, double momentum) {
  return (1.0 - momentum) * running + momentum * observed;
}

// The variance that the running one is fed with: M2/(N-1), or M2/N if biased. Has no value for count == 1 unbiased (the
// caller then leaves the running variance as it is), nor for count == 0.
SYNCBN_HOST_DEVICE inline double RunningVariance(double biased_var, int64_t count, bool biased) {
  if (biased) return biased_var;
  const double n = static_cast<double>(count);
  return biased_var * (n / (n - 1.0));
}

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_COEFFICIENTS_H_
