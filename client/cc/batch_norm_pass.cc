#include "client/cc/batch_norm_pass.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/backend.h"
#include "client/cc/device_round.h"
#include "kernels/finalize.h"
#include "plumbing/check.h"
#include "vocabulary/bad_number.h"

namespace syncbn {
namespace {

absl::Status CheckThreads(int num_threads) {
  if (num_threads >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("num_threads is ", num_threads, "; at least 1 is needed"));
}

absl::Status CheckChannels(const TensorView& tensor, int64_t channels, absl::string_view layer) {
  if (tensor.shape.channels == channels) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("layer \"", layer, "\" has ", channels, " channels, and the tensor has ", tensor.shape.channels));
}

absl::Status CheckBackward(const BackwardInputs& inputs, int num_threads) {
  if (absl::Status status = Check(inputs.dy, "dy"); !status.ok()) return status;
  if (inputs.x == nullptr && inputs.dy.shape.size() != 0) return absl::InvalidArgumentError("x has no data");
  return CheckThreads(num_threads);
}

absl::Status CheckOutput(const TensorView& x, const void* residual, const void* y) {
  if (absl::Status status = CheckOverlap(x.shape, y, "y", x.data, "x"); !status.ok()) return status;
  return CheckOverlap(x.shape, y, "y", residual, "the residual");
}

absl::Status CheckOutputs(const BackwardInputs& inputs, const BackwardOutputs& outputs) {
  const kernels::TensorShape& shape = inputs.dy.shape;
  if (outputs.d_residual != nullptr && outputs.dx == nullptr) {
    return absl::InvalidArgumentError("d_residual is computed together with dx, and dx is not asked for");
  }
  if (outputs.d_residual != nullptr && outputs.d_residual == outputs.dx && shape.size() != 0) {
    return absl::InvalidArgumentError("dx and d_residual are the same memory");
  }
  for (const auto& [output, name] : {std::pair(outputs.dx, "dx"), std::pair(outputs.d_residual, "d_residual")}) {
    if (absl::Status status = CheckOverlap(shape, output, name, inputs.dy.data, "dy"); !status.ok()) return status;
    if (absl::Status status = CheckOverlap(shape, output, name, inputs.x, "x"); !status.ok()) return status;
  }
  return CheckOverlap(shape, outputs.dx, "dx", outputs.d_residual, "d_residual");
}

absl::Status CheckEvaluation(const EvaluateArguments& arguments) {
  if (!arguments.mean.present() || !arguments.var.present()) {
    return absl::InvalidArgumentError("evaluation needs a mean and a variance");
  }
  if (IsEps(arguments.eps)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("eps is ", arguments.eps, "; it is finite and not negative"));
}

absl::Status CheckRunningStatistics(const ForwardArguments& arguments) {
  if (arguments.cumulative && arguments.batches == nullptr) {
    return absl::InvalidArgumentError("a cumulative average needs the number of batches");
  }
  const bool reads_momentum =
      !arguments.cumulative && (arguments.running_mean.present() || arguments.running_var.present());
  if (!reads_momentum || std::isfinite(arguments.momentum)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("momentum is ", arguments.momentum, "; it is finite"));
}

absl::Status NotWaitedFor() {
  return absl::FailedPreconditionError("the pass has not been waited for, or its round failed");
}

// Returns the first failure of the worker's stream-ordered passes that no call has returned yet.
absl::Status EarlierFailure(Worker& worker, Device device) {
  return device == Device::kCuda ? DeviceRounds::Of(worker)->Check() : absl::OkStatus();
}

// A backward pass through a stream-ordered forward pass, whose round may have failed, or be another worker's.
absl::Status CheckForwardRound(Worker& worker, const BatchStatistics& statistics) {
  if (!statistics.stream_ordered) return absl::OkStatus();
  const DeviceRound& round = *statistics.backend->device_round();
  if (!round.BelongsTo(worker)) {
    return absl::InvalidArgumentError("a backward pass belongs to the worker of its forward pass");
  }
  return round.failure();
}

kernels::FinalizeForwardArguments Parameters(const VectorView& weight, const VectorView& bias) {
  kernels::FinalizeForwardArguments arguments;
  arguments.weight = weight;
  arguments.bias = bias;
  return arguments;
}

// Computes the backend's forward coefficients, for which `arguments` has the statistics.
absl::Status ComputeCoefficients(Backend& backend, int64_t channels, kernels::FinalizeForwardArguments arguments) {
  arguments.channels = channels;
  arguments.out_mean = backend.vectors().mean;
  arguments.out_scale = backend.vectors().scale;
  arguments.out_shift = backend.vectors().shift;
  return backend.Finalize(arguments);
}

// The same from a forward round.
absl::Status ComputeCoefficients(const BatchStatistics& statistics, kernels::FinalizeForwardArguments arguments) {
  Backend& backend = *statistics.backend;
  if (statistics.stream_ordered) {
    if (absl::Status status = backend.AwaitRound(); !status.ok()) return status;
    arguments.pending = backend.pending_round();
  }
  SYNCBN_CHECK(backend.vectors().merged[1] != nullptr, "the statistics of layer ", statistics.layer, " are not there");
  arguments.count = statistics.count;
  arguments.mean = {backend.vectors().merged[0], kernels::DataType::kFloat64};
  arguments.var = {backend.vectors().merged[1], kernels::DataType::kFloat64};
  arguments.eps = statistics.eps;
  arguments.eps_mode = statistics.eps_mode;
  const absl::Status status = ComputeCoefficients(backend, statistics.channels, arguments);
  if (status.ok()) backend.has_coefficients = true;
  return status;
}

// The same from given statistics.
absl::Status ComputeCoefficients(Backend& backend, int64_t channels, const EvaluateArguments& given,
                                 const VectorView& weight, const VectorView& bias) {
  kernels::FinalizeForwardArguments arguments = Parameters(weight, bias);
  arguments.mean = given.mean;
  arguments.var = given.var;
  arguments.eps = given.eps;
  return ComputeCoefficients(backend, channels, arguments);
}

kernels::ReluGate GateOf(const BackwardInputs& inputs, const Backend& forward) {
  kernels::ReluGate gate;
  if (!inputs.relu) return gate;
  gate.mask = inputs.relu_mask;
  if (gate.mask == nullptr) gate.forward = forward.forward_coefficients();
  return gate;
}

absl::Status ReduceGradients(Backend& backend, const Backend& forward, const BackwardInputs& inputs, bool signals) {
  return backend.BackwardReduce(inputs.dy.shape, inputs.dy.data, inputs.x, forward.vectors().mean,
                                GateOf(inputs, forward), signals);
}

// Computes the gradients of weight, bias and the tensors. `arguments` has the statistics and the summed gradients.
absl::Status ComputeGradients(Backend& backend, const Backend& forward, kernels::FinalizeBackwardArguments arguments,
                              const BackwardInputs& inputs, const BackwardOutputs& outputs) {
  const PassVectors& vectors = backend.vectors();
  arguments.channels = inputs.dy.shape.channels;
  arguments.weight = inputs.weight;
  arguments.out_scale = vectors.scale;
  arguments.out_mean_dy = vectors.mean_dy;
  arguments.out_projection = vectors.projection;
  arguments.local_sum_dy = vectors.local[0];
  arguments.local_sum_dy_xmu = vectors.local[1];
  arguments.weight_gradient = outputs.d_weight;
  arguments.bias_gradient = outputs.d_bias;
  if (absl::Status status = backend.Finalize(arguments); !status.ok()) return status;
  if (outputs.dx == nullptr || inputs.dy.shape.size() == 0) return absl::OkStatus();
  return backend.BackwardElemt(inputs.dy.shape, inputs.dy.data, inputs.x,
                               {forward.vectors().mean, vectors.scale, vectors.mean_dy, vectors.projection},
                               GateOf(inputs, forward), outputs.dx, outputs.d_residual);
}

// Begins a backward round. The forward round of a stream-ordered pass has ended by then, but not when this was made.
DeviceRound::Begin BeginBackward(const BatchStatistics& statistics, bool again) {
  return
      [layer = statistics.layer, sequence = statistics.sequence, again, size = static_cast<size_t>(statistics.channels),
       forward = statistics.stream_ordered ? statistics.backend->device_round() : nullptr](
          Worker& worker, const double* sum_dy, const double* sum_dy_xmu) -> absl::StatusOr<Round> {
        if (again) return worker.StartBackwardAgain(layer, {sum_dy, size}, {sum_dy_xmu, size});
        const absl::StatusOr<uint64_t> known = forward != nullptr ? forward->SequenceAtBegin() : sequence;
        if (!known.ok()) return known.status();
        return worker.StartBackward(layer, *known, {sum_dy, size}, {sum_dy_xmu, size});
      };
}

}  // namespace

