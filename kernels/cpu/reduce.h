// The reductions' inner loops, one unit of a plan at a time.

#ifndef SYNCBN_KERNELS_CPU_REDUCE_H_
#define SYNCBN_KERNELS_CPU_REDUCE_H_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cpu/plan.h"

namespace syncbn::kernels::cpu {

// The arguments of a unit; the caller owns all memory. Tables and partial results have one entry for each of the plan's
// counters.
struct ReduceArgs {
  DataType type = DataType::kFloat32;
  const ReductionPlan* plan = nullptr;
  // Computes in float32: ReducesInFloat32(), and a 16-bit tensor's gate that is computed again is single_gate.
  bool single = false;
  // The whole tensors.
  const uint8_t* x = nullptr;
  const uint8_t* dy = nullptr;  // In a backward reduction only, like mean and gate.
  const double* mean = nullptr;
  ReluGate gate;
  bool single_gate = false;  // RoundedForward::single() of the gate's coefficients.
  // Partial results, [splits, width]: mean and m2, or sum_dy and sum_dy_xmu.
  double* first = nullptr;
  double* second = nullptr;
};

void StatsUnit(const ReduceArgs& args, int64_t unit);
void BackwardReduceUnit(const ReduceArgs& args, int64_t unit);

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_REDUCE_H_
