#include "client/cc/batch_norm_pass.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/device_pass.h"
#include "kernels/coefficients.h"

namespace syncbn {
namespace {

namespace cpu = kernels::cpu;

kernels::EpsMode ModeOf(const BatchStatistics& statistics) {
  return statistics.clamp_eps ? kernels::EpsMode::kClamp : kernels::EpsMode::kAdd;
}

absl::Status CheckThreads(int num_threads) {
  if (num_threads >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("num_threads is ", num_threads, "; at least 1 is needed"));
}

// mean, invstd, scale and shift of y = (x - mean) * scale + shift.
struct Affine {
  std::vector<double> mean;
  std::vector<double> invstd;
  std::vector<double> scale;
  std::vector<double> shift;

  Affine(std::vector<double> channel_mean, std::vector<double> channel_invstd, const VectorView& weight,
         const VectorView& bias)
      : mean(std::move(channel_mean)), invstd(std::move(channel_invstd)), scale(invstd), shift(mean.size(), 0.0) {
    for (size_t c = 0; c < mean.size(); ++c) {
      if (weight.present()) scale[c] *= weight.Get(static_cast<int64_t>(c));
      if (bias.present()) shift[c] = bias.Get(static_cast<int64_t>(c));
    }
  }

  kernels::ForwardCoefficients forward() const { return {mean.data(), scale.data(), shift.data()}; }
};

Affine AffineOf(const BatchStatistics& statistics, const VectorView& weight, const VectorView& bias) {
  std::vector<double> invstd(statistics.var.size());
  for (size_t c = 0; c < invstd.size(); ++c) {
    invstd[c] = kernels::InverseStd(statistics.var[c], statistics.eps, ModeOf(statistics));
  }
  return Affine(statistics.mean, std::move(invstd), weight, bias);
}

Affine AffineOf(const EvaluateOptions& options, int64_t channels, const VectorView& weight, const VectorView& bias) {
  std::vector<double> mean(channels);
  std::vector<double> invstd(channels);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = options.mean.Get(c);
    invstd[c] = kernels::InverseStd(options.var.Get(c), options.eps, kernels::EpsMode::kAdd);
  }
  return Affine(std::move(mean), std::move(invstd), weight, bias);
}

kernels::ReluGate GateOf(const BackwardInputs& inputs, const Affine& affine) {
  kernels::ReluGate gate;
  if (!inputs.relu) return gate;
  gate.mask = inputs.relu_mask;
  if (gate.mask == nullptr) gate.forward = affine.forward();
  return gate;
}

void UpdateRunningStatistics(const BatchStatistics& statistics, bool biased, const ForwardOutputs& outputs) {
  if (statistics.count == 0) return;
  const bool has_variance = statistics.count > 1 || biased;
  for (int64_t c = 0; c < static_cast<int64_t>(statistics.mean.size()); ++c) {
    if (outputs.running_mean.present()) {
      const double running = outputs.running_mean.Get(c);
      outputs.running_mean.Set(c, kernels::UpdateRunning(running, statistics.mean[c], outputs.momentum));
    }
    if (outputs.running_var.present() && has_variance) {
      const double observed = kernels::RunningVariance(statistics.var[c], statistics.count, biased);
      outputs.running_var.Set(c, kernels::UpdateRunning(outputs.running_var.Get(c), observed, outputs.momentum));
    }
  }
}

absl::Status CheckChannels(const TensorView& tensor, int64_t channels, absl::string_view layer) {
  if (tensor.shape.channels == channels) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("layer \"", layer, "\" has ", channels, " channels, and the tensor has ", tensor.shape.channels));
}

absl::Status CheckBackward(const BackwardInputs& inputs) {
  if (absl::Status status = Check(inputs.dy, "dy"); !status.ok()) return status;
  if (inputs.x == nullptr && inputs.dy.shape.size() != 0) return absl::InvalidArgumentError("x has no data");
  return absl::OkStatus();
}

absl::Status CheckOutputs(const BackwardOutputs& outputs) {
  if (outputs.d_residual == nullptr || outputs.dx != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError("d_residual is computed together with dx, and dx is not asked for");
}

absl::Status NotWaitedFor() {
  return absl::FailedPreconditionError("the pass has not been waited for, or its round failed");
}

// That a pass goes on where it began.
absl::Status CheckSameKind(const TensorView& tensor, bool on_device, const char* name) {
  if ((tensor.device == Device::kCuda) == on_device) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, on_device ? " is in host memory, and the pass began on a GPU"
                                                                 : " is on a GPU, and the pass began on the CPU"));
}

