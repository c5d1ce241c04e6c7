// DeviceRuntime over CUDA's runtime library, which is linked in and opens the driver with the first call, so a process
// that makes none needs no driver. tests/client/cc/cuda/cuda_runtime_test.cc compiles it against a stand-in for both.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "client/cc/device_runtime.h"
#include "kernels/cuda/driver.cuh"

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

// The functions of the driver that are used here. All drivers of this version have them.
struct Driver {
  template <typename Function>
  static Function* Find(const char* name) {
    return cuda::DriverFunction<Function>(name, kDriverVersion);
  }

  CUresult (*wait_value)(CUstream, CUdeviceptr, cuuint32_t,
                         unsigned) = Find<CUresult(CUstream, CUdeviceptr, cuuint32_t, unsigned)>("cuStreamWaitValue32");
  CUresult (*device_attribute)(int*, CUdevice_attribute,
                               CUdevice) = Find<CUresult(int*, CUdevice_attribute, CUdevice)>("cuDeviceGetAttribute");
  CUresult (*retain_context)(CUcontext*, CUdevice) = Find<CUresult(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain");
  CUresult (*push_context)(CUcontext) = Find<CUresult(CUcontext)>("cuCtxPushCurrent");
  CUresult (*pop_context)(CUcontext*) = Find<CUresult(CUcontext*)>("cuCtxPopCurrent");
  CUresult (*current_device)(CUdevice*) = Find<CUresult(CUdevice*)>("cuCtxGetDevice");

  static const Driver& Get() {
    static const Driver driver;
    return driver;
  }
};

constexpr cuda::Error kNoDriverFunction = cudaErrorNotSupported;

// The runtime uses the driver's numbers for the errors that both have.
cuda::Error Numbered(CUresult result) { return static_cast<cuda::Error>(result); }

cuda::Error Enqueue(Stream stream, const uint32_t* address, uint32_t value) {
  const Driver& driver = Driver::Get();
  if (driver.wait_value == nullptr) return kNoDriverFunction;
  // Pinned memory has one address for host and devices.
  return Numbered(driver.wait_value(stream, reinterpret_cast<CUdeviceptr>(address), value, CU_STREAM_WAIT_VALUE_GEQ));
}

// Sets *context to the context of a device that CUDA's runtime library and everything built on it share. It is made
// with the first call for that device and kept for good, as the runtime library keeps it.
cuda::Error ContextOf(int device, CUcontext* context) {
  struct Table {
    std::mutex mutex;
    std::map<int, CUcontext> contexts;
  };
  static Table* const table = new Table;  // A leak: the end of the process may still need it.
  const std::lock_guard<std::mutex> lock(table->mutex);
  CUcontext& known = table->contexts[device];
  if (known == nullptr) {
    const CUresult result = Driver::Get().retain_context(&known, device);
    if (result != CUDA_SUCCESS) return Numbered(result);
  }
  *context = known;
  return cuda::kSuccess;
}

// Lets the calling thread make calls, for as long as this lives, that would spoil the graph which another thread of the
// process may be capturing: a capture forbids them to all threads, and none of them concerns the captured stream.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // The thread's own, while this lives.
};

class Runtime : public DeviceRuntime {
 public:
  const char* Version() const override { return SYNCBN_VERSION_TEXT(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__); }
  const char* ErrorString(Error error) const override { return cuda::ErrorString(error); }

  // The device of the context that the thread has; where it has none, the one that would get one.
  Error CurrentDevice(int* device) override {
    const Driver& driver = Driver::Get();
    if (driver.current_device != nullptr && driver.current_device(device) == CUDA_SUCCESS) return kSuccess;
    return Checked(cudaGetDevice(device));
  }
  // A push of the context, since the way back by cudaSetDevice would make a context on a device that had none.
  Error EnterDevice(int device) override {
    const Driver& driver = Driver::Get();
    if (driver.retain_context == nullptr || driver.push_context == nullptr || driver.pop_context == nullptr) {
      return kNoDriverFunction;
    }
    CUcontext context = nullptr;
    if (const Error error = ContextOf(device, &context); error != kSuccess) return error;
    return Numbered(driver.push_context(context));
  }
  void LeaveDevice() override {
    CUcontext left = nullptr;
    Driver::Get().pop_context(&left);
  }

  Error StreamId(Stream stream, uint64_t* id) override {
    unsigned long long number = 0;
    const Error error = Checked(cudaStreamGetId(stream, &number));
    *id = number;
    return error;
  }
  Error StreamState(Stream stream) override {
    const BesideCaptures beside;
    return Checked(cudaStreamQuery(stream));
  }
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
    const Driver& driver = Driver::Get();
    if (driver.wait_value == nullptr || driver.device_attribute == nullptr) return kSuccess;
    int device = 0;
    if (const Error error = CurrentDevice(&device); error != kSuccess) return error;
    int attribute = 0;
    if (driver.device_attribute(&attribute, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, device) !=
            CUDA_SUCCESS ||
        attribute == 0) {
      return kSuccess;
    }
    const BesideCaptures beside;
    void* word = nullptr;
    if (const Error error = AllocatePinned(sizeof(uint32_t), &word); error != kSuccess) return error;
    cudaStream_t stream = nullptr;
    Error error = Checked(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (error == kSuccess) {
      *can = Enqueue(stream, static_cast<const uint32_t*>(word), 0) == kSuccess;
      error = Checked(cudaStreamSynchronize(stream));
      Checked(cudaStreamDestroy(stream));
    }
    FreePinned(word);
    return error;
  }
  Error WaitForValue(Stream stream, const uint32_t* address, uint32_t value) override {
    return Enqueue(stream, address, value);
  }

  Error AllocatePinned(size_t bytes, void** memory) override {
    const BesideCaptures beside;
    const Error error = Checked(cudaHostAlloc(memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    if (error == kSuccess) __builtin_memset(*memory, 0, bytes);
    return error;
  }
  Error AllocateDevice(size_t bytes, void** memory) override {
    const BesideCaptures beside;
    return Checked(cudaMalloc(memory, bytes));
  }
  Error ZeroDevice(Stream stream, void* memory, size_t bytes) override {
    return Checked(cudaMemsetAsync(memory, 0, bytes, stream));
  }
  Error AllocateInStream(Stream stream, size_t bytes, void** memory) override {
    return Checked(cudaMallocAsync(memory, bytes, stream));
  }
  Error FreeInStream(Stream stream, void* memory) override { return Checked(cudaFreeAsync(memory, stream)); }
  void FreePinned(void* memory) override {
    const BesideCaptures beside;
    Checked(cudaFreeHost(memory));
  }
  void FreeDevice(void* memory) override {
    const BesideCaptures beside;
    Checked(cudaFree(memory));
  }

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
  Error Preload() override {
    const BesideCaptures beside;
    return Checked(static_cast<cudaError_t>(cuda::Preload()));
  }
};

}  // namespace

DeviceRuntime* CudaRuntime() {
  static Runtime runtime;
  return &runtime;
}

}  // namespace syncbn
