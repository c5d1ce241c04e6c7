// The elementwise operations' inner loops, one unit of a plan at a time.

#ifndef SYNCBN_KERNELS_CPU_ELEMENTWISE_H_
#define SYNCBN_KERNELS_CPU_ELEMENTWISE_H_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cpu/plan.h"

namespace syncbn::kernels::cpu {

// Pointers to whole tensors and to coefficient tables of the plan's period; the caller owns all of them.
struct ForwardArgs {
  DataType type = DataType::kFloat32;
  ElementwisePlan plan;
  const uint8_t* x = nullptr;
  ForwardCoefficients coefficients;
  Epilogue epilogue;
  uint8_t* y = nullptr;
  bool around_caches = false;  // y need not be in a cache afterwards; it is no input, and there is no mask.
};

struct BackwardArgs {
  DataType type = DataType::kFloat32;
  ElementwisePlan plan;
  const uint8_t* dy = nullptr;
  const uint8_t* x = nullptr;
  BackwardCoefficients coefficients;
  ReluGate gate;
  bool single_gate = false;  // The gate's coefficients are those of RoundedForward.
  uint8_t* dx = nullptr;
  uint8_t* d_residual = nullptr;
  bool around_caches = false;  // The outputs need not be in a cache afterwards, and are no inputs.
};

void ForwardUnit(const ForwardArgs& args, int64_t unit);
void BackwardUnit(const BackwardArgs& args, int64_t unit);

// Returns the name of the target that these operations and the reductions run with.
const char* TargetName();

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_ELEMENTWISE_H_
