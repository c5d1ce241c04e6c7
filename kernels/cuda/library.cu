// The functions of batch_norm.h that concern the library as a whole.

#include <cuda.h>

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/driver.cuh"
#include "kernels/cuda/launch.cuh"

namespace syncbn::kernels::cuda {

bool Available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const char* ErrorString(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The runtime library loads a kernel when it is launched; only the driver has a function for it, and can tell whether a
// kernel is loaded.
Error LoadKernel(const void* kernel) {
  constexpr unsigned kVersion = 12040;
  static auto* const load = DriverFunction<CUresult(CUfunction)>("cuFuncLoad", kVersion);
  static auto* const look = DriverFunction<CUresult(CUfunctionLoadingState*, CUfunction)>("cuFuncIsLoaded", kVersion);
  if (load == nullptr || look == nullptr) return cudaErrorNotSupported;
  cudaFunction_t function = nullptr;
  if (const cudaError_t error = cudaGetFuncBySymbol(&function, kernel); error != cudaSuccess) return error;
  if (const CUresult error = load(function); error != CUDA_SUCCESS) return static_cast<Error>(error);
  CUfunctionLoadingState state = CU_FUNCTION_LOADING_STATE_UNLOADED;
  if (const CUresult error = look(&state, function); error != CUDA_SUCCESS) return static_cast<Error>(error);
  return state == CU_FUNCTION_LOADING_STATE_LOADED ? kSuccess : static_cast<Error>(cudaErrorNotReady);
}

Error Preload() {
  for (const auto load : {PreloadStats, PreloadElemt, PreloadBackwardReduce, PreloadBackwardElemt, PreloadFinalize}) {
    if (const Error error = load(); error != kSuccess) return error;
  }
  return kSuccess;
}

}  // namespace syncbn::kernels::cuda