// Weight and bias gradients from the local sums.
void WriteParameterGradients(const std::vector<double>& sum_dy, const std::vector<double>& sum_dy_xmu,
                             const std::vector<double>& invstd, const BackwardOutputs& outputs) {
  for (size_t c = 0; c < sum_dy.size(); ++c) {
    const int64_t channel = static_cast<int64_t>(c);
    if (outputs.d_weight.present()) outputs.d_weight.Set(channel, sum_dy_xmu[c] * invstd[c]);
    if (outputs.d_bias.present()) outputs.d_bias.Set(channel, sum_dy[c]);
  }
}

// The elementwise half of a backward pass. `mean_dy` and `projection` per channel.
void WriteInputGradients(int num_threads, const BackwardInputs& inputs, const Affine& affine,
                         const std::vector<double>& mean_dy, const std::vector<double>& projection,
                         const BackwardOutputs& outputs) {
  if (outputs.dx == nullptr || inputs.dy.shape.size() == 0) return;
  const kernels::BackwardCoefficients coefficients{affine.mean.data(), affine.scale.data(), mean_dy.data(),
                                                   projection.data()};
  cpu::BatchNormBackwardElemt({num_threads}, inputs.dy.shape, inputs.dy.data, inputs.x, coefficients,
                              GateOf(inputs, affine), outputs.dx, outputs.d_residual);
}

}  // namespace

absl::StatusOr<ForwardPass> ForwardPass::Start(Worker& worker, absl::string_view layer, const TensorView& x,
                                               const PassOptions& options) {
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckThreads(options.num_threads); !status.ok()) return status;
  if (absl::Status status = worker.CheckProcess(); !status.ok()) return status;
  const std::optional<LayerOptions> declared = worker.FindLayer(layer);
  if (!declared.has_value()) {
    return absl::FailedPreconditionError(absl::StrCat("layer \"", layer, "\" has not been declared"));
  }
  if (absl::Status status = CheckChannels(x, declared->channels, layer); !status.ok()) return status;
  ForwardPass pass;
  pass.layer_ = *declared;
  pass.options_ = options;
  pass.rank_ = worker.rank();
  if (x.device == Device::kCuda) {
    absl::StatusOr<DevicePass> started = StartDeviceForward(worker, layer, x, options);
    if (!started.ok()) return started.status();
    pass.device_ = std::move(started->lease);
    pass.device_round_ = std::move(started->round);
    if (started->stream_ordered) {
      BatchStatistics statistics = pass.StatisticsToCome();
      statistics.late = pass.device_round_;
      pass.statistics_ = std::make_shared<BatchStatistics>(std::move(statistics));
    }
    return pass;
  }
  std::vector<double> mean(x.shape.channels);
  std::vector<double> m2(x.shape.channels);
  cpu::BatchNormStats({options.num_threads}, x.shape, x.data, mean.data(), m2.data());
  absl::StatusOr<Round> round =
      worker.StartForward(layer, options.sequence, x.shape.values_per_channel(), mean, m2, options.backward_role);
  if (!round.ok()) return round.status();
  pass.round_ = *std::move(round);
  return pass;
}

uint64_t ForwardPass::sequence() const {
  if (stream_ordered()) return statistics_->sequence;
  return device_round_ != nullptr ? device_round_->sequence() : round_.sequence();
}

BatchStatistics ForwardPass::StatisticsToCome() const {
  BatchStatistics statistics;
  statistics.layer = layer_.name;
  statistics.channels = layer_.channels;
  statistics.eps = layer_.eps;
  statistics.clamp_eps = layer_.eps_mode == EpsMode::kClamp;
  statistics.role = options_.backward_role;
  // Of a stream-ordered pass, whose role tells, and which all workers contribute to.
  statistics.backward_required = options_.backward_role == BackwardRole::kRequired;
  statistics.device = device_;
  return statistics;
}

