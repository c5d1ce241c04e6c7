// One pass of a batch-norm layer: reduce, synchronize, normalize. Stateless building blocks; batch_norm.h has the
// layer.

#ifndef SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_
#define SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/tensor_view.h"
#include "client/cc/worker.h"

namespace syncbn {

class DeviceRound;
class SlotLease;

// CUDA tensors, host-driven (the default): all work is enqueued in the caller's stream, and only Wait waits for it. The
// round begins within the first Wait (of this pass, or of one that was started later) that finds the reduction
// complete, so a sequence is known after a Wait. Finish returns as soon as its kernels are enqueued; Finish and the
// backward pass are of the same device and stream as Start. A stream that is being captured into a graph is refused
// (FAILED_PRECONDITION); errors of CUDA are INTERNAL. A round that fails leaves nothing enqueued that would wait for
// it.
//
// CUDA tensors, stream-ordered: Finish may follow on Start at once. It enqueues a wait for the round's end in front of
// its kernels, and the caller runs ahead; a thread of the worker's, started with its first such pass and ended by its
// close, begins the round when the reduction is complete and releases the stream when the round has ended. The backward
// pass of a stream-ordered forward pass is stream-ordered as well, whatever its options.
//  - Whatever becomes of the round, the stream goes on: a failure, a deadline, an interrupt or a close of the worker
//    make y and dx, and the gradients of weight and bias, NaN, and leave the running statistics as they are. Other
//    passes that the worker has not begun then fail with it. The error, of the code and reason that Wait would return,
//    is returned once, by the worker's next call: a Start of a pass over CUDA tensors, Worker::StartSum, Settle or
//    Leave. Until then the program computes with NaN, and an optimizer may have stored some: who wants to go on after a
//    failure calls Settle before what is to be kept.
//  - Wait is optional, and waits on the host. What statistics() says beyond the layer's properties, and sequence(), are
//    known after it.
//  - Host-driven in spite of stream_ordered (ForwardPass::stream_ordered() tells): a batch of fewer than two values in
//    each channel (a global count of 0 or 1 is thus known before anything follows from it), the role kIfRequired and
//    the policy kProceed (whether a backward round follows is known only after the forward round), and devices for
//    which StreamOrderStatus is not OK.
//  - The worker has two threads to the master's eyes, so deadlocks are found by their deadline, not at once.
//  - Two workers of one group that share a GPU in one process should not both be stream-ordered: the work of one can
//    come to stand behind the other's wait in the GPU's queues; the deadline then ends the round.
struct PassOptions {
  int num_threads = 1;
  void* stream = nullptr;                                // For CUDA tensors: a cudaStream_t. Null: the default stream.
  bool stream_ordered = false;                           // Forward passes over CUDA tensors.
  BackwardRole backward_role = BackwardRole::kRequired;  // Forward passes.
  uint64_t sequence = Worker::kNextSequence;             // Forward passes; a backward pass has its forward pass's.
  // Backward passes: not the first through the forward pass. Every worker goes back as often, in the same order where a
  // layer has several forward passes. The results are those of a first one, bit for bit.
  bool again = false;
};

// OK if passes on this CUDA device can be stream-ordered; else why not: UNIMPLEMENTED in a build without CUDA,
// FAILED_PRECONDITION. Loads the kernels when a process first asks for a device, as the first such pass would.
absl::Status StreamOrderStatus(int device_index);

// What a forward round brought, and what the backward pass needs of it. Per channel.
struct BatchStatistics {
  std::string layer;
  int64_t channels = 0;
  double eps = 0.0;
  bool clamp_eps = false;
  BackwardRole role = BackwardRole::kRequired;
  uint64_t sequence = 0;
  int64_t count = 0;         // Values in each channel, over all workers.
  std::vector<double> mean;  // Merged.
  std::vector<double> var;   // Merged, biased.
  bool backward_required = false;
  bool counted = true;                // This worker's contribution is in the result.
  std::shared_ptr<SlotLease> device;  // The same for the GPU, of a pass over CUDA tensors.
  // Of a stream-ordered pass: its round, which may go on. Before the pass was waited for, sequence, count, mean and var
  // are unknown and empty here.
  std::shared_ptr<DeviceRound> late;
};

// Absent vectors and null pointers: not wanted, or the neutral value. Tensor memory is of x's shape, type and layout.
struct ForwardOutputs {
  VectorView weight;        // Read. Absent: 1.
  VectorView bias;          // Read. Absent: 0.
  VectorView running_mean;  // Updated in place, unless the global count is 0.
  VectorView running_var;   // Likewise, with M2/(N-1) unless the layer says otherwise; unchanged where it has no value.
  double momentum = 0.1;    // Of the new value.
  const void* residual = nullptr;
  bool relu = false;
  uint8_t* relu_mask = nullptr;  // kernels::ReluMaskBytes bytes. Required with relu and residual if a backward follows.
  TensorView y;                  // May share memory with x or the residual.
};

class ForwardPass {
 public:
  // Reduces x to its moments and begins the round. The layer must have been declared with the worker.
  static absl::StatusOr<ForwardPass> Start(Worker& worker, absl::string_view layer, const TensorView& x,
                                           const PassOptions& options);
  // As Round::Wait.
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());
  // Normalizes x. FAILED_PRECONDITION before a successful Wait, unless stream-ordered.
  absl::Status Finish(const TensorView& x, const ForwardOutputs& outputs) const;
  bool stream_ordered() const { return statistics_ != nullptr && statistics_->late != nullptr; }

