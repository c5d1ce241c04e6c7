// The GPU backend of kernels/batch_norm.h: the same four operations, enqueued on a stream, and what turns merged
// statistics into coefficients there.
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
#include "kernels/coefficients.h"

struct CUstream_st;

namespace syncbn::kernels::cuda {

// A cudaError_t by its value: 0 is success. ErrorString() has its text.
using Error = int;
inline constexpr Error kSuccess = 0;
inline constexpr Error kInvalidValue = 1;  // cudaErrorInvalidValue: a workspace too small, a shape with no plan.
inline constexpr Error kNoCuda = 36;       // cudaErrorStubLibrary: built without CUDA.

// Whether this library was built with CUDA and the process has a GPU that it can use.
bool Available();
const char* ErrorString(Error error);

// What a reduction tells the host when its results are written: `flag`, in mapped pinned memory, is set to `value`. A
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

// Workspace for the reductions over a tensor of this shape: 8 KB, and up to some 500 KB for the partial results of
// large tensors. Some 72 bytes a channel beyond that where there are very many channels, no multiple of 2, 4 or 8 (as
// many as 16 bytes hold).
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

// A vector of `channels` values of a floating-point type, or none.
struct ConstVector {
  const void* data = nullptr;
  DataType type = DataType::kFloat32;
};
struct MutableVector {
  void* data = nullptr;
  DataType type = DataType::kFloat32;
};

// What became of a round that has yet to end when the kernels that read it are launched. In mapped pinned memory; the
// host writes it, with the round's vectors, before it lets the stream go on.
struct RoundWords {
  int64_t count = 0;   // Of a forward round.
  uint32_t epoch = 0;  // The newest round of this memory that completed. A round that failed leaves it as it was.
};

// A round as a kernel looks it up: it has failed unless `words` tell that `epoch` completed.
struct LateRound {
  const RoundWords* words = nullptr;  // Null: the round has completed, and the launch's arguments tell of it.
  uint32_t epoch = 0;
};

// From merged statistics to the coefficients of the forward pass, with one update of the running statistics.
struct FinalizeForwardArguments {
  int64_t channels = 0;
  int64_t count = 0;  // Values per channel, over all workers. Not read with late.words, which have it.
  const double* mean = nullptr;
  const double* m2 = nullptr;  // A round's, or in evaluation running_var * count with count = 1.
  ConstVector weight;          // None: 1.
  ConstVector bias;            // None: 0.
  double eps = 1e-5;
  EpsMode eps_mode = EpsMode::kAdd;
  double* out_mean = nullptr;  // The three of ForwardCoefficients. out_mean may be mean.
  double* out_scale = nullptr;
  double* out_shift = nullptr;
  MutableVector running_mean;  // None: not kept.
  MutableVector running_var;
  double momentum = 0.1;
  bool biased_running_var = false;
  LateRound late;
};

// count == 0 leaves the running statistics as they are and takes the variance for 0; count == 1 leaves an unbiased
// running variance as it is. A late round that failed makes all three outputs NaN, and leaves the running statistics as
// they are.
Error FinalizeForward(const Context& context, const FinalizeForwardArguments& arguments);

// From given statistics to the coefficients of a forward pass in evaluation: invstd = 1/sqrt(var + eps).
struct FinalizeEvaluationArguments {
  int64_t channels = 0;
  ConstVector mean;  // Both required.
  ConstVector var;   // Biased or not: it is taken as it is.
  ConstVector weight;
  ConstVector bias;
  double eps = 1e-5;
  double* out_mean = nullptr;  // The three of ForwardCoefficients, and the variance: with count = 1, what
  double* out_var = nullptr;   // FinalizeBackward takes for m2.
  double* out_scale = nullptr;
  double* out_shift = nullptr;
};

Error FinalizeEvaluation(const Context& context, const FinalizeEvaluationArguments& arguments);

// From summed gradients to the coefficients of the backward pass, with the gradients of weight and bias from the
// worker's own sums.
struct FinalizeBackwardArguments {
  int64_t channels = 0;
  int64_t count = 0;  // The forward round's. Not read with late_forward.words, which have it.
  const double* mean = nullptr;
  const double* m2 = nullptr;
  const double* sum_dy = nullptr;  // Summed over all workers. Both null: the statistics are constants.
  const double* sum_dy_xmu = nullptr;
  ConstVector weight;  // None: 1.
  double eps = 1e-5;
  EpsMode eps_mode = EpsMode::kAdd;
  double* out_scale = nullptr;  // With mean, the four of BackwardCoefficients.
  double* out_mean_dy = nullptr;
  double* out_projection = nullptr;
  // The local sums, for the gradients; needed only where one of these is wanted.
  const double* local_sum_dy = nullptr;
  const double* local_sum_dy_xmu = nullptr;
  MutableVector weight_gradient;  // sum_dy_xmu * invstd. None: not computed.
  MutableVector bias_gradient;    // sum_dy.
  LateRound late_forward;
  LateRound late_backward;
};

// If either late round failed, everything that is written is NaN: the gradients too, which would otherwise lack what
// the backward pass of the next layers has lost.
Error FinalizeBackward(const Context& context, const FinalizeBackwardArguments& arguments);

// Loads every kernel of this library for the calling thread's current device. CUDA loads kernels with their first
// launch otherwise, and may wait for the device's streams then: for one that waits for the host, in vain.
Error Preload();

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_BATCH_NORM_H_