absl::Status ForwardPass::Wait(absl::Duration timeout) {
  if (waited_for_) return absl::OkStatus();
  const absl::Status status = device_round_ != nullptr ? device_round_->Wait(timeout) : round_.Wait(timeout);
  if (!status.ok()) return status;
  const RoundResult& result = device_round_ != nullptr ? device_round_->result() : round_.result();
  auto statistics = std::make_shared<BatchStatistics>(StatisticsToCome());
  statistics->sequence = device_round_ != nullptr ? device_round_->sequence() : round_.sequence();
  statistics->count = result.count;
  statistics->mean = result.first;
  statistics->var = result.second;
  statistics->backward_required = result.backward_required;
  statistics->counted = !std::binary_search(result.missing_ranks.begin(), result.missing_ranks.end(), rank_);
  if (stream_ordered()) {
    statistics->late = device_round_;
  } else if (device_ != nullptr) {
    WriteMerged(device_->slot(), result);
  }
  statistics_ = std::move(statistics);
  waited_for_ = true;
  return absl::OkStatus();
}

absl::Status ForwardPass::Finish(const TensorView& x, const ForwardOutputs& outputs) const {
  if (statistics_ == nullptr) return NotWaitedFor();
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckAlike(outputs.y, x, "y"); !status.ok()) return status;
  if (absl::Status status = CheckChannels(x, statistics_->channels, layer_.name); !status.ok()) return status;
  if (absl::Status status = CheckSameKind(x, device_ != nullptr, "x"); !status.ok()) return status;
  if (device_ != nullptr) return FinishDeviceForward(*statistics_, layer_.biased_running_variance, x, outputs);
  UpdateRunningStatistics(*statistics_, layer_.biased_running_variance, outputs);
  if (x.shape.size() == 0) return absl::OkStatus();
  const Affine affine = AffineOf(*statistics_, outputs.weight, outputs.bias);
  cpu::BatchNormElemt({options_.num_threads}, x.shape, x.data, affine.forward(),
                      {outputs.residual, outputs.relu, outputs.relu_mask}, outputs.y.data);
  return absl::OkStatus();
}

absl::StatusOr<BackwardPass> BackwardPass::Start(Worker& worker, std::shared_ptr<const BatchStatistics> statistics,
                                                 const BackwardInputs& inputs, const PassOptions& options) {
  if (statistics == nullptr) return NotWaitedFor();
  if (absl::Status status = CheckBackward(inputs); !status.ok()) return status;
  if (absl::Status status = CheckThreads(options.num_threads); !status.ok()) return status;
  const size_t channels = static_cast<size_t>(statistics->channels);
  if (absl::Status status = CheckChannels(inputs.dy, statistics->channels, statistics->layer); !status.ok())
    return status;
  if (absl::Status status = CheckSameKind(inputs.dy, statistics->device != nullptr, "dy"); !status.ok()) return status;
  BackwardPass pass;
  pass.options_ = options;
  pass.has_round_ = statistics->backward_required && statistics->counted && statistics->role != BackwardRole::kNone;
  if (statistics->device != nullptr) {
    absl::StatusOr<DevicePass> started = StartDeviceBackward(worker, *statistics, inputs, options, pass.has_round_);
    if (!started.ok()) return started.status();
    pass.device_ = std::move(started->lease);
    pass.device_round_ = std::move(started->round);
    pass.statistics_ = std::move(statistics);
    return pass;
  }
  pass.sum_dy_.resize(channels);
  pass.sum_dy_xmu_.resize(channels);
  const Affine affine = AffineOf(*statistics, inputs.weight, inputs.bias);
  cpu::BatchNormBackwardReduce({options.num_threads}, inputs.dy.shape, inputs.dy.data, inputs.x, affine.mean.data(),
                               GateOf(inputs, affine), pass.sum_dy_.data(), pass.sum_dy_xmu_.data());
  if (pass.has_round_) {
    absl::StatusOr<Round> round =
        options.again ? worker.StartBackwardAgain(statistics->layer, pass.sum_dy_, pass.sum_dy_xmu_)
                      : worker.StartBackward(statistics->layer, statistics->sequence, pass.sum_dy_, pass.sum_dy_xmu_);
    if (!round.ok()) return round.status();
    pass.round_ = *std::move(round);
  }
  pass.statistics_ = std::move(statistics);
  return pass;
}

