// The moments of a set of numbers, and the merge of two of them. For host and device.

#ifndef SYNCBN_KERNELS_MOMENTS_H_
#define SYNCBN_KERNELS_MOMENTS_H_

#include <cstdint>

#include "kernels/host_device.h"

namespace syncbn {

// The count, mean and sum of squared deviations from the mean of a set of numbers. `count` == 0 is the empty set, whose
// mean and m2 are 0. Sums of x and of x*x would be simpler and useless: at |mean|/std = 1000 they lose the variance.
struct Moments {
  int64_t count = 0;
  double mean = 0.0;
  double m2 = 0.0;
};

// The weights of the second of two sets: for the mean of their union, and for the contribution of the means' distance
// to its m2. They follow from the counts alone, so merging many channels of the same two sets divides once.
struct MergeWeights {
  double mean = 0.0;
  double m2 = 0.0;
};

// Neither count may be 0.
SYNCBN_HOST_DEVICE inline MergeWeights WeightsOf(double count_a, double count_b) {
  MergeWeights weights;
  weights.mean = count_b / (count_a + count_b);
  weights.m2 = count_a * weights.mean;
  return weights;
}
SYNCBN_HOST_DEVICE inline MergeWeights WeightsOf(int64_t count_a, int64_t count_b) {
  return WeightsOf(static_cast<double>(count_a), static_cast<double>(count_b));
}

// Merges a second set into the first, whose mean and m2 are overwritten.
SYNCBN_HOST_DEVICE inline void MergeInto(const MergeWeights& weights, double mean_b, double m2_b, double& mean,
                                         double& m2) {
  const double delta = mean_b - mean;
  mean = mean + delta * weights.mean;
  m2 = m2 + m2_b + delta * delta * weights.m2;
}

// The moments of the union of two disjoint sets (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm
// for computing sample variances", 1979). The empty set is the identity, bit for bit. Not associative in the last bit,
// so equal results need a fixed order.
SYNCBN_HOST_DEVICE inline Moments Merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  Moments merged = a;
  merged.count = a.count + b.count;
  MergeInto(WeightsOf(a.count, b.count), b.mean, b.m2, merged.mean, merged.m2);
  return merged;
}

// Sums of `count` numbers about a pivot that is close to all of them: sum of (x - pivot), and of its square. Adding to
// them is cheap; a pivot near the mean keeps the squares from cancelling.
struct ShiftedSums {
  int64_t count = 0;
  double pivot = 0.0;
  double sum = 0.0;
  double sum_squares = 0.0;
};

// The same sums about another pivot.
SYNCBN_HOST_DEVICE inline ShiftedSums Rebase(const ShiftedSums& sums, double pivot) {
  const double n = static_cast<double>(sums.count);
  const double d = sums.pivot - pivot;
  ShiftedSums rebased;
  rebased.count = sums.count;
  rebased.pivot = pivot;
  rebased.sum = sums.sum + n * d;
  rebased.sum_squares = sums.sum_squares + d * (2.0 * sums.sum + n * d);
  return rebased;
}

// The moments of the numbers behind the sums. Rounding can take m2 below zero only where it is zero, so 0 is the floor.
SYNCBN_HOST_DEVICE inline Moments ToMoments(const ShiftedSums& sums) {
  Moments moments;
  if (sums.count == 0) return moments;
  const double shift = sums.sum / static_cast<double>(sums.count);
  const double m2 = sums.sum_squares - sums.sum * shift;
  moments.count = sums.count;
  moments.mean = sums.pivot + shift;
  moments.m2 = m2 < 0.0 ? 0.0 : m2;  // A NaN passes.
  return moments;
}

}  // namespace syncbn

#endif  // SYNCBN_KERNELS_MOMENTS_H_
