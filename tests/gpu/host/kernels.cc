// kernels/cuda/batch_norm.h on the host executor, for the programs of tests/gpu where there is no GPU.

#include <cuda_runtime.h>

#include "kernels/cuda/batch_norm.h"
#include "tests/testing/gpu/launches.h"

namespace syncbn::kernels::cuda {

using testing::host_cuda::Enqueue;

bool Available() { return true; }
const char* ErrorString(Error error) { return error == kSuccess ? "no error" : "an error"; }

Error BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2) {
  if (!testing::HasWorkspace(context, shape)) return kInvalidValue;
  return Enqueue(context.stream, testing::StatsWork(context, shape, x, mean, m2));
}

Error BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                     const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y) {
  return Enqueue(context.stream, testing::ElemtWork(shape, x, coefficients, epilogue, y));
}

Error BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                              const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  if (!testing::HasWorkspace(context, shape)) return kInvalidValue;
  return Enqueue(context.stream, testing::BackwardReduceWork(context, shape, dy, x, mean, gate, sum_dy, sum_dy_xmu));
}

Error BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                             void* d_residual) {
  return Enqueue(context.stream, testing::BackwardElemtWork(shape, dy, x, coefficients, gate, dx, d_residual));
}

Error FinalizeForward(const Context& context, const FinalizeForwardArguments& arguments) {
  return Enqueue(context.stream, testing::FinalizeWork(arguments));
}

Error FinalizeBackward(const Context& context, const FinalizeBackwardArguments& arguments) {
  return Enqueue(context.stream, testing::FinalizeWork(arguments));
}

// Loads nothing; a load would spoil captures by other threads.
Error Preload() {
  testing::host_cuda::DriverState::Get().UseUnsafely("Preload");
  return kSuccess;
}

}  // namespace syncbn::kernels::cuda