absl::StatusOr<ForwardPass> ForwardPass::Start(Worker& worker, absl::string_view layer, const TensorView& x,
                                               const PassOptions& options) {
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckThreads(options.num_threads); !status.ok()) return status;
  if (absl::Status status = worker.CheckProcess(); !status.ok()) return status;
  std::shared_ptr<const LayerOptions> declared = worker.FindLayer(layer);
  if (declared == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("layer \"", layer, "\" has not been declared"));
  }
  if (declared->kind != LayerKind::kBatchNorm) {
    return absl::FailedPreconditionError(
        absl::StrCat("\"", layer, "\" was used for a sum since the layer was declared; declare it again"));
  }
  if (absl::Status status = CheckChannels(x, declared->channels, layer); !status.ok()) return status;
  if (absl::Status status = EarlierFailure(worker, x.device); !status.ok()) return status;
  auto backend = MakeBackend(x, options.num_threads, options.stream);
  if (!backend.ok()) return backend.status();
  ForwardPass pass;
  pass.layer_ = std::move(declared);
  pass.options_ = options;
  pass.rank_ = worker.rank();
  pass.backend_ = *std::move(backend);
  const DeviceScope scope = pass.backend_->Enter();
  if (!scope.status().ok()) return scope.status();
  const bool stream_ordered = options.stream_ordered && options.backward_role != BackwardRole::kIfRequired &&
                              worker.missing_policy() != MissingPolicy::kProceed && x.shape.values_per_channel() >= 2 &&
                              pass.backend_->CanBeStreamOrdered();
  if (absl::Status status = pass.backend_->Reduce(x.shape, x.data); !status.ok()) return status;
  auto begin = [name = pass.layer_->name, options, shape = x.shape](Worker& owner, const double* mean,
                                                                    const double* m2) {
    const size_t channels = static_cast<size_t>(shape.channels);
    return owner.StartForward(name, options.sequence, shape.values_per_channel(), {mean, channels}, {m2, channels},
                              options.backward_role);
  };
  absl::Status status =
      pass.backend_->StartRound(worker, {pass.layer_->name, Phase::kForward}, std::move(begin), stream_ordered);
  if (!status.ok()) return status;
  if (stream_ordered) pass.statistics_ = std::make_shared<BatchStatistics>(pass.InitialStatistics(true));
  return pass;
}

