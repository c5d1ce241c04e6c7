// The elementwise operations' inner loops for the two 16-bit types, in float32, one unit of a plan at a time.

#ifndef SYNCBN_KERNELS_CPU_HALF_ELEMENTWISE_H_
#define SYNCBN_KERNELS_CPU_HALF_ELEMENTWISE_H_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cpu/plan.h"

namespace syncbn::kernels::cpu {

// Tables of the plan's period, and kPadding more entries that repeat the first ones: sixteen can be read from any entry
// on. Where the plan has no repetition the period is at least kPadding.
struct FloatForward {
  static constexpr int64_t kPadding = 16;
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

struct FloatBackward {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* mean_dy = nullptr;
  const float* projection = nullptr;
};

// Tells whether the adjacent entries of tables are read 32 at a time, even ones first: each 32 must lie in that order.
// So it is for bfloat16 where no bit mask is read or written, which has the order of the elements, and where all units
// begin at a multiple of 32 entries.
inline bool HasPairs(DataType type, const ElementwisePlan& plan, const void* mask) {
  return type == DataType::kBFloat16 && mask == nullptr && (plan.repeat != 1 || plan.period % 32 == 0);
}

// Pointers to whole tensors and to tables; the caller owns all of them. `type` is kFloat16 or kBFloat16.
struct HalfForwardArgs {
  DataType type = DataType::kBFloat16;
  ElementwisePlan plan;
  const uint8_t* x = nullptr;
  FloatForward coefficients;
  Epilogue epilogue;
  uint8_t* y = nullptr;
  bool pairs = false;  // HasPairs().
};

struct HalfBackwardArgs {
  DataType type = DataType::kBFloat16;
  ElementwisePlan plan;
  const uint8_t* dy = nullptr;
  const uint8_t* x = nullptr;
  FloatBackward coefficients;
  const uint8_t* mask = nullptr;  // The gate's, or
  FloatForward forward;           // the pass whose output opens it; or neither.
  uint8_t* dx = nullptr;
  uint8_t* d_residual = nullptr;
  bool pairs = false;  // HasPairs().
};

void HalfForwardUnit(const HalfForwardArgs& args, int64_t unit);
void HalfBackwardUnit(const HalfBackwardArgs& args, int64_t unit);

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_HALF_ELEMENTWISE_H_
