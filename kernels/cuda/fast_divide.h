// Division by a number that is known before the launch: a multiplication and a shift, where the hardware's own integer
// division takes dozens of instructions.

#ifndef SYNCBN_KERNELS_CUDA_FAST_DIVIDE_H_
#define SYNCBN_KERNELS_CUDA_FAST_DIVIDE_H_

#include <cstdint>

#include "kernels/host_device.h"

namespace syncbn::kernels::cuda {

// Quotients of non-negative numbers by `divisor` >= 1. Dividends below 2^31 take the fast path, if the divisor is below
// 2^31 too; the rest, which only huge tensors have, are divided as they are.
struct FastDivide {
  int64_t divisor = 1;
  uint32_t magic = 0;  // ceil(2^(32 + shift) / divisor) - 2^32, Granlund and Montgomery 1994.
  int32_t shift = -1;  // -1: no fast path.

  static FastDivide By(int64_t divisor) {
    FastDivide result;
    result.divisor = divisor;
    if (divisor >= (int64_t{1} << 31)) return result;
    int shift = 0;
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    result.magic = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
    result.shift = shift;
    return result;
  }

  SYNCBN_HOST_DEVICE int64_t operator()(int64_t dividend) const {
    if (shift < 0 || dividend >= (int64_t{1} << 31)) return dividend / divisor;
    return Small(static_cast<uint32_t>(dividend));
  }

  // The fast path, for a caller that knows dividend and divisor to be below 2^31.
  SYNCBN_HOST_DEVICE uint32_t Small(uint32_t dividend) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(dividend) * magic) >> 32);
    return (high + dividend) >> shift;  // No overflow: dividend < 2^31 and high < dividend.
  }
};

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_FAST_DIVIDE_H_
