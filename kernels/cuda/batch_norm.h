// The GPU backend of kernels/batch_norm.h: its four operations and the two of finalize.h, enqueued in a stream.
//
// Every pointer is to memory that the GPU can reach: device memory, or pinned host memory that is mapped. Every call is
// one kernel launch and returns at once; it allocates nothing and synchronizes with nothing. The device is the calling
// thread's current one, and the stream is on it.
//
// Results are a function of the inputs alone: equal bits from run to run, from one model of GPU to another, whatever
// the pointers' alignment. (Pointers off a 16-byte boundary cost speed, nothing else.)
//
// Nothing here needs CUDA's headers, and the library links without CUDA: Available() then says no, and everything else
// returns kNoCuda.

#ifndef SYNCBN_KERNELS_CUDA_BATCH_NORM_H_
#define SYNCBN_KERNELS_CUDA_BATCH_NORM_H_

#include <cstddef>
#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/finalize.h"

struct CUstream_st;

namespace syncbn::kernels::cuda {

// A cudaError_t by its value: 0 is success. ErrorString() has its text.
using Error = int;
inline constexpr Error kSuccess = 0;
inline constexpr Error kInvalidValue = 1;  // cudaErrorInvalidValue: a workspace too small, a shape with no plan.
inline constexpr Error kNoCuda = 36;       // cudaErrorStubLibrary: built without CUDA.

// True if this library was built with CUDA and the process has a GPU that it can use.
bool Available();
const char* ErrorString(Error error);

// A reduction's signal to the host that its results are written: `flag`, in mapped pinned memory, is set to `value`. A
// host that has read the value (acquire) may read the results if these are in such memory too, without a call to CUDA.
struct Signal {
  uint32_t* flag = nullptr;  // Null: no signal.
  uint32_t value = 0;
};

struct Context {
  CUstream_st* stream = nullptr;  // A cudaStream_t; null is the default stream.
  // Scratch memory of the reductions, WorkspaceBytes() or more, on a 256-byte boundary, filled with zeros before its
  // first use. Launches on one stream may share it; streams may not. Every launch leaves it ready for the next,
  // whatever the shape; one that is aborted does not.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  Signal signal;
};

// Workspace for the reductions over a tensor of this shape: 8 KB, and up to 900 KB for the partial results of large
// tensors; up to 3.5 MB where planes have fewer than about 8 elements. Some 72 bytes a channel beyond that where there
// are very many channels, no multiple of 2, 4 or 8 (as many as 16 bytes hold).
size_t WorkspaceBytes(const TensorShape& shape);

// The operations, as kernels/batch_norm.h describes them. The element-wise ones need no workspace and send no signal;
// on a tensor without elements they launch nothing, and the reductions write zeros. Returns the launch's error; errors
// of the kernel surface at a later call, as always with CUDA.
Error BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2);

Error BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                     const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y);

Error BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                              const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu);

Error BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                             void* d_residual);

// Finalize every channel by kernels/finalize.h, from vectors that the GPU can reach.
Error FinalizeForward(const Context& context, const FinalizeForwardArguments& arguments);
Error FinalizeBackward(const Context& context, const FinalizeBackwardArguments& arguments);

// Loads every kernel of this library for the calling thread's current device. CUDA loads kernels with their first
// launch otherwise, and may wait for the device's streams then: for one that waits for the host, in vain.
Error Preload();

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_BATCH_NORM_H_
