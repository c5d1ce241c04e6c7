// The vectors of 16 bytes that make up the planes of a channel.

#ifndef SYNCBN_KERNELS_CUDA_PLANE_VECTOR_CUH_
#define SYNCBN_KERNELS_CUDA_PLANE_VECTOR_CUH_

#include <cstdint>

#include "kernels/cuda/plan.h"
#include "kernels/host_device.h"

namespace syncbn::kernels::cuda {

// The part of a plane that a vector of the tensor holds.
struct PlaneVector {
  int64_t first = 0;   // Its first element in the tensor.
  uint32_t valid = 0;  // Bit i: element first + i belongs to the plane. 0: nothing to read.
};

// Vector `unit` of `channel`, counted over all its planes; Index has room for the tensor's size.
template <typename Index>
SYNCBN_HOST_DEVICE inline PlaneVector FindPlaneVectorBy(const ReducePlan& plan, Index sample, Index channel, Index unit,
                                                        int width) {
  const Index spatial = static_cast<Index>(plan.spatial);
  const Index begin = (sample * static_cast<Index>(plan.channels) + channel) * spatial;
  const Index vectors = static_cast<Index>(plan.vectors_per_plane.divisor);
  const Index first = (begin / width + (unit - sample * vectors)) * width;
  PlaneVector vector;
  vector.first = first;
  const Index left = begin + spatial - first;
  if (left <= 0) return vector;
  const uint32_t below_end = left >= width ? (1u << width) - 1 : (1u << left) - 1;
  const Index skip = begin - first;
  vector.valid = skip > 0 ? below_end & ~((1u << skip) - 1) : below_end;
  return vector;
}
SYNCBN_HOST_DEVICE inline PlaneVector FindPlaneVector(const ReducePlan& plan, int64_t channel, int64_t unit,
                                                      int width) {
  if (unit >= plan.units) return PlaneVector();
  if (plan.small) {
    const int32_t sample = static_cast<int32_t>(plan.vectors_per_plane.Small(static_cast<uint32_t>(unit)));
    return FindPlaneVectorBy<int32_t>(plan, sample, static_cast<int32_t>(channel), static_cast<int32_t>(unit), width);
  }
  return FindPlaneVectorBy<int64_t>(plan, plan.vectors_per_plane(unit), channel, unit, width);
}

// The same vector's first element, where plan.whole and unit < plan.units.
SYNCBN_HOST_DEVICE inline int64_t FindWholePlaneVector(const ReducePlan& plan, int64_t channel, int64_t unit,
                                                       int width) {
  const uint32_t vectors = static_cast<uint32_t>(plan.vectors_per_plane.divisor);
  const uint32_t sample = plan.vectors_per_plane.Small(static_cast<uint32_t>(unit));
  const uint32_t within = static_cast<uint32_t>(unit) - sample * vectors;
  return ((sample * plan.channels + channel) * vectors + within) * width;
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_PLANE_VECTOR_CUH_
