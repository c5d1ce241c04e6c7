// The per-channel coefficients in a thread's registers, in the precision that it computes in.
//
// The mean is split in two, hi + lo, of which hi is exact in that precision: x - hi loses nothing that x had, however
// far the mean is from 0, and lo goes into the constant term in float64. (scale*x + (bias - mean*scale) would cancel.)

#ifndef SYNCBN_KERNELS_CUDA_COEFFICIENTS_CUH_
#define SYNCBN_KERNELS_CUDA_COEFFICIENTS_CUH_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/scalar_types.cuh"
#include "kernels/gate.h"

namespace syncbn::kernels::cuda {

// y = (x - hi) * scale + shift.
template <typename A>
struct ForwardLane {
  A hi;
  A scale;
  A shift;

  SYNCBN_HOST_DEVICE static ForwardLane At(const ForwardCoefficients& coefficients, int64_t channel) {
    const double mean = coefficients.mean[channel];
    const double scale = coefficients.scale[channel];
    ForwardLane lane;
    lane.hi = static_cast<A>(mean);
    lane.scale = static_cast<A>(scale);
    lane.shift = static_cast<A>(fma(static_cast<double>(lane.hi) - mean, scale, coefficients.shift[channel]));
    return lane;
  }

  SYNCBN_HOST_DEVICE A operator()(A x) const { return FusedMultiplyAdd(x - hi, scale, shift); }
};

// dx = scale * (dy - mean_dy - (x - hi) * projection).
template <typename A>
struct BackwardLane {
  A hi;
  A scale;
  A mean_dy;
  A projection;

  SYNCBN_HOST_DEVICE static BackwardLane At(const BackwardCoefficients& coefficients, int64_t channel) {
    const double mean = coefficients.mean[channel];
    const double projection = coefficients.projection[channel];
    BackwardLane lane;
    lane.hi = static_cast<A>(mean);
    lane.scale = static_cast<A>(coefficients.scale[channel]);
    lane.mean_dy = static_cast<A>(fma(static_cast<double>(lane.hi) - mean, projection, coefficients.mean_dy[channel]));
    lane.projection = static_cast<A>(projection);
    return lane;
  }

  SYNCBN_HOST_DEVICE A operator()(A dy, A x) const {
    return scale * FusedMultiplyAdd(hi - x, projection, dy - mean_dy);
  }
};

// Calls f(v, channel) for elements v < kWidth of a column's vectors, in a plan in rows. Coefficients are read in f: the
// channels are found without a branch, so that all reads are under way at once.
template <int kWidth, typename Plan, typename Function>
SYNCBN_HOST_DEVICE inline void EachChannelOfColumn(const Plan& plan, int64_t column, Function f) {
  const int64_t channels = plan.channels;
  int64_t first = column * kWidth;
  if (plan.columns * kWidth != channels) first %= channels;  // Channels occur several times in a row.
  if (channels >= kWidth) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v) f(v, first + v < channels ? first + v : first + v - channels);
  } else {
#pragma unroll
    for (int v = 0; v < kWidth; ++v) f(v, (first + v) % channels);
  }
}

// The bits of the mask for the elements from `first` on, a multiple of the vector's width (which divides 8).
SYNCBN_HOST_DEVICE inline uint32_t MaskBits(const uint8_t* mask, int64_t first) {
  return static_cast<uint32_t>(mask[first >> 3]) >> (first & 7);
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_COEFFICIENTS_CUH_
