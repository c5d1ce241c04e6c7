#include "client/cc/batch_norm.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

VectorView View(std::vector<double>& values) {
  return {values.empty() ? nullptr : values.data(), kernels::DataType::kFloat64};
}

absl::Status CheckOptions(const BatchNorm::Options& options) {
  if (options.channels < 1 || options.channels > UINT32_MAX) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer \"", options.name, "\" has ", options.channels, " channels; at least 1 is needed"));
  }
  if (options.num_threads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_threads is ", options.num_threads, "; at least 1 is needed"));
  }
  return absl::OkStatus();
}

}  // namespace

LayerOptions BatchNorm::LayerOf(const Options& options) {
  LayerOptions layer;
  layer.name = options.name;
  layer.channels = static_cast<uint32_t>(options.channels);
  layer.eps = options.eps;
  layer.eps_mode = options.clamp_eps ? EpsMode::kClamp : EpsMode::kAdd;
  layer.momentum = options.momentum;
  layer.biased_running_variance = options.biased_running_variance;
  return layer;
}

absl::StatusOr<BatchNorm> BatchNorm::Create(Worker* worker, Options options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (worker != nullptr) {
    if (absl::Status status = worker->DeclareLayer(LayerOf(options)); !status.ok()) return status;
  }
  return BatchNorm(worker, std::move(options));
}

BatchNorm::BatchNorm(Worker* worker, Options options) : worker_(worker), options_(std::move(options)) {
  const size_t channels = static_cast<size_t>(options_.channels);
  if (options_.affine) {
    weight_.assign(channels, 1.0);
    bias_.assign(channels, 0.0);
    weight_gradient_.assign(channels, 0.0);
    bias_gradient_.assign(channels, 0.0);
  }
  if (options_.track_running_stats) {
    running_mean_.assign(channels, 0.0);
    running_var_.assign(channels, 1.0);
  }
}

void BatchNorm::ClearGradients() {
  std::fill(weight_gradient_.begin(), weight_gradient_.end(), 0.0);
  std::fill(bias_gradient_.begin(), bias_gradient_.end(), 0.0);
}

absl::Status BatchNorm::Forward(const TensorView& x, const TensorView& y) {
  has_forward_ = false;
  statistics_ = nullptr;
  if (x.device != Device::kCpu) {
    return absl::UnimplementedError("BatchNorm has its parameters in host memory; for CUDA tensors use ForwardPass");
  }
  // A round cannot be taken back, so what Finish would refuse is refused before.
  absl::Status status = CheckAlike(y, x, "y");
  if (status.ok()) status = CheckOverlap(x.shape, y.data, "y", x.data, "x");
  if (status.ok()) status = uses_batch_statistics() ? ForwardOverBatch(x, y) : Evaluate(x, Evaluation(), y.data);
  has_forward_ = status.ok();
  return status;
}

absl::Status BatchNorm::DeclareAgain() {
  const std::shared_ptr<const LayerOptions> known = worker_->FindLayer(options_.name);
  const LayerOptions mine = LayerOf(options_);
  return known != nullptr && *known == mine ? absl::OkStatus() : worker_->DeclareLayer(mine);
}

absl::Status BatchNorm::ForwardOverBatch(const TensorView& x, const TensorView& y) {
  if (worker_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("layer \"", options_.name, "\" has no worker to synchronize its batch statistics with"));
  }
  if (absl::Status status = DeclareAgain(); !status.ok()) return status;
  PassOptions pass_options;
  pass_options.num_threads = options_.num_threads;
  absl::StatusOr<ForwardPass> pass = ForwardPass::Start(*worker_, options_.name, x, pass_options);
  if (!pass.ok()) return pass.status();
  if (absl::Status status = pass->Wait(); !status.ok()) return status;
  ForwardArguments arguments;
  arguments.weight = View(weight_);
  arguments.bias = View(bias_);
  if (training_) {
    arguments.running_mean = View(running_mean_);
    arguments.running_var = View(running_var_);
    if (pass->statistics()->count > 0) ++num_batches_tracked_;
    arguments.momentum =
        options_.momentum.value_or(1.0 / static_cast<double>(std::max<int64_t>(num_batches_tracked_, 1)));
  }
  arguments.relu = options_.relu;
  arguments.y = y;
  statistics_ = pass->statistics();
  return pass->Finish(x, arguments);
}

EvaluateArguments BatchNorm::Evaluation() {
  EvaluateArguments evaluation;
  evaluation.num_threads = options_.num_threads;
  evaluation.mean = View(running_mean_);
  evaluation.var = View(running_var_);
  evaluation.weight = View(weight_);
  evaluation.bias = View(bias_);
  evaluation.eps = options_.eps;
  evaluation.relu = options_.relu;
  return evaluation;
}

BackwardInputs BatchNorm::InputsOf(const TensorView& x, const TensorView& dy) {
  BackwardInputs inputs;
  inputs.dy = dy;
  inputs.x = x.data;
  inputs.weight = View(weight_);
  inputs.bias = View(bias_);
  inputs.relu = options_.relu;
  return inputs;
}

absl::Status BatchNorm::Backward(const TensorView& x, const TensorView& dy, const TensorView& dx) {
  if (!has_forward_) return absl::FailedPreconditionError("there was no successful Forward before this Backward");
  if (absl::Status status = CheckAlike(dy, x, "dy"); !status.ok()) return status;
  if (absl::Status status = CheckAlike(dx, x, "dx"); !status.ok()) return status;
  std::vector<double> d_weight(weight_.size());
  std::vector<double> d_bias(bias_.size());
  BackwardOutputs outputs;
  outputs.dx = dx.data;
  outputs.d_weight = View(d_weight);
  outputs.d_bias = View(d_bias);
  const BackwardInputs inputs = InputsOf(x, dy);
  if (statistics_ == nullptr) {
    if (absl::Status status = EvaluateBackward(inputs, Evaluation(), outputs); !status.ok()) return status;
  } else {
    PassOptions pass_options;
    pass_options.num_threads = options_.num_threads;
    absl::StatusOr<BackwardPass> pass = BackwardPass::Start(*worker_, statistics_, inputs, pass_options);
    if (!pass.ok()) return pass.status();
    if (absl::Status status = pass->Wait(); !status.ok()) return status;
    if (absl::Status status = pass->Finish(outputs); !status.ok()) return status;
  }
  for (size_t c = 0; c < d_weight.size(); ++c) {
    weight_gradient_[c] += d_weight[c];
    bias_gradient_[c] += d_bias[c];
  }
  return absl::OkStatus();
}

}  // namespace syncbn
