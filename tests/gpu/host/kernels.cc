// kernels/cuda/batch_norm.h on the host executor, for the programs of tests/gpu where there is no GPU. Each launch
// takes its blocks in an order of its own.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/finalize.cuh"
#include "tests/kernels/cuda/host_kernels.h"

namespace syncbn::kernels::cuda {
namespace {

using testing::HostRun;
using testing::host_cuda::Enqueue;

// For a launch that reads and writes these tensors.
template <typename... Pointers>
HostRun NextRun(Pointers... tensors) {
  static std::atomic<uint64_t> launches{0};
  HostRun run;
  run.seed = ++launches;
  run.aligned = ((reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
  return run;
}

void Raise(const Signal& signal) {
  if (signal.flag != nullptr) __atomic_store_n(signal.flag, signal.value, __ATOMIC_RELEASE);
}

}  // namespace

bool Available() { return true; }
const char* ErrorString(Error error) { return error == kSuccess ? "no error" : "an error"; }
size_t WorkspaceBytes(const TensorShape& shape) {
  return std::max(WorkspaceBytes(PlanReduce(shape, 1)), WorkspaceBytes(PlanReduce(shape, 2)));
}

Error BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2) {
  if (context.workspace_bytes < WorkspaceBytes(shape)) return kInvalidValue;
  return Enqueue(context.stream, [=, signal = context.signal] {
    testing::HostStats(NextRun(x), shape, x, mean, m2);
    Raise(signal);
  });
}

Error BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                     const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y) {
  if (shape.size() == 0) return kSuccess;
  return Enqueue(context.stream,
                 [=] { testing::HostElemt(NextRun(x, epilogue.residual, y), shape, x, coefficients, epilogue, y); });
}

Error BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                              const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  if (context.workspace_bytes < WorkspaceBytes(shape)) return kInvalidValue;
  return Enqueue(context.stream, [=, signal = context.signal] {
    testing::HostBackwardReduce(NextRun(dy, x), shape, dy, x, mean, gate, sum_dy, sum_dy_xmu);
    Raise(signal);
  });
}

Error BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                             void* d_residual) {
  if (shape.size() == 0) return kSuccess;
  return Enqueue(context.stream, [=] {
    testing::HostBackwardElemt(NextRun(dy, x, dx, d_residual), shape, dy, x, coefficients, gate, dx, d_residual);
  });
}

Error FinalizeForward(const Context& context, const FinalizeForwardArguments& arguments) {
  return Enqueue(context.stream, [=] {
    for (int64_t c = 0; c < arguments.channels; ++c) FinalizeForwardChannel(arguments, c);
  });
}

Error FinalizeBackward(const Context& context, const FinalizeBackwardArguments& arguments) {
  return Enqueue(context.stream, [=] {
    for (int64_t c = 0; c < arguments.channels; ++c) FinalizeBackwardChannel(arguments, c);
  });
}

}  // namespace syncbn::kernels::cuda
