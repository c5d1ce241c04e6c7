#include "kernels/cpu/rounded.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace syncbn::kernels::cpu {
namespace {

// A number of this size added to the largest bfloat16 does not overflow float32.
constexpr double kLargestTerm = 0x1p119;
// A factor in between takes no output of a usual size out of float32's range.
constexpr double kSmallestFactor = 0x1p-100;
constexpr double kLargestFactor = 0x1p100;

// Infinity and NaN pass: they do to an output in float32 what they do in float64.
bool IsTerm(double v) { return !(std::abs(v) >= kLargestTerm) || std::isinf(v); }

bool IsFactor(double v) {
  const double size = std::abs(v);
  return v == 0 || !(size < kSmallestFactor || size > kLargestFactor) || std::isinf(v);
}

// Returns v as a float32. A NaN gets the bits that Half::Narrow() can take.
double Single(double v) {
  return std::isnan(v) ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(static_cast<float>(v));
}

// Returns the constant term, with the part of the mean that float32 loses.
double WithRest(double term, double mean, double factor) {
  const double rest = (Single(mean) - mean) * factor;
  return rest != 0 && std::isfinite(rest) ? term + rest : term;  // -0 + 0 would be 0.
}

// Returns a factor rounded to 29 bits, to nearest even. One whose product with a float32 might be no normal number, in
// any case far below the smallest float32, becomes 0.
double Factor(double v) {
  if (!std::isfinite(v)) return v;
  if (std::abs(v) < 0x1p-800) return 0;
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  constexpr int kDropped = 53 - 29;
  const uint64_t odd = bits >> kDropped & 1;
  bits = (bits + (uint64_t{1} << (kDropped - 1)) - 1 + odd) >> kDropped << kDropped;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

}  // namespace

RoundedForward::RoundedForward(const TensorShape& shape, const ForwardCoefficients& coefficients)
    : coefficients_(coefficients) {
  if (shape.type == DataType::kFloat64 || coefficients.mean == nullptr) return;
  const size_t channels = static_cast<size_t>(shape.channels);
  memory_ = AlignedVectors(3, channels);
  if (shape.type == DataType::kFloat32) {
    double* const factor = memory_[0];
    double* const term = memory_[1];
    for (size_t c = 0; c < channels; ++c) {
      factor[c] = Factor(coefficients.scale[c]);
      term[c] = coefficients.shift[c] - coefficients.mean[c] * factor[c];
    }
    coefficients_ = {coefficients.mean, factor, term};
    return;
  }
  double* const mean = memory_[0];
  double* const scale = memory_[1];
  double* const shift = memory_[2];
  for (size_t c = 0; c < channels; ++c) {
    const double term = WithRest(coefficients.shift[c], coefficients.mean[c], coefficients.scale[c]);
    if (!IsTerm(coefficients.mean[c]) || !IsFactor(coefficients.scale[c]) || !IsTerm(term)) return;
    mean[c] = Single(coefficients.mean[c]);
    scale[c] = Single(coefficients.scale[c]);
    shift[c] = Single(term);
  }
  coefficients_ = {mean, scale, shift};
  single_ = true;
}

RoundedBackward::RoundedBackward(const TensorShape& shape, const BackwardCoefficients& coefficients)
    : coefficients_(coefficients) {
  if (shape.type == DataType::kFloat64) return;
  const size_t channels = static_cast<size_t>(shape.channels);
  memory_ = AlignedVectors(4, channels);
  if (shape.type == DataType::kFloat32) {
    double* const factor = memory_[0];
    double* const term = memory_[1];
    double* const slope = memory_[2];
    for (size_t c = 0; c < channels; ++c) {
      factor[c] = Factor(coefficients.scale[c]);
      slope[c] = Factor(-coefficients.scale[c] * coefficients.projection[c]);
      term[c] = -factor[c] * coefficients.mean_dy[c] - slope[c] * coefficients.mean[c];
    }
    coefficients_ = {coefficients.mean, factor, term, slope};
    return;
  }
  double* const mean = memory_[0];
  double* const scale = memory_[1];
  double* const mean_dy = memory_[2];
  double* const projection = memory_[3];
  for (size_t c = 0; c < channels; ++c) {
    const double term = WithRest(coefficients.mean_dy[c], coefficients.mean[c], coefficients.projection[c]);
    if (!IsTerm(coefficients.mean[c]) || !IsFactor(coefficients.scale[c]) || !IsTerm(term) ||
        !IsFactor(coefficients.projection[c])) {
      return;
    }
    mean[c] = Single(coefficients.mean[c]);
    scale[c] = Single(coefficients.scale[c]);
    mean_dy[c] = Single(term);
    projection[c] = Single(coefficients.projection[c]);
  }
  coefficients_ = {mean, scale, mean_dy, projection};
  single_ = true;
}

}  // namespace syncbn::kernels::cpu
