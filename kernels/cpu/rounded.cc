#include "kernels/cpu/rounded.h"

#include <cmath>
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

}  // namespace

RoundedForward::RoundedForward(const TensorShape& shape, const ForwardCoefficients& coefficients)
    : coefficients_(coefficients) {
  if (SizeOf(shape.type) != 2 || coefficients.mean == nullptr) return;
  const size_t channels = static_cast<size_t>(shape.channels);
  memory_.resize(3 * channels);
  double* const mean = memory_.data();
  double* const scale = mean + channels;
  double* const shift = scale + channels;
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
  if (SizeOf(shape.type) != 2) return;
  const size_t channels = static_cast<size_t>(shape.channels);
  memory_.resize(4 * channels);
  double* const mean = memory_.data();
  double* const scale = mean + channels;
  double* const mean_dy = scale + channels;
  double* const projection = mean_dy + channels;
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
