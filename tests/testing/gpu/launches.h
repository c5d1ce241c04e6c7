// The launches of kernels/cuda/batch_norm.h as work for a stream of a FakeGpu: the kernels' algorithms on the host
// executor, the blocks of each launch in an order of its own.

#ifndef SYNCBN_TESTS_TESTING_GPU_LAUNCHES_H_
#define SYNCBN_TESTS_TESTING_GPU_LAUNCHES_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "kernels/batch_norm.h"
#include "kernels/cuda/batch_norm.h"
#include "kernels/finalize.h"
#include "tests/kernels/cuda/host_kernels.h"

namespace syncbn::testing {

using HostWork = std::function<void()>;

// The run of a launch that reads and writes these tensors.
template <typename... Pointers>
HostRun NextRun(Pointers... tensors) {
  static std::atomic<uint64_t> launches{0};
  HostRun run;
  run.seed = ++launches;
  run.aligned = ((reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
  return run;
}

// The executor's own flag is a plain store; a thread that polls needs a release.
inline void Raise(const cuda::Signal& signal) {
  if (signal.flag != nullptr) __atomic_store_n(signal.flag, signal.value, __ATOMIC_RELEASE);
}

// False where a launch would return kInvalidValue.
inline bool HasWorkspace(const cuda::Context& context, const kernels::TensorShape& shape) {
  return context.workspace != nullptr && context.workspace_bytes >= cuda::WorkspaceBytes(shape);
}

inline HostWork StatsWork(const cuda::Context& context, const kernels::TensorShape& shape, const void* x, double* mean,
                          double* m2) {
  return [=, signal = context.signal] {
    HostStats(NextRun(x), shape, x, mean, m2);
    Raise(signal);
  };
}

inline HostWork ElemtWork(const kernels::TensorShape& shape, const void* x,
                          const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                          void* y) {
  return [=] {
    if (shape.size() != 0) HostElemt(NextRun(x, epilogue.residual, y), shape, x, coefficients, epilogue, y);
  };
}

inline HostWork BackwardReduceWork(const cuda::Context& context, const kernels::TensorShape& shape, const void* dy,
                                   const void* x, const double* mean, const kernels::ReluGate& gate, double* sum_dy,
                                   double* sum_dy_xmu) {
  return [=, signal = context.signal] {
    HostBackwardReduce(NextRun(dy, x), shape, dy, x, mean, gate, sum_dy, sum_dy_xmu);
    Raise(signal);
  };
}

inline HostWork BackwardElemtWork(const kernels::TensorShape& shape, const void* dy, const void* x,
                                  const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate,
                                  void* dx, void* d_residual) {
  return [=] {
    if (shape.size() == 0) return;
    HostBackwardElemt(NextRun(dy, x, dx, d_residual), shape, dy, x, coefficients, gate, dx, d_residual);
  };
}

inline HostWork FinalizeWork(const kernels::FinalizeForwardArguments& arguments) {
  return [=] {
    for (int64_t c = 0; c < arguments.channels; ++c) kernels::FinalizeForwardChannel(arguments, c);
  };
}

inline HostWork FinalizeWork(const kernels::FinalizeBackwardArguments& arguments) {
  return [=] {
    for (int64_t c = 0; c < arguments.channels; ++c) kernels::FinalizeBackwardChannel(arguments, c);
  };
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_GPU_LAUNCHES_H_
