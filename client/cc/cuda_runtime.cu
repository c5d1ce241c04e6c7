// DeviceRuntime over CUDA's runtime library, which is linked in and opens the driver with the first call, so a process
// that makes none needs no driver. Functions that only the driver has are looked up there when they are needed.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "client/cc/device_runtime.h"

namespace syncbn {
namespace {

namespace cuda = kernels::cuda;
using kernels::TensorShape;

static_assert(DeviceRuntime::kNotReady == cudaErrorNotReady, "the interface repeats CUDA's number");

#define SYNCBN_TEXT_OF(number) #number
#define SYNCBN_VERSION_TEXT(major, minor) SYNCBN_TEXT_OF(major) "." SYNCBN_TEXT_OF(minor)

// Returns the error as a number and clears it, so that the process's next call does not find it; sticky ones stay.
cuda::Error Checked(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<cuda::Error>(error);
}

// The version of the driver's interface that its functions are looked up with: from CUDA 12.0 on, streams wait for
// values on every Linux driver, without an option of the kernel module.
constexpr unsigned kDriverVersion = 12000;

// A function of the driver, or null.
template <typename Function>
Function* DriverFunction(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  // The legacy stream is what a null handle means to cudart here as well.
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableLegacyStream, &found);
  if (Checked(error) != cuda::kSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Function*>(function);
}

using WaitValue32 = CUresult(CUstream, CUdeviceptr, cuuint32_t, unsigned);
using DeviceGetAttribute = CUresult(int*, CUdevice_attribute, CUdevice);

WaitValue32* FindWaitValue32() {
  static WaitValue32* const function = DriverFunction<WaitValue32>("cuStreamWaitValue32");
  return function;
}

// The runtime uses the driver's numbers for the errors that both have.
cuda::Error Enqueue(WaitValue32* wait, Stream stream, const uint32_t* address, uint32_t value) {
  // Pinned memory has one address for host and devices.
  return static_cast<cuda::Error>(
      wait(stream, reinterpret_cast<CUdeviceptr>(address), value, CU_STREAM_WAIT_VALUE_GEQ));
}

class Runtime : public DeviceRuntime {
 public:
  const char* Version() const override { return SYNCBN_VERSION_TEXT(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__); }
  const char* ErrorString(Error error) const override { return cuda::ErrorString(error); }

  Error CurrentDevice(int* device) override { return Checked(cudaGetDevice(device)); }
  Error SetDevice(int device) override { return Checked(cudaSetDevice(device)); }

  Error StreamId(Stream stream, uint64_t* id) override {
    unsigned long long number = 0;
    const Error error = Checked(cudaStreamGetId(stream, &number));
    *id = number;
    return error;
  }
  Error StreamState(Stream stream) override { return Checked(cudaStreamQuery(stream)); }
  Error StreamIsCapturing(Stream stream, bool* capturing) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const Error error = Checked(cudaStreamIsCapturing(stream, &status));
    *capturing = status != cudaStreamCaptureStatusNone;
    return error;
  }

  // The attribute excludes devices that cannot wait; a wait that is over at once excludes the rest, such as virtual
  // GPUs.
  Error CanWaitForValue(bool* can) override {
    *can = false;
    WaitValue32* const wait = FindWaitValue32();
    auto* const attribute_of = DriverFunction<DeviceGetAttribute>("cuDeviceGetAttribute");
    if (wait == nullptr || attribute_of == nullptr) return kSuccess;
    int device = 0;
    if (const Error error = CurrentDevice(&device); error != kSuccess) return error;
    int attribute = 0;
    if (attribute_of(&attribute, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, device) != CUDA_SUCCESS ||
        attribute == 0) {
      return kSuccess;
    }
    void* word = nullptr;
    if (const Error error = AllocatePinned(sizeof(uint32_t), &word); error != kSuccess) return error;
    cudaStream_t stream = nullptr;
    Error error = Checked(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (error == kSuccess) {
      *can = Enqueue(wait, stream, static_cast<const uint32_t*>(word), 0) == kSuccess;
      error = Checked(cudaStreamSynchronize(stream));
      Checked(cudaStreamDestroy(stream));
    }
    FreePinned(word);
    return error;
  }
  Error WaitForValue(Stream stream, const uint32_t* address, uint32_t value) override {
    WaitValue32* const wait = FindWaitValue32();
    return wait == nullptr ? static_cast<Error>(cudaErrorNotSupported) : Enqueue(wait, stream, address, value);
  }

  Error AllocatePinned(size_t bytes, void** memory) override {
    const Error error = Checked(cudaHostAlloc(memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    if (error == kSuccess) __builtin_memset(*memory, 0, bytes);
    return error;
  }
  Error AllocateDevice(size_t bytes, void** memory) override { return Checked(cudaMalloc(memory, bytes)); }
  Error ZeroDevice(Stream stream, void* memory, size_t bytes) override {
    return Checked(cudaMemsetAsync(memory, 0, bytes, stream));
  }
  void FreePinned(void* memory) override { Checked(cudaFreeHost(memory)); }
  void FreeDevice(void* memory) override { Checked(cudaFree(memory)); }

  size_t WorkspaceBytes(const TensorShape& shape) override { return cuda::WorkspaceBytes(shape); }
  Error BatchNormStats(const cuda::Context& context, const TensorShape& shape, const void* x, double* mean,
                       double* m2) override {
    return cuda::BatchNormStats(context, shape, x, mean, m2);
  }
  Error BatchNormElemt(const cuda::Context& context, const TensorShape& shape, const void* x,
                       const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                       void* y) override {
    return cuda::BatchNormElemt(context, shape, x, coefficients, epilogue, y);
  }
  Error BatchNormBackwardReduce(const cuda::Context& context, const TensorShape& shape, const void* dy, const void* x,
                                const double* mean, const kernels::ReluGate& gate, double* sum_dy,
                                double* sum_dy_xmu) override {
    return cuda::BatchNormBackwardReduce(context, shape, dy, x, mean, gate, sum_dy, sum_dy_xmu);
  }
  Error BatchNormBackwardElemt(const cuda::Context& context, const TensorShape& shape, const void* dy, const void* x,
                               const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate,
                               void* dx, void* d_residual) override {
    return cuda::BatchNormBackwardElemt(context, shape, dy, x, coefficients, gate, dx, d_residual);
  }
  Error FinalizeForward(const cuda::Context& context, const kernels::FinalizeForwardArguments& arguments) override {
    return cuda::FinalizeForward(context, arguments);
  }
  Error FinalizeBackward(const cuda::Context& context, const kernels::FinalizeBackwardArguments& arguments) override {
    return cuda::FinalizeBackward(context, arguments);
  }
  Error Preload() override { return Checked(static_cast<cudaError_t>(cuda::Preload())); }
};

}  // namespace

DeviceRuntime* CudaRuntime() {
  static Runtime runtime;
  return &runtime;
}

}  // namespace syncbn
