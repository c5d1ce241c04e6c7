#include <algorithm>

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/finalize.cuh"
#include "kernels/cuda/launch.cuh"

namespace syncbn::kernels::cuda {
namespace {

__global__ void __launch_bounds__(kFinalizeThreads) FinalizeForwardKernel(const FinalizeForwardArguments arguments) {
  const int64_t channel = int64_t{blockIdx.x} * kFinalizeThreads + threadIdx.x;
  if (channel < arguments.channels) FinalizeForwardChannel(arguments, channel);
}

__global__ void __launch_bounds__(kFinalizeThreads)
    FinalizeEvaluationKernel(const FinalizeEvaluationArguments arguments) {
  const int64_t channel = int64_t{blockIdx.x} * kFinalizeThreads + threadIdx.x;
  if (channel < arguments.channels) FinalizeEvaluationChannel(arguments, channel);
}

__global__ void __launch_bounds__(kFinalizeThreads) FinalizeBackwardKernel(const FinalizeBackwardArguments arguments) {
  const int64_t channel = int64_t{blockIdx.x} * kFinalizeThreads + threadIdx.x;
  if (channel < arguments.channels) FinalizeBackwardChannel(arguments, channel);
}

int64_t Blocks(int64_t channels) { return (channels + kFinalizeThreads - 1) / kFinalizeThreads; }

}  // namespace

Error FinalizeForward(const Context& context, const FinalizeForwardArguments& arguments) {
  return Launch(FinalizeForwardKernel, Blocks(arguments.channels), kFinalizeThreads, 0, context.stream, arguments);
}

Error FinalizeEvaluation(const Context& context, const FinalizeEvaluationArguments& arguments) {
  return Launch(FinalizeEvaluationKernel, Blocks(arguments.channels), kFinalizeThreads, 0, context.stream, arguments);
}

Error FinalizeBackward(const Context& context, const FinalizeBackwardArguments& arguments) {
  return Launch(FinalizeBackwardKernel, Blocks(arguments.channels), kFinalizeThreads, 0, context.stream, arguments);
}

Error Preload() {
  for (const auto load : {PreloadStats, PreloadElemt, PreloadBackwardReduce, PreloadBackwardElemt}) {
    if (const Error error = load(); error != kSuccess) return error;
  }
  if (const Error error = Load(FinalizeForwardKernel); error != kSuccess) return error;
  if (const Error error = Load(FinalizeEvaluationKernel); error != kSuccess) return error;
  return Load(FinalizeBackwardKernel);
}

// The host's side that needs CUDA's own functions.
bool Available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const char* ErrorString(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

size_t WorkspaceBytes(const TensorShape& shape) {
  return std::max(WorkspaceBytes(PlanReduce(shape, 1)), WorkspaceBytes(PlanReduce(shape, 2)));
}

}  // namespace syncbn::kernels::cuda
