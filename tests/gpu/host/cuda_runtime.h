// As much of CUDA's runtime as tests/gpu uses, played by the host, so that the programs for a GPU run (not: perform)
// without one. "Device" memory is the host's; a stream is a thread that does its work in order; the default stream is
// the caller. A kernel's threads run one after the other (device.h), so kernels that wait for each other's threads do
// not belong here. Errors are not played.

#ifndef SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_
#define SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#define __global__

struct CUstream_st {
  CUstream_st() : thread([this] { Work(); }) {}
  ~CUstream_st() {
    Synchronize();
    Enqueue(nullptr);
    thread.join();
  }
  // A null function ends the thread.
  void Enqueue(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  void Synchronize() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return queue.empty(); });
  }
  void Work() {
    while (true) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return !queue.empty(); });
        work = queue.front();
      }
      if (work != nullptr) work();
      const std::lock_guard<std::mutex> lock(mutex);
      queue.pop_front();  // Only now: Synchronize waits for what runs, too.
      changed.notify_all();
      if (work == nullptr) return;
    }
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  std::thread thread;  // Last: it uses the others.
};

using cudaStream_t = CUstream_st*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600 };
enum { cudaStreamNonBlocking = 1, cudaHostAllocMapped = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

namespace syncbn::testing::host_cuda {

// Every stream that there is.
struct Streams {
  std::mutex mutex;
  std::set<cudaStream_t> all;
};
inline Streams& TheStreams() {
  static Streams streams;
  return streams;
}

inline cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
  } else {
    stream->Enqueue(std::move(work));
  }
  return cudaSuccess;
}

struct Dim3 {
  unsigned x = 1;
};

}  // namespace syncbn::testing::host_cuda

inline thread_local syncbn::testing::host_cuda::Dim3 blockIdx, threadIdx, blockDim, gridDim;

struct cudaDeviceProp {
  char name[256] = "no GPU: the host plays one";
  int major = 0, minor = 0, multiProcessorCount = 0;
};

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = cudaDeviceProp();
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return syncbn::testing::host_cuda::Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st();
  auto& streams = syncbn::testing::host_cuda::TheStreams();
  const std::lock_guard<std::mutex> lock(streams.mutex);
  streams.all.insert(*stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  auto& streams = syncbn::testing::host_cuda::TheStreams();
  const std::lock_guard<std::mutex> lock(streams.mutex);
  streams.all.erase(stream);
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream != nullptr) stream->Synchronize();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  auto& streams = syncbn::testing::host_cuda::TheStreams();
  const std::lock_guard<std::mutex> lock(streams.mutex);
  for (cudaStream_t stream : streams.all) stream->Synchronize();
  return cudaSuccess;
}

// Of the driver there is the one function that waits, in the stream, for a value that is so large or larger.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  int (*const wait)(cudaStream_t, unsigned long long, uint32_t,
                    unsigned) = [](cudaStream_t stream, unsigned long long address, uint32_t value, unsigned) {
    return syncbn::testing::host_cuda::Enqueue(stream, [=] {
      const uint32_t* const word = reinterpret_cast<const uint32_t*>(address);
      while (static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0) std::this_thread::yield();
    });
  };
  const bool known = std::strcmp(symbol, "cuStreamWaitValue32") == 0;
  *function = known ? reinterpret_cast<void*>(wait) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

#endif  // SYNCBN_TESTS_GPU_HOST_CUDA_RUNTIME_H_