absl::Status BackwardPass::Wait(absl::Duration timeout) {
  if (has_round_ && !finished_waiting_) {
    const absl::Status status = device_round_ != nullptr ? device_round_->Wait(timeout) : round_.Wait(timeout);
    if (!status.ok()) return status;
    if (device_round_ != nullptr && statistics_->late == nullptr) {
      WriteMergedSums(device_->slot(), device_round_->result());
    }
  }
  finished_waiting_ = true;
  return absl::OkStatus();
}

absl::Status BackwardPass::Finish(const BackwardInputs& inputs, const BackwardOutputs& outputs) const {
  if (!finished_waiting_ && statistics_->late == nullptr) return NotWaitedFor();
  if (absl::Status status = CheckBackward(inputs); !status.ok()) return status;
  if (absl::Status status = CheckOutputs(outputs); !status.ok()) return status;
  if (absl::Status status = CheckSameKind(inputs.dy, device_ != nullptr, "dy"); !status.ok()) return status;
  if (absl::Status status = CheckChannels(inputs.dy, statistics_->channels, statistics_->layer); !status.ok()) {
    return status;
  }
  if (device_ != nullptr) return FinishDeviceBackward(*device_, has_round_, *statistics_, inputs, outputs);
  const Affine affine = AffineOf(*statistics_, inputs.weight, inputs.bias);
  WriteParameterGradients(sum_dy_, sum_dy_xmu_, affine.invstd, outputs);
  const size_t channels = statistics_->mean.size();
  std::vector<double> mean_dy(channels, 0.0);
  std::vector<double> projection(channels, 0.0);
  if (has_round_ && statistics_->count > 0) {
    const RoundResult& sums = round_.result();
    for (size_t c = 0; c < channels; ++c) {
      mean_dy[c] = sums.first[c] / static_cast<double>(statistics_->count);
      projection[c] = kernels::Projection(sums.second[c], statistics_->count, statistics_->var[c], statistics_->eps,
                                          ModeOf(*statistics_));
    }
  }
  WriteInputGradients(options_.num_threads, inputs, affine, mean_dy, projection, outputs);
  return absl::OkStatus();
}

absl::Status Evaluate(const TensorView& x, const EvaluateOptions& options, void* y) {
  if (absl::Status status = Check(x, "x"); !status.ok()) return status;
  if (absl::Status status = CheckThreads(options.num_threads); !status.ok()) return status;
  if (!options.mean.present() || !options.var.present()) {
    return absl::InvalidArgumentError("evaluation needs a mean and a variance");
  }
  if (x.shape.size() == 0) return absl::OkStatus();
  if (y == nullptr) return absl::InvalidArgumentError("y has no data");
  if (x.device == Device::kCuda) return EvaluateOnDevice(x, options, y);
  const Affine affine = AffineOf(options, x.shape.channels, options.weight, options.bias);
  cpu::BatchNormElemt({options.num_threads}, x.shape, x.data, affine.forward(),
                      {options.residual, options.relu, options.relu_mask}, y);
  return absl::OkStatus();
}

absl::Status EvaluateBackward(const BackwardInputs& inputs, const EvaluateOptions& options,
                              const BackwardOutputs& outputs) {
  if (absl::Status status = CheckBackward(inputs); !status.ok()) return status;
  if (absl::Status status = CheckThreads(options.num_threads); !status.ok()) return status;
  if (!options.mean.present() || !options.var.present()) {
    return absl::InvalidArgumentError("evaluation needs a mean and a variance");
  }
  if (absl::Status status = CheckOutputs(outputs); !status.ok()) return status;
  if (inputs.dy.device == Device::kCuda) return EvaluateBackwardOnDevice(inputs, options, outputs);
  const int64_t channels = inputs.dy.shape.channels;
  const Affine affine = AffineOf(options, channels, inputs.weight, inputs.bias);
  if (outputs.d_weight.present() || outputs.d_bias.present()) {
    std::vector<double> sum_dy(channels);
    std::vector<double> sum_dy_xmu(channels);
    cpu::BatchNormBackwardReduce({options.num_threads}, inputs.dy.shape, inputs.dy.data, inputs.x, affine.mean.data(),
                                 GateOf(inputs, affine), sum_dy.data(), sum_dy_xmu.data());
    WriteParameterGradients(sum_dy, sum_dy_xmu, affine.invstd, outputs);
  }
  const std::vector<double> zeros(channels, 0.0);
  WriteInputGradients(options.num_threads, inputs, affine, zeros, zeros, outputs);
  return absl::OkStatus();
}

}  // namespace syncbn
