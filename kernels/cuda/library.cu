// The functions of batch_norm.h that concern the library as a whole.

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/launch.cuh"

namespace syncbn::kernels::cuda {

bool Available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const char* ErrorString(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

Error Preload() {
  for (const auto load : {PreloadStats, PreloadElemt, PreloadBackwardReduce, PreloadBackwardElemt, PreloadFinalize}) {
    if (const Error error = load(); error != kSuccess) return error;
  }
  return kSuccess;
}

}  // namespace syncbn::kernels::cuda
