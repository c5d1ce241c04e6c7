// A GPU as passes over CUDA tensors use it: memory, streams and the kernels, behind an interface that tests implement
// on the host.

#ifndef SYNCBN_CLIENT_CC_DEVICE_RUNTIME_H_
#define SYNCBN_CLIENT_CC_DEVICE_RUNTIME_H_

#include <cstddef>
#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/batch_norm.h"

namespace syncbn {

// A cudaStream_t.
using Stream = CUstream_st*;

// Thread safety: any thread, like CUDA itself. Streams, memory and kernels are those of the calling thread's current
// device. Kernel launches, ZeroDevice and every other call that takes a stream are ordered in it and return at once.
class DeviceRuntime {
 public:
  using Error = kernels::cuda::Error;
  static constexpr Error kSuccess = kernels::cuda::kSuccess;
  static constexpr Error kNotReady = 600;  // cudaErrorNotReady.

  // CUDA's, or a test's; null in a build without CUDA. Touches no driver.
  static DeviceRuntime* Get();
  // Makes Get() return `runtime`, which must outlive everything; null: CUDA's again.
  static void SetForTesting(DeviceRuntime* runtime);

  virtual ~DeviceRuntime() = default;

  // The version of CUDA that the library was built with: "13.0".
  virtual const char* Version() const = 0;
  virtual const char* ErrorString(Error error) const = 0;

  virtual Error CurrentDevice(int* device) = 0;
  // Makes a device the calling thread's current one until LeaveDevice, which makes the previous one current again
  // without a use of it: a device that nothing has used stays without a context, which takes hundreds of MB there.
  virtual Error EnterDevice(int device) = 0;
  virtual void LeaveDevice() = 0;

  // A number that no other stream of the process ever has, unlike its handle.
  virtual Error StreamId(Stream stream, uint64_t* id) = 0;
  // Returns kSuccess if all work is done, kNotReady if it is not, and otherwise an error, which may be that of any work
  // of the process.
  virtual Error StreamState(Stream stream) = 0;
  virtual Error StreamIsCapturing(Stream stream, bool* capturing) = 0;

  // Sets *can to true if WaitForValue works on the current device. May synchronize with it.
  virtual Error CanWaitForValue(bool* can) = 0;
  // Makes all later work of the stream wait until int32(*address - value) >= 0; `address` is in pinned memory.
  virtual Error WaitForValue(Stream stream, const uint32_t* address, uint32_t value) = 0;

  // Host memory that every device reaches at the same address, zeroed.
  virtual Error AllocatePinned(size_t bytes, void** memory) = 0;
  virtual Error AllocateDevice(size_t bytes, void** memory) = 0;
  virtual Error ZeroDevice(Stream stream, void* memory, size_t bytes) = 0;
  // Memory of a stream's own work, which a graph that is being captured there allocates and frees with each replay.
  virtual Error AllocateInStream(Stream stream, size_t bytes, void** memory) = 0;
  virtual Error FreeInStream(Stream stream, void* memory) = 0;
  // Both wait for the device's earlier work.
  virtual void FreePinned(void* memory) = 0;
  virtual void FreeDevice(void* memory) = 0;

  // As in kernels/cuda/batch_norm.h.
  virtual size_t WorkspaceBytes(const kernels::TensorShape& shape) = 0;
  virtual Error BatchNormStats(const kernels::cuda::Context& context, const kernels::TensorShape& shape, const void* x,
                               double* mean, double* m2) = 0;
  virtual Error BatchNormElemt(const kernels::cuda::Context& context, const kernels::TensorShape& shape, const void* x,
                               const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                               void* y) = 0;
  virtual Error BatchNormBackwardReduce(const kernels::cuda::Context& context, const kernels::TensorShape& shape,
                                        const void* dy, const void* x, const double* mean,
                                        const kernels::ReluGate& gate, double* sum_dy, double* sum_dy_xmu) = 0;
  virtual Error BatchNormBackwardElemt(const kernels::cuda::Context& context, const kernels::TensorShape& shape,
                                       const void* dy, const void* x, const kernels::BackwardCoefficients& coefficients,
                                       const kernels::ReluGate& gate, void* dx, void* d_residual) = 0;
  virtual Error FinalizeForward(const kernels::cuda::Context& context,
                                const kernels::FinalizeForwardArguments& arguments) = 0;
  virtual Error FinalizeBackward(const kernels::cuda::Context& context,
                                 const kernels::FinalizeBackwardArguments& arguments) = 0;
  virtual Error Preload() = 0;
};

// The one that talks to CUDA; null in a build without it.
DeviceRuntime* CudaRuntime();

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_RUNTIME_H_
