// A host-only stub of the CUDA runtime calls that tests/gpu and client/cc use, for correctness, not speed. "Device"
// memory is the host's; streams are those of a FakeGpu with a thread; the default stream is the caller. A kernel's
// threads run one after the other (device.h), so kernels whose threads wait for each other do not belong here. Errors
// are not simulated.

#ifndef SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_
#define SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

#include "tests/gpu/host/cuda.h"
#include "tests/testing/gpu/fake_gpu.h"

#define __global__

using cudaStream_t = CUstream_st*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600, cudaErrorNotSupported = 801 };
enum { cudaStreamNonBlocking = 1, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

namespace syncbn::testing::host_cuda {

// The process's GPU, never destroyed: its thread runs until the process ends.
inline FakeGpu& Gpu() {
  static FakeGpu* const gpu = [] {
    auto* made = new FakeGpu;
    made->StartGpu();
    return made;
  }();
  return *gpu;
}

inline cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work, std::function<bool()> ready = nullptr) {
  if (stream == nullptr) {
    work();
  } else {
    Gpu().Enqueue(stream, std::move(work), std::move(ready));
  }
  return cudaSuccess;
}

struct Dim3 {
  unsigned x = 1;
};

}  // namespace syncbn::testing::host_cuda

inline thread_local syncbn::testing::host_cuda::Dim3 blockIdx, threadIdx, blockDim, gridDim;

struct cudaDeviceProp {
  char name[256] = "no GPU: the host stands in for one";
  int major = 0, minor = 0, multiProcessorCount = 0;
};

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = cudaDeviceProp();
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  syncbn::testing::host_cuda::DriverState::Get().set_device = device;
  syncbn::testing::host_cuda::DriverState::Get().Use();
  return cudaSuccess;
}
// Knows nothing of pushed contexts, so that nobody relies on it to.
inline cudaError_t cudaGetDevice(int* device) {
  *device = syncbn::testing::host_cuda::DriverState::Get().set_device;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, syncbn::testing::host_cuda::DriverState::Get().capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  syncbn::testing::host_cuda::DriverState::Get().UseUnsafely("cudaMalloc");
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
  syncbn::testing::host_cuda::DriverState::Get().UseUnsafely("cudaFree");
  syncbn::testing::host_cuda::Gpu().AwaitIdle();
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  syncbn::testing::host_cuda::DriverState::Get().Use();
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  syncbn::testing::host_cuda::DriverState::Get().Use();
  return syncbn::testing::host_cuda::Enqueue(stream, [=] { std::free(memory); });
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  syncbn::testing::host_cuda::DriverState::Get().Use();
  return syncbn::testing::host_cuda::Enqueue(stream, [=] { std::memset(memory, value, bytes); });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return syncbn::testing::host_cuda::Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = syncbn::testing::host_cuda::Gpu().MakeStream(0);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  syncbn::testing::host_cuda::Gpu().DestroyStream(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  syncbn::testing::host_cuda::DriverState::Get().UseUnsafely("cudaStreamSynchronize");
  if (stream != nullptr) syncbn::testing::host_cuda::Gpu().Drain(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
  syncbn::testing::host_cuda::DriverState::Get().UseUnsafely("cudaStreamQuery");
  return syncbn::testing::host_cuda::Gpu().queued(stream) == 0 ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  syncbn::testing::host_cuda::DriverState::Get().Use();
  *id = syncbn::testing::host_cuda::Gpu().id_of(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  syncbn::testing::host_cuda::DriverState::Get().Use();
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  syncbn::testing::host_cuda::Gpu().AwaitIdle();
  return cudaSuccess;
}

// The driver's functions. cuStreamWaitValue32 makes a stream wait for a value that is so large or larger.
namespace syncbn::testing::host_cuda {

inline CUresult StreamWaitValue32(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned) {
  DriverState::Get().Use();
  Enqueue(
      stream, [] {},
      [=] {
        const uint32_t* const word = reinterpret_cast<const uint32_t*>(address);
        return static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
      });
  return CUDA_SUCCESS;
}

}  // namespace syncbn::testing::host_cuda

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableLegacyStream = 1 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  namespace host_cuda = syncbn::testing::host_cuda;
  const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuStreamWaitValue32", reinterpret_cast<void*>(&host_cuda::StreamWaitValue32)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(&host_cuda::DeviceGetAttribute)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(&host_cuda::DevicePrimaryCtxRetain)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(&host_cuda::CtxPushCurrent)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(&host_cuda::CtxPopCurrent)},
      {"cuCtxGetDevice", reinterpret_cast<void*>(&host_cuda::CtxGetDevice)},
  };
  *function = nullptr;
  for (const auto& one : known) {
    if (std::strcmp(symbol, one.name) == 0) *function = one.function;
  }
  *result = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

#endif  // SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_