BatchStatistics ForwardPass::InitialStatistics(bool stream_ordered) const {
  BatchStatistics statistics;
  statistics.layer = layer_->name;
  statistics.channels = layer_->channels;
  statistics.eps = layer_->eps;
  statistics.eps_mode = layer_->eps_mode;
  statistics.role = options_.backward_role;
  statistics.stream_ordered = stream_ordered;
  // True of a stream-ordered pass: its role decides, and all workers contribute to it.
  statistics.backward_required = options_.backward_role == BackwardRole::kRequired;
  statistics.backend = backend_;
  return statistics;
}

uint64_t ForwardPass::sequence() const { return stream_ordered() ? statistics_->sequence : backend_->sequence(); }

absl::Status ForwardPass::Wait(absl::Duration timeout) {
  if (waited_for_) return absl::OkStatus();
  if (absl::Status status = backend_->Wait(timeout); !status.ok()) return status;
  const RoundResult& result = backend_->result();
  auto statistics = std::make_shared<BatchStatistics>(InitialStatistics(stream_ordered()));
  statistics->sequence = backend_->sequence();
  statistics->count = result.count;
  statistics->mean = result.first;
  statistics->var = result.second;
  statistics->backward_required = result.backward_required;
  statistics->counted = !std::binary_search(result.missing_ranks.begin(), result.missing_ranks.end(), rank_);
  if (!stream_ordered()) backend_->Deliver();
  statistics_ = std::move(statistics);
  waited_for_ = true;
  return absl::OkStatus();
}