  // Of a pass over CUDA tensors: after a successful Wait.
  uint64_t sequence() const;
  // Null before a successful Wait, unless stream-ordered.
  const std::shared_ptr<const BatchStatistics>& statistics() const { return statistics_; }

 private:
  // What is known of them before the round has ended.
  BatchStatistics StatisticsToCome() const;

  Round round_;
  LayerOptions layer_;
  PassOptions options_;
  uint32_t rank_ = 0;
  bool waited_for_ = false;
  std::shared_ptr<const BatchStatistics> statistics_;
  // Of CUDA tensors; the round is then device_round_.
  std::shared_ptr<SlotLease> device_;
  std::shared_ptr<DeviceRound> device_round_;
};

struct BackwardInputs {
  TensorView dy;
  const void* x = nullptr;  // As in the forward pass.
  VectorView weight;
  VectorView bias;  // Read only to gate a ReLU without a mask.
  bool relu = false;
  const uint8_t* relu_mask = nullptr;
};

struct BackwardOutputs {
  void* dx = nullptr;  // May be dy's memory.
  void* d_residual = nullptr;
  VectorView d_weight;  // This worker's own, as torch has it.
  VectorView d_bias;
};

class BackwardPass {
 public:
  // Reduces dy to its two sums and begins the backward round. There is none if no worker requires it, or if this
  // worker's forward contribution did not count; the statistics are then constants to this worker.
  static absl::StatusOr<BackwardPass> Start(Worker& worker, std::shared_ptr<const BatchStatistics> statistics,
                                            const BackwardInputs& inputs, const PassOptions& options);
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());
  // FAILED_PRECONDITION before a successful Wait, unless stream-ordered.
  absl::Status Finish(const BackwardInputs& inputs, const BackwardOutputs& outputs) const;

 private:
  std::shared_ptr<const BatchStatistics> statistics_;
  PassOptions options_;
  bool has_round_ = false;
  bool finished_waiting_ = false;
  Round round_;
  std::vector<double> sum_dy_;  // This worker's.
  std::vector<double> sum_dy_xmu_;
  // Of CUDA tensors; the round and the sums are then these.
  std::shared_ptr<SlotLease> device_;
  std::shared_ptr<DeviceRound> device_round_;
};

// Evaluation: given statistics, no worker, no round. invstd = 1/sqrt(var + eps) in both epsilon modes, as the original
// has it.
struct EvaluateOptions {
  int num_threads = 1;
  void* stream = nullptr;  // As in PassOptions.
  VectorView mean;
  VectorView var;
  VectorView weight;
  VectorView bias;
  double eps = 0.0;
  const void* residual = nullptr;
  bool relu = false;
  uint8_t* relu_mask = nullptr;
};

absl::Status Evaluate(const TensorView& x, const EvaluateOptions& options, void* y);
// The gradient of the same, the statistics being constants.
absl::Status EvaluateBackward(const BackwardInputs& inputs, const EvaluateOptions& options,
                              const BackwardOutputs& outputs);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_BATCH_NORM_PASS_H_
