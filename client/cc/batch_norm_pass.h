// One pass of a batch-norm layer: reduce, synchronize, normalize. Stateless building blocks; batch_norm.h has the
// layer.
//
// A pass over CPU tensors computes within the calls. A pass over CUDA tensors enqueues all its work in the caller's
// stream and returns as soon as its kernels are enqueued; it stays on the device and stream where it started, its
// backward passes included. A stream that is being captured into a graph is refused (FAILED_PRECONDITION) by all but
// evaluations; CUDA's errors are INTERNAL.
//
// Host-driven passes over CUDA tensors, the default:
//  - Only Wait waits for the GPU. The round begins within the first Wait (of this pass, or of one that was started
//    later) that finds the reduction complete, so a sequence is known after a Wait.
//  - A round that fails leaves nothing enqueued that would wait for it.
//
// Stream-ordered passes over CUDA tensors (PassOptions::stream_ordered):
//  - Finish may follow Start at once. It enqueues a wait for the round's end in front of its kernels, and the caller
//    runs ahead. A background thread of the worker, started with its first such pass and ended by its close, begins
//    the round when the reduction is complete and releases the stream when the round has ended.
//  - The backward pass of a stream-ordered forward pass is stream-ordered as well, whatever its options.
//  - Failures: the stream goes on in any case. A failure, a deadline, an interrupt or a close of the worker makes y
//    and dx, and the gradients of weight and bias, NaN, and leaves the running statistics as they are. Passes whose
//    rounds the worker has not begun fail with it. The worker's next call returns the error once, with the code and
//    reason that Wait would return: a Start of a pass over CUDA tensors, Worker::StartSum, Settle or Leave. Until
//    then the program computes with NaN, and an optimizer may have stored some. To recover from failures, call Settle
//    before optimizer steps.
//  - Wait is optional, and waits on the host. After it statistics() and sequence() are complete; before it they have
//    the layer's properties alone.
//  - Some passes are host-driven in spite of the option (ForwardPass::stream_ordered() tells): those over fewer than
//    two values in each channel (so that a global count of 0 or 1 is known before anything follows from it), those
//    with the role kIfRequired or the policy kProceed (the forward round decides whether a backward round follows),
//    and those on devices for which StreamOrderStatus is not OK.
//  - Deadlock detection: the master sees two threads of the worker, so deadlocks are found by their deadline, not at
//    once.
//  - Two workers of one group that share a GPU in one process should not both be stream-ordered: the GPU may queue
//    the work of one behind the other's wait, until the deadline ends the round.

#ifndef SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_
#define SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/tensor_view.h"
#include "client/cc/worker.h"
#include "kernels/eps_mode.h"

namespace syncbn {

class Backend;

struct PassOptions {
  int num_threads = 1;
  void* stream = nullptr;                                // For CUDA tensors: a cudaStream_t. Null: the default stream.
  bool stream_ordered = false;                           // Forward passes over CUDA tensors.
  BackwardRole backward_role = BackwardRole::kRequired;  // Forward passes.
  uint64_t sequence = Worker::kNextSequence;             // Forward passes; a backward pass has its forward pass's.
  // Backward passes: true for all but the first through a forward pass. Every worker goes back equally often, in the
  // same order where a layer has several forward passes. The results have the bits of the first.
  bool again = false;
};

// Returns OK if passes on this CUDA device can be stream-ordered. Loads the kernels when a process first asks for a
// device, as the first such pass would. Errors: UNIMPLEMENTED in a build without CUDA; FAILED_PRECONDITION with the
// reason.
absl::Status StreamOrderStatus(int device_index);

// The outcome of a forward round, and the state that its backward passes need.
struct BatchStatistics {
  std::string layer;
  int64_t channels = 0;
  double eps = 0.0;
  EpsMode eps_mode = EpsMode::kAdd;
  BackwardRole role = BackwardRole::kRequired;
  bool stream_ordered = false;
  // Before a stream-ordered pass has been waited for, these four are 0 and empty.
  uint64_t sequence = 0;
  int64_t count = 0;              // Values in each channel, over all workers.
  absl::Span<const double> mean;  // Merged, one element per channel. Valid as long as this object.
  absl::Span<const double> var;   // Merged, biased.
  bool backward_required = false;
  bool counted = true;  // This worker's contribution is in the result.