absl::Status ForwardPass::Finish(const TensorView& x, const ForwardArguments& arguments) const {
  if (statistics_ == nullptr) return NotWaitedFor();
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckAlike(arguments.y, x, "y"); !status.ok()) return status;
  if (absl::Status status = CheckOutput(x, arguments.residual, arguments.y.data); !status.ok()) return status;
  if (absl::Status status = CheckRunningStatistics(arguments); !status.ok()) return status;
  if (absl::Status status = CheckChannels(x, statistics_->channels, layer_->name); !status.ok()) return status;
  if (absl::Status status = backend_->CheckPlace(x, "x"); !status.ok()) return status;
  const DeviceScope scope = backend_->Enter();
  if (!scope.status().ok()) return scope.status();
  kernels::FinalizeForwardArguments finalize = Parameters(arguments.weight, arguments.bias);
  finalize.running_mean = arguments.running_mean;
  finalize.running_var = arguments.running_var;
  finalize.momentum = arguments.momentum;
  finalize.batches = arguments.batches;
  finalize.cumulative = arguments.cumulative;
  finalize.biased_running_var = layer_->biased_running_variance;
  if (absl::Status status = ComputeCoefficients(*statistics_, finalize); !status.ok()) return status;
  if (x.shape.size() == 0) return absl::OkStatus();
  return backend_->Normalize(x.shape, x.data, backend_->forward_coefficients(),
                             {arguments.residual, arguments.relu, arguments.relu_mask}, arguments.y.data);
}

absl::StatusOr<BackwardPass> BackwardPass::Start(Worker& worker, std::shared_ptr<const BatchStatistics> statistics,
                                                 const BackwardInputs& inputs, const PassOptions& options) {
  if (statistics == nullptr) return NotWaitedFor();
  if (absl::Status status = CheckBackward(inputs, options.num_threads); !status.ok()) return status;
  if (absl::Status status = CheckChannels(inputs.dy, statistics->channels, statistics->layer); !status.ok()) {
    return status;
  }
  const Backend& forward = *statistics->backend;
  if (absl::Status status = EarlierFailure(worker, inputs.dy.device); !status.ok()) return status;
  if (absl::Status status = CheckForwardRound(worker, *statistics); !status.ok()) return status;
  if (absl::Status status = forward.CheckPlace(inputs.dy, "dy"); !status.ok()) return status;
  auto backend = forward.ForBackward(options.num_threads, options.stream);
  if (!backend.ok()) return backend.status();
  BackwardPass pass;
  pass.inputs_ = inputs;
  pass.backend_ = *std::move(backend);
  pass.has_round_ = statistics->backward_required && statistics->counted && statistics->role != BackwardRole::kNone;
  const DeviceScope scope = pass.backend_->Enter();
  if (!scope.status().ok()) return scope.status();
  if (!forward.has_coefficients) {
    absl::Status status = ComputeCoefficients(*statistics, Parameters(inputs.weight, inputs.bias));
    if (!status.ok()) return status;
  }
  if (absl::Status status = ReduceGradients(*pass.backend_, forward, inputs, pass.has_round_); !status.ok()) {
    return status;
  }
  if (pass.has_round_) {
    absl::Status status =
        pass.backend_->StartRound(worker, {statistics->layer, Phase::kBackward},
                                  BeginBackward(*statistics, options.again), statistics->stream_ordered);
    if (!status.ok()) return status;
  }
  pass.statistics_ = std::move(statistics);
  return pass;
}

