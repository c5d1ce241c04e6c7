// The coefficients that the elementwise operations compute with.
//
// 16-bit tensors: in float32. The mean is split into hi + lo, of which hi is a float32: x - hi loses nothing that x
// had, however far the mean is from 0, and lo goes into the constant term in float64. The CUDA kernels compute with the
// same coefficients.
//
// float32 tensors: as factors of x and dy and a constant term. Factors are rounded to 29 bits, which makes a product
// with a float32 exact in float64. A fused multiply-add then has the bits of a multiplication and an addition, so that
// processors with and without it give equal results. The rounding changes an output by at most 2^-29 of x - mean times
// the factor, a 32nd of what float32 rounds; the constant term is made with the rounded factor, so the mean's size does
// not enter.

#ifndef SYNCBN_KERNELS_CPU_ROUNDED_H_
#define SYNCBN_KERNELS_CPU_ROUNDED_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/batch_norm.h"

namespace syncbn::kernels::cpu {

// Vectors of float64, each from a line of cache on: what is read eight entries at a time shall not lie in two.
class AlignedVectors {
 public:
  AlignedVectors() = default;
  AlignedVectors(size_t vectors, size_t length)
      : stride_((length + kLine - 1) / kLine * kLine), lines_(vectors * stride_ / kLine) {}

  double* operator[](size_t i) { return lines_.data()->entries + i * stride_; }

 private:
  static constexpr size_t kLine = 8;
  struct alignas(64) Line {
    double entries[kLine];
  };

  size_t stride_ = 0;
  std::vector<Line> lines_;
};

// The coefficients of a forward pass. Those of a float32 tensor become scale and shift, for scale * x + shift; the mean
// stays, and is not read. Those of a 16-bit tensor are rounded if float32 can compute with them: not if one of them is
// so large or so small that products would leave its range. Then, and for float64, they stay as they are, and the
// arithmetic is in float64. The choice follows from the coefficients alone, so that a backward pass which computes the
// output again makes the same.
class RoundedForward {
 public:
  // `coefficients` has `shape.channels` entries and must outlive this object; its pointers may be null, which is not
  // rounded.
  RoundedForward(const TensorShape& shape, const ForwardCoefficients& coefficients);

  bool single() const { return single_; }
  // Returns float32 values if single(), and what was given for other types than float32.
  const ForwardCoefficients& coefficients() const { return coefficients_; }

 private:
  bool single_ = false;
  ForwardCoefficients coefficients_;
  AlignedVectors memory_;
};

// The same for a backward pass. Those of a float32 tensor become scale, projection and mean_dy, for
// scale * dy + (projection * x + mean_dy).
class RoundedBackward {
 public:
  RoundedBackward(const TensorShape& shape, const BackwardCoefficients& coefficients);

  bool single() const { return single_; }
  const BackwardCoefficients& coefficients() const { return coefficients_; }

 private:
  bool single_ = false;
  BackwardCoefficients coefficients_;
  AlignedVectors memory_;
};

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_ROUNDED_H_