  std::shared_ptr<Backend> backend;  // The forward pass's.
};

// The arguments of ForwardPass::Finish. Absent vectors and null pointers: not wanted, or the neutral value. Tensors are
// of x's shape, type and layout. The caller owns all memory.
struct ForwardArguments {
  VectorView weight;        // Read. Absent: 1.
  VectorView bias;          // Read. Absent: 0.
  VectorView running_mean;  // Updated in place, unless the global count is 0.
  VectorView running_var;   // Likewise, with M2/(N-1) unless the layer says otherwise; unchanged where it has no value.
  double momentum = 0.1;    // The weight of the new value.
  // The number of batches in the running statistics, on x's device. The caller has counted this one already, and it is
  // counted out again if the running statistics do not take it: the round is a stream-ordered one that fails, or the
  // global count is 0. Null: not kept.
  int64_t* batches = nullptr;
  bool cumulative = false;  // The weight of the new value is 1 / *batches, and momentum is not read.
  const void* residual = nullptr;
  bool relu = false;
  uint8_t* relu_mask = nullptr;  // Written: kernels::ReluMaskBytes bytes. Required with relu and residual if a backward
                                 // pass follows.
  TensorView y;                  // Written. May be x's memory or the residual's, and may not overlap them otherwise.
};

// Thread safety: one thread at a time uses a forward pass, its statistics and its backward passes.
class ForwardPass {
 public:
  // Reduces x to its moments and begins the round.
  // Errors: FAILED_PRECONDITION if the layer has not been declared with the worker; INVALID_ARGUMENT; those of
  // MakeBackend and Worker::StartForward; over CUDA tensors, an earlier failure of a stream-ordered pass.
  static absl::StatusOr<ForwardPass> Start(Worker& worker, absl::string_view layer, const TensorView& x,
                                           const PassOptions& options);
  // As Round::Wait.
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());
  // Normalizes x, which has the values that the pass started with. May be called again, with x in other memory too: a
  // checkpoint computes its activations twice.
  // Errors: FAILED_PRECONDITION before a successful Wait, unless stream-ordered; INVALID_ARGUMENT, also for
  // `cumulative` without `batches`, and for running statistics with a momentum that is not finite; INTERNAL.
  absl::Status Finish(const TensorView& x, const ForwardArguments& arguments) const;
  bool stream_ordered() const { return statistics_ != nullptr && statistics_->stream_ordered; }

  // For CUDA tensors, after a successful Wait.
  uint64_t sequence() const;
  // Null before a successful Wait, unless stream-ordered.
  const std::shared_ptr<const BatchStatistics>& statistics() const { return statistics_; }

 private:
  // The statistics as far as they are known before the round has ended.
  BatchStatistics InitialStatistics(bool stream_ordered) const;

  std::shared_ptr<const LayerOptions> layer_;  // As it was declared when the pass began.
  PassOptions options_;
  uint32_t rank_ = 0;
  std::shared_ptr<Backend> backend_;
  bool waited_for_ = false;
  std::shared_ptr<const BatchStatistics> statistics_;
};

// The inputs of a backward pass, from Start until Finish has returned or, on CUDA, its work has ended.
struct BackwardInputs {
  TensorView dy;
  const void* x = nullptr;  // As in the forward pass.
  VectorView weight;        // As in the forward pass.
  VectorView bias;          // As in the forward pass; read only to gate a ReLU without a mask.
  bool relu = false;
  const uint8_t* relu_mask = nullptr;
};

// Null and absent: not wanted.
struct BackwardOutputs {
  void* dx = nullptr;          // May be dy's memory. May not overlap dy or x otherwise.
  void* d_residual = nullptr;  // Likewise, in other memory than dx.
  VectorView d_weight;         // This worker's own, as torch has it.
  VectorView d_bias;
};

// Thread safety: as ForwardPass.
class BackwardPass {
 public:
  // Reduces dy to its two sums and begins the backward round. There is none if no worker requires it, or if this
  // worker's forward contribution did not count; the statistics are then constants to this worker. Errors: as
  // ForwardPass::Start; FAILED_PRECONDITION for null statistics.
  static absl::StatusOr<BackwardPass> Start(Worker& worker, std::shared_ptr<const BatchStatistics> statistics,
                                            const BackwardInputs& inputs, const PassOptions& options);
  // As Round::Wait.
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());
  // Computes the gradients.
  // Errors: FAILED_PRECONDITION before a successful Wait, unless stream-ordered; INVALID_ARGUMENT; INTERNAL.
  absl::Status Finish(const BackwardOutputs& outputs) const;

  const BackwardInputs& inputs() const { return inputs_; }

 private:
  std::shared_ptr<const BatchStatistics> statistics_;
  BackwardInputs inputs_;
  std::shared_ptr<Backend> backend_;
  bool has_round_ = false;
  bool waited_for_ = false;
};

// The arguments of an evaluation: given statistics, no worker, no round. invstd = 1/sqrt(var + eps) in both epsilon
// modes, as the original has it.
//
// Over CUDA tensors, a stream that is being captured into a graph takes evaluations and their backward passes. Replays
// read tensors, statistics and parameters anew, at the same addresses. The graph allocates memory for a few vectors of
// the channels, and for a backward pass's gradients of weight and bias a workspace; so it is one of those that CUDA
// instantiates once at a time and takes for no child graph.
struct EvaluateArguments {
  int num_threads = 1;
  void* stream = nullptr;  // As in PassOptions.
  VectorView mean;         // Required.
  VectorView var;          // Required. Taken as it is, biased or not.
  VectorView weight;
  VectorView bias;
  double eps = 0.0;
  const void* residual = nullptr;
  bool relu = false;
  uint8_t* relu_mask = nullptr;
};

// Writes y, of x's shape, type and layout.
absl::Status Evaluate(const TensorView& x, const EvaluateArguments& arguments, void* y);
// Computes the gradients of Evaluate, with the statistics constant.
absl::Status EvaluateBackward(const BackwardInputs& inputs, const EvaluateArguments& arguments,
                              const BackwardOutputs& outputs);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_