absl::Status BackwardPass::Wait(absl::Duration timeout) {
  if (has_round_ && !waited_for_) {
    if (absl::Status status = backend_->Wait(timeout); !status.ok()) return status;
    if (!statistics_->stream_ordered) backend_->Deliver();
  }
  waited_for_ = true;
  return absl::OkStatus();
}

absl::Status BackwardPass::Finish(const BackwardOutputs& outputs) const {
  if (!waited_for_ && !statistics_->stream_ordered) return NotWaitedFor();
  if (absl::Status status = CheckOutputs(inputs_, outputs); !status.ok()) return status;
  const DeviceScope scope = backend_->Enter();
  if (!scope.status().ok()) return scope.status();
  const Backend& forward = *statistics_->backend;
  kernels::FinalizeBackwardArguments arguments;
  arguments.count = statistics_->count;
  arguments.var = {forward.vectors().merged[1], kernels::DataType::kFloat64};
  arguments.eps = statistics_->eps;
  arguments.eps_mode = statistics_->eps_mode;
  if (statistics_->stream_ordered) arguments.pending_forward = forward.pending_round();
  if (has_round_) {
    arguments.sum_dy = backend_->vectors().merged[0];
    arguments.sum_dy_xmu = backend_->vectors().merged[1];
    if (statistics_->stream_ordered) {
      if (absl::Status status = backend_->AwaitRound(); !status.ok()) return status;
      arguments.pending_backward = backend_->pending_round();
    }
  }
  return ComputeGradients(*backend_, forward, arguments, inputs_, outputs);
}

absl::Status Evaluate(const TensorView& x, const EvaluateArguments& arguments, void* y) {
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckThreads(arguments.num_threads); !status.ok()) return status;
  if (absl::Status status = CheckEvaluation(arguments); !status.ok()) return status;
  if (x.shape.size() == 0) return absl::OkStatus();
  if (y == nullptr) return absl::InvalidArgumentError("y has no data");
  if (absl::Status status = CheckOutput(x, arguments.residual, y); !status.ok()) return status;
  const auto backend = MakeEvaluationBackend(x, arguments.num_threads, arguments.stream);
  if (!backend.ok()) return backend.status();
  const DeviceScope scope = (*backend)->Enter();
  if (!scope.status().ok()) return scope.status();
  absl::Status status = ComputeCoefficients(**backend, x.shape.channels, arguments, arguments.weight, arguments.bias);
  if (!status.ok()) return status;
  return (*backend)->Normalize(x.shape, x.data, (*backend)->forward_coefficients(),
                               {arguments.residual, arguments.relu, arguments.relu_mask}, y);
}

absl::Status EvaluateBackward(const BackwardInputs& inputs, const EvaluateArguments& arguments,
                              const BackwardOutputs& outputs) {
  if (absl::Status status = CheckBackward(inputs, arguments.num_threads); !status.ok()) return status;
  if (absl::Status status = CheckEvaluation(arguments); !status.ok()) return status;
  if (absl::Status status = CheckOutputs(inputs, outputs); !status.ok()) return status;
  const auto made = MakeEvaluationBackend(inputs.dy, arguments.num_threads, arguments.stream);
  if (!made.ok()) return made.status();
  Backend& backend = **made;
  const DeviceScope scope = backend.Enter();
  if (!scope.status().ok()) return scope.status();
  absl::Status status = ComputeCoefficients(backend, inputs.dy.shape.channels, arguments, inputs.weight, inputs.bias);
  if (!status.ok()) return status;
  if (outputs.d_weight.present() || outputs.d_bias.present()) {
    if (status = ReduceGradients(backend, backend, inputs, false); !status.ok()) return status;
  }
  kernels::FinalizeBackwardArguments finalize;
  finalize.var = arguments.var;
  finalize.eps = arguments.eps;
  return ComputeGradients(backend, backend, finalize, inputs, outputs);
}

}  // namespace syncbn
