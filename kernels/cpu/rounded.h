// The coefficients of 16-bit tensors in float32. The mean is split into hi + lo, of which hi is a float32: x - hi loses
// nothing that x had, however far the mean is from 0, and lo goes into the constant term in float64. The CUDA kernels
// compute with the same coefficients.

#ifndef SYNCBN_KERNELS_CPU_ROUNDED_H_
#define SYNCBN_KERNELS_CPU_ROUNDED_H_

#include <cstdint>
#include <vector>

#include "kernels/batch_norm.h"

namespace syncbn::kernels::cpu {

// The coefficients of a forward pass, rounded if the tensor has 16 bits and float32 can compute with them: not if one
// of them is so large or so small that products would leave its range. Then, and for other types, they stay as they
// are, and the arithmetic is in float64. The choice follows from the coefficients alone, so that a backward pass which
// computes the output again makes the same.
class RoundedForward {
 public:
  // `coefficients` has `shape.channels` entries and must outlive this object; its pointers may be null, which is not
  // rounded.
  RoundedForward(const TensorShape& shape, const ForwardCoefficients& coefficients);

  bool single() const { return single_; }
  // Returns float32 values if single(), else what was given.
  const ForwardCoefficients& coefficients() const { return coefficients_; }

 private:
  bool single_ = false;
  ForwardCoefficients coefficients_;
  std::vector<double> memory_;  // Three vectors.
};

// The same for a backward pass.
class RoundedBackward {
 public:
  RoundedBackward(const TensorShape& shape, const BackwardCoefficients& coefficients);

  bool single() const { return single_; }
  const BackwardCoefficients& coefficients() const { return coefficients_; }

 private:
  bool single_ = false;
  BackwardCoefficients coefficients_;
  std::vector<double> memory_;  // Four vectors.
};

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_ROUNDED_H_
