// DeviceRuntime over CUDA's runtime library, which is linked in and opens the driver with the first call: a process
// that makes none needs no driver.

#include <cuda_runtime_api.h>

#include "client/cc/device_runtime.h"

namespace syncbn {
namespace {

namespace cuda = kernels::cuda;
using kernels::TensorShape;

static_assert(DeviceRuntime::kNotReady == cudaErrorNotReady, "the interface repeats CUDA's number");

#define SYNCBN_TEXT_OF(number) #number
#define SYNCBN_VERSION_TEXT(major, minor) SYNCBN_TEXT_OF(major) "." SYNCBN_TEXT_OF(minor)

// An error that a call returned is not left behind for the process's next call to find; sticky ones stay regardless.
cuda::Error Checked(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<cuda::Error>(error);
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
  Error FinalizeForward(const cuda::Context& context, const cuda::FinalizeForwardArguments& arguments) override {
    return cuda::FinalizeForward(context, arguments);
  }
  Error FinalizeEvaluation(const cuda::Context& context, const cuda::FinalizeEvaluationArguments& arguments) override {
    return cuda::FinalizeEvaluation(context, arguments);
  }
  Error FinalizeBackward(const cuda::Context& context, const cuda::FinalizeBackwardArguments& arguments) override {
    return cuda::FinalizeBackward(context, arguments);
  }
};

}  // namespace

DeviceRuntime* CudaRuntime() {
  static Runtime runtime;
  return &runtime;
}

}  // namespace syncbn
