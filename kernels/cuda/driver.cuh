// Functions that only CUDA's driver has, looked up when they are needed: the runtime library, which is linked in, opens
// the driver, so that a process that makes no call needs none.

#ifndef SYNCBN_KERNELS_CUDA_DRIVER_CUH_
#define SYNCBN_KERNELS_CUDA_DRIVER_CUH_

#include <cuda_runtime_api.h>

namespace syncbn::kernels::cuda {

// Returns the function of that name in version `version` of the driver's interface (12040: CUDA 12.4), or null. Errors
// of the look-up are cleared.
template <typename Function>
Function* DriverFunction(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  // The legacy stream is what a null handle means to the runtime library here as well.
  if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableLegacyStream, &found) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(function) : nullptr;
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_DRIVER_CUH_
