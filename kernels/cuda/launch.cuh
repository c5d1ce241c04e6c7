// Launches and loads of kernels that are templates over the mapping and the element type.

#ifndef SYNCBN_KERNELS_CUDA_LAUNCH_CUH_
#define SYNCBN_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/reduce.cuh"

namespace syncbn::kernels::cuda {

// Blocks that an SM can hold at once, for which the compiler leaves registers. From Blackwell on the compiler needs a
// few more than 64 in planes; this is the one thing that differs between models, and it changes no result.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int ResidentBlocks(Mapping mapping) { return mapping == Mapping::kRows ? 2 : 3; }
#else
constexpr int ResidentBlocks(Mapping mapping) { return BlocksPerSm(mapping); }
#endif

// The grid's first extent; plans stay below it except for tensors that no GPU can hold. The second one, 65535, is more
// than any plan's splits.
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

inline bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Divides the context's workspace for a reduction. False if it is too small.
inline bool MapWorkspace(const Context& context, const ReducePlan& plan, ReduceWorkspace* workspace) {
  if (context.workspace == nullptr || context.workspace_bytes < WorkspaceBytes(plan)) return false;
  if (plan.blocks() > kMaxBlocks) return false;
  workspace->counters = static_cast<uint32_t*>(context.workspace);
  workspace->partials = reinterpret_cast<double*>(static_cast<char*>(context.workspace) + kCounterBytes);
  workspace->flag = context.signal.flag;
  workspace->flag_value = context.signal.value;
  return true;
}

// Launches a matrix of tiles x splits blocks.
template <typename Kernel, typename Arguments>
Error Launch(Kernel kernel, int64_t tiles, int splits, int threads, size_t shared_bytes, CUstream_st* stream,
             const Arguments& arguments) {
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(arguments);
  return static_cast<Error>(cudaGetLastError());
}

// Loads a kernel for the current device. Returns an error unless the driver says that it is loaded then.
Error LoadKernel(const void* kernel);
template <typename Kernel>
Error Load(Kernel kernel) {
  return LoadKernel(reinterpret_cast<const void*>(kernel));
}

// Calls load(mapping, type), both as types, for all of them; returns the first error.
template <typename Function>
Error LoadForEachType(Function load) {
  for (const Mapping mapping : {Mapping::kPlanes, Mapping::kRows}) {
    for (const DataType type : {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16}) {
      if (const Error error = DispatchType(mapping, type, load); error != kSuccess) return error;
    }
  }
  return kSuccess;
}

// Parts of Preload, one for each source of kernels.
Error PreloadStats();
Error PreloadElemt();
Error PreloadBackwardReduce();
Error PreloadBackwardElemt();
Error PreloadFinalize();

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_LAUNCH_CUH_
