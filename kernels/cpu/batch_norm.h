// The CPU backend of kernels/batch_norm.h.
//
// Thread safety: any thread; operations on disjoint outputs may run at the same time.

#ifndef SYNCBN_KERNELS_CPU_BATCH_NORM_H_
#define SYNCBN_KERNELS_CPU_BATCH_NORM_H_

#include <cstdint>

#include "kernels/batch_norm.h"

namespace syncbn::kernels::cpu {

// The number of threads that an operation may use: the caller's own and num_threads - 1 from a pool shared by the
// process, which starts with its first use. 1 never touches the pool.
struct Context {
  int num_threads = 1;
  // Outputs of operations whose inputs and outputs are longer together do not go into the caches. 0: the size of this
  // machine's largest cache.
  int64_t cache_bytes = 0;
};

// Per channel: mean and sum of squared deviations from it, over values_per_channel() values. With no values: zeros. NaN
// and infinity give NaN or infinity in their own channel alone. Variance is within 1e-6 of the true one at
// |mean|/std = 1e4 in float32, whatever the order of the values. The 16-bit types are added up in float32 where a
// channel has 256 values or more: the relative error is then some 2^-25, and rarely more than 2^-23.
void BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2);

// y may be x or the residual. float32 and float64: the output is computed in float64 and rounded to the tensor's type
// once. float16 and bfloat16: it is computed in float32 and then rounded, so that it is off by half a unit in the last
// place and at most 8 * 2^-24 of the sum of its terms' sizes; in float64, where the coefficients leave float32's range.
// An output in float32 overflows where one of its terms does.
void BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                    const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y);

// Per channel: sum of dy and of dy * (x - mean), where dy counts as 0 where the gate is shut. In float32 for the types
// and numbers of values that BatchNormStats names; the error is relative to the sum of the terms' sizes.
void BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu);

// Computed and rounded like y. dx may be dy. d_residual, if not null, receives dy where the gate is open and 0
// elsewhere (the gradient of the residual).
void BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                            const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx, void* d_residual);

// The instruction set that the operations run with on this machine: "AVX2", "AVX3", "SSSE3" and so on.
const char* InstructionSet();

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_BATCH_NORM_H_
