// A synchronized batch-norm layer with its parameters, the counterpart of torch.nn.SyncBatchNorm.

#ifndef SYNCBN_CLIENT_CC_BATCH_NORM_H_
#define SYNCBN_CLIENT_CC_BATCH_NORM_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/tensor_view.h"
#include "client/cc/worker.h"

namespace syncbn {

// Parameters, gradients and running statistics are float64, one element for each channel; tensors have any type.
//
//   BatchNorm::Options options;
//   options.name = "bn1";
//   options.channels = 64;
//   absl::StatusOr<BatchNorm> norm = BatchNorm::Create(worker, options);
//   ...
//   status = norm->Forward(x, y);         // training: a round with all workers
//   status = norm->Backward(x, dy, dx);   // and its backward round; adds to weight_gradient(), bias_gradient()
//   norm->set_training(false);
//   status = norm->Forward(x, y);         // evaluation: running statistics, no round
//
// The worker must outlive the layer; without a worker, only evaluation works.
//
// Thread safety: one thread at a time.
class BatchNorm {
 public:
  // The arguments of torch.nn.SyncBatchNorm, and a few more.
  struct Options {
    std::string name;  // The same on all workers, and unlike any other layer's.
    int64_t channels = 0;
    double eps = 1e-5;
    bool clamp_eps = false;                // 1/sqrt(max(var, eps)) in training.
    std::optional<double> momentum = 0.1;  // Absent: the cumulative average.
    bool affine = true;
    bool track_running_stats = true;  // False: evaluation uses the batch's statistics, and has a round.
    bool biased_running_variance = false;
    bool relu = false;  // Applied to the output in the same pass over memory.
    int num_threads = 1;
  };

  // Returns a layer that has been declared with the worker, if there is one.
  // Errors: INVALID_ARGUMENT for options that cannot be used; those of Worker::DeclareLayer.
  static absl::StatusOr<BatchNorm> Create(Worker* worker, Options options);

  // Computes y = (x - mean) * invstd * weight + bias (and ReLU). y may be x, unless a Backward follows.
  // Errors: those of ForwardPass; UNIMPLEMENTED for CUDA tensors; FAILED_PRECONDITION for training without a worker.
  absl::Status Forward(const TensorView& x, const TensorView& y);
  // Computes the gradients of the newest Forward. dx may be dy.
  // Errors: those of BackwardPass; FAILED_PRECONDITION without a successful Forward.
  absl::Status Backward(const TensorView& x, const TensorView& dy, const TensorView& dx);

  void set_training(bool training) { training_ = training; }
  bool training() const { return training_; }
  const Options& options() const { return options_; }

  // Empty unless affine. Gradients add up until they are cleared.
  absl::Span<double> weight() { return absl::MakeSpan(weight_); }
  absl::Span<double> bias() { return absl::MakeSpan(bias_); }
  absl::Span<double> weight_gradient() { return absl::MakeSpan(weight_gradient_); }
  absl::Span<double> bias_gradient() { return absl::MakeSpan(bias_gradient_); }
  void ClearGradients();

  // Empty unless track_running_stats.
  absl::Span<double> running_mean() { return absl::MakeSpan(running_mean_); }
  absl::Span<double> running_var() { return absl::MakeSpan(running_var_); }
  int64_t num_batches_tracked() const { return num_batches_tracked_; }

 private:
  BatchNorm(Worker* worker, Options options);

  bool uses_batch_statistics() const { return training_ || !options_.track_running_stats; }
  static LayerOptions LayerOf(const Options& options);
  // Declares the layer again if another model of this worker has used its name since.
  absl::Status DeclareAgain();
  absl::Status ForwardOverBatch(const TensorView& x, const TensorView& y);
  EvaluateArguments Evaluation();
  BackwardInputs InputsOf(const TensorView& x, const TensorView& dy);

  Worker* worker_;
  Options options_;
  bool training_ = true;
  std::vector<double> weight_, bias_, weight_gradient_, bias_gradient_;
  std::vector<double> running_mean_, running_var_;
  int64_t num_batches_tracked_ = 0;

  // The outcome of the newest Forward.
  bool has_forward_ = false;
  std::shared_ptr<const BatchStatistics> statistics_;  // Null after an evaluation.
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_BATCH_NORM_H_
