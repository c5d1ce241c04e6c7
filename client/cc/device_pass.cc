#include "client/cc/device_pass.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

namespace cuda = kernels::cuda;

Stream StreamOf(void* stream) { return static_cast<Stream>(stream); }
cuda::ConstVector Read(const VectorView& vector) { return {vector.data, vector.type}; }
cuda::MutableVector Written(const VectorView& vector) { return {vector.data, vector.type}; }

kernels::EpsMode ModeOf(const BatchStatistics& statistics) {
  return statistics.clamp_eps ? kernels::EpsMode::kClamp : kernels::EpsMode::kAdd;
}

kernels::ForwardCoefficients CoefficientsOf(const DeviceSlot& slot) { return {slot.mean, slot.scale, slot.shift}; }

kernels::ReluGate GateOf(const BackwardInputs& inputs, const DeviceSlot& forward) {
  kernels::ReluGate gate;
  if (!inputs.relu) return gate;
  gate.mask = inputs.relu_mask;
  if (gate.mask == nullptr) gate.forward = CoefficientsOf(forward);
  return gate;
}

// Whether a forward pass that asks for it is stream-ordered; see PassOptions. The device is current.
bool IsStreamOrdered(DeviceRuntime* runtime, const Worker& worker, const TensorView& x, const PassOptions& options) {
  return options.stream_ordered && options.backward_role != BackwardRole::kIfRequired &&
         worker.missing_policy() == MissingPolicy::kFail && x.shape.values_per_channel() >= 2 &&
         PrepareStreamOrder(runtime, x.device_index).ok();
}

// Makes the stream wait for the end of the round of a slot.
absl::Status EnqueueWait(const SlotLease& lease) {
  const DeviceSlot& slot = lease.slot();
  return DeviceStatus(lease.runtime(),
                      lease.runtime()->WaitForValue(lease.memory().stream(), slot.released, slot.epoch),
                      "waiting for the round");
}

absl::Status CheckDevice(const SlotLease& lease, const TensorView& tensor, const char* name) {
  if (tensor.device_index == lease.memory().device()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is on CUDA device ", tensor.device_index,
                                                 ", and the pass began on device ", lease.memory().device()));
}

// From merged statistics to the coefficients in `lease`; the statistics are, or will be, in `forward`.
absl::Status EnqueueForwardCoefficients(const SlotLease& forward, const SlotLease& lease,
                                        const BatchStatistics& statistics, bool biased_running_var,
                                        const ForwardOutputs& outputs) {
  cuda::FinalizeForwardArguments arguments;
  arguments.channels = statistics.channels;
  arguments.count = statistics.count;
  if (statistics.late != nullptr) {
    if (absl::Status status = EnqueueWait(forward); !status.ok()) return status;
    arguments.late = forward.slot().late();
  }
  arguments.mean = forward.slot().merged[0];
  arguments.m2 = forward.slot().merged[1];
  arguments.weight = Read(outputs.weight);
  arguments.bias = Read(outputs.bias);
  arguments.eps = statistics.eps;
  arguments.eps_mode = ModeOf(statistics);
  arguments.out_mean = lease.slot().mean;
  arguments.out_scale = lease.slot().scale;
  arguments.out_shift = lease.slot().shift;
  arguments.running_mean = Written(outputs.running_mean);
  arguments.running_var = Written(outputs.running_var);
  arguments.momentum = outputs.momentum;
  arguments.biased_running_var = biased_running_var;
  return DeviceStatus(lease.runtime(), lease.runtime()->FinalizeForward(lease.context(), arguments), "coefficients");
}

// Sums of dy into the slot's local vectors, with the signal to the host if `signals`. `forward` has the coefficients.
absl::Status EnqueueBackwardReduce(const SlotLease& lease, const DeviceSlot& forward, const BackwardInputs& inputs,
                                   bool signals) {
  const DeviceSlot& slot = lease.slot();
  return lease.memory().Reduce(
      inputs.dy.shape,
      [&](cuda::Context* context) {
        if (signals) context->signal = {slot.flag, slot.epoch};
        return lease.runtime()->BatchNormBackwardReduce(*context, inputs.dy.shape, inputs.dy.data, inputs.x,
                                                        forward.mean, GateOf(inputs, forward), slot.local[0],
                                                        slot.local[1]);
      },
      "backward reduction");
}

// The coefficients of the backward pass, which `arguments` tell the statistics of, then the gradients of the tensors.
absl::Status EnqueueGradients(const SlotLease& lease, const DeviceSlot& forward,
                              cuda::FinalizeBackwardArguments arguments, const BackwardInputs& inputs,
                              const BackwardOutputs& outputs) {
  DeviceRuntime* const runtime = lease.runtime();
  const DeviceSlot& slot = lease.slot();
  arguments.channels = inputs.dy.shape.channels;
  arguments.weight = Read(inputs.weight);
  arguments.out_scale = slot.scale;
  arguments.out_mean_dy = slot.mean_dy;
  arguments.out_projection = slot.projection;
  arguments.local_sum_dy = slot.local[0];
  arguments.local_sum_dy_xmu = slot.local[1];
  arguments.weight_gradient = Written(outputs.d_weight);
  arguments.bias_gradient = Written(outputs.d_bias);
  absl::Status status = DeviceStatus(runtime, runtime->FinalizeBackward(lease.context(), arguments), "coefficients");
  if (!status.ok() || outputs.dx == nullptr) return status;
  const kernels::BackwardCoefficients coefficients{forward.mean, slot.scale, slot.mean_dy, slot.projection};
  return DeviceStatus(
      runtime,
      runtime->BatchNormBackwardElemt(lease.context(), inputs.dy.shape, inputs.dy.data, inputs.x, coefficients,
                                      GateOf(inputs, forward), outputs.dx, outputs.d_residual),
      "backward pass");
}

absl::Status EnqueueEvaluationCoefficients(const SlotLease& lease, int64_t channels, const EvaluateOptions& options,
                                           const VectorView& weight, const VectorView& bias) {
  const DeviceSlot& slot = lease.slot();
  cuda::FinalizeEvaluationArguments arguments;
  arguments.channels = channels;
  arguments.mean = Read(options.mean);
  arguments.var = Read(options.var);
  arguments.weight = Read(weight);
  arguments.bias = Read(bias);
  arguments.eps = options.eps;
  arguments.out_mean = slot.mean;
  arguments.out_var = slot.var;
  arguments.out_scale = slot.scale;
  arguments.out_shift = slot.shift;
  return DeviceStatus(lease.runtime(), lease.runtime()->FinalizeEvaluation(lease.context(), arguments), "coefficients");
}

}  // namespace

void WriteMerged(const DeviceSlot& slot, const RoundResult& moments) {
  const double count = static_cast<double>(moments.count);
  std::copy(moments.first.begin(), moments.first.end(), slot.merged[0]);
  std::transform(moments.second.begin(), moments.second.end(), slot.merged[1],
                 [count](double var) { return var * count; });
}

void WriteMergedSums(const DeviceSlot& slot, const RoundResult& sums) {
  std::copy(sums.first.begin(), sums.first.end(), slot.merged[0]);
  std::copy(sums.second.begin(), sums.second.end(), slot.merged[1]);
}

absl::Status StreamOrderStatus(int device_index) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  if (runtime == nullptr) return absl::UnimplementedError("this build of syncbn is without CUDA");
  const DeviceScope scope(runtime, device_index);
  return scope.status().ok() ? PrepareStreamOrder(runtime, device_index) : scope.status();
}

absl::StatusOr<DevicePass> StartDeviceForward(Worker& worker, absl::string_view layer, const TensorView& x,
                                              const PassOptions& options) {
  if (absl::Status status = DeviceRounds::Of(worker)->Check(); !status.ok()) return status;
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  const DeviceScope scope(runtime, x.device_index);
  if (!scope.status().ok()) return scope.status();
  auto lease = LeaseSlot(runtime, x.device_index, StreamOf(options.stream), x.shape.channels);
  if (!lease.ok()) return lease.status();
  const bool stream_ordered = IsStreamOrdered(runtime, worker, x, options);
  const DeviceSlot& slot = (*lease)->slot();
  const absl::Status launched = (*lease)->memory().Reduce(
      x.shape,
      [&](cuda::Context* context) {
        context->signal = {slot.flag, slot.epoch};
        return runtime->BatchNormStats(*context, x.shape, x.data, slot.local[0], slot.local[1]);
      },
      "statistics");
  if (!launched.ok()) return launched;
  auto begin = [name = std::string(layer), options, shape = x.shape](Worker& owner, const double* mean,
                                                                     const double* m2) {
    const size_t channels = static_cast<size_t>(shape.channels);
    return owner.StartForward(name, options.sequence, shape.values_per_channel(), {mean, channels}, {m2, channels},
                              options.backward_role);
  };
  std::string key = absl::StrCat(layer, " forward");
  if (!stream_ordered) {
    return DevicePass{*lease, DeviceRound::Start(worker, std::move(key), *lease, std::move(begin)), false};
  }
  auto round = DeviceRound::StartStreamOrdered(worker, std::move(key), *lease, std::move(begin), WriteMerged);
  if (!round.ok()) return round.status();
  return DevicePass{*lease, *std::move(round), true};
}

absl::Status FinishDeviceForward(const BatchStatistics& statistics, bool biased_running_var, const TensorView& x,
                                 const ForwardOutputs& outputs) {
  SlotLease& lease = *statistics.device;
  if (absl::Status status = CheckDevice(lease, x, "x"); !status.ok()) return status;
  const DeviceScope scope(lease.runtime(), x.device_index);
  if (!scope.status().ok()) return scope.status();
  absl::Status status = EnqueueForwardCoefficients(lease, lease, statistics, biased_running_var, outputs);
  if (!status.ok()) return status;
  lease.has_coefficients = true;
  return DeviceStatus(
      lease.runtime(),
      lease.runtime()->BatchNormElemt(lease.context(), x.shape, x.data, CoefficientsOf(lease.slot()),
                                      {outputs.residual, outputs.relu, outputs.relu_mask}, outputs.y.data),
      "normalization");
}

absl::StatusOr<DevicePass> StartDeviceBackward(Worker& worker, const BatchStatistics& statistics,
                                               const BackwardInputs& inputs, const PassOptions& options,
                                               bool has_round) {
  const SlotLease& forward = *statistics.device;
  if (absl::Status status = DeviceRounds::Of(worker)->Check(); !status.ok()) return status;
  if (statistics.late != nullptr) {
    if (!statistics.late->BelongsTo(worker)) {
      return absl::InvalidArgumentError("a backward pass belongs to the worker of its forward pass");
    }
    if (absl::Status status = statistics.late->failure(); !status.ok()) return status;
  }
  if (absl::Status status = CheckDevice(forward, inputs.dy, "dy"); !status.ok()) return status;
  // The two passes hand memory to each other in the order of one stream.
  if (!IsOfStream(forward, inputs.dy.device_index, StreamOf(options.stream))) {
    return absl::InvalidArgumentError("a backward pass belongs to the CUDA stream of its forward pass");
  }
  DeviceRuntime* const runtime = forward.runtime();
  const DeviceScope scope(runtime, inputs.dy.device_index);
  if (!scope.status().ok()) return scope.status();
  const int64_t channels = inputs.dy.shape.channels;
  auto lease = LeaseSlot(runtime, inputs.dy.device_index, StreamOf(options.stream), channels);
  if (!lease.ok()) return lease.status();
  if (!forward.has_coefficients) {
    ForwardOutputs parameters;
    parameters.weight = inputs.weight;
    parameters.bias = inputs.bias;
    absl::Status status = EnqueueForwardCoefficients(forward, forward, statistics, false, parameters);
    if (!status.ok()) return status;
    statistics.device->has_coefficients = true;
  }
  if (absl::Status status = EnqueueBackwardReduce(**lease, forward.slot(), inputs, has_round); !status.ok()) {
    return status;
  }
  if (!has_round) return DevicePass{*std::move(lease), nullptr, false};
  auto begin = [name = statistics.layer, sequence = statistics.sequence, late = statistics.late, again = options.again,
                size = static_cast<size_t>(channels)](Worker& owner, const double* sum_dy,
                                                      const double* sum_dy_xmu) -> absl::StatusOr<Round> {
    if (again) return owner.StartBackwardAgain(name, {sum_dy, size}, {sum_dy_xmu, size});
    uint64_t of_forward = sequence;
    if (late != nullptr) {
      const absl::StatusOr<uint64_t> known = late->SequenceAtBegin();
      if (!known.ok()) return known.status();
      of_forward = *known;
    }
    return owner.StartBackward(name, of_forward, {sum_dy, size}, {sum_dy_xmu, size});
  };
  std::string key = absl::StrCat(statistics.layer, " backward");
  if (statistics.late == nullptr) {
    return DevicePass{*lease, DeviceRound::Start(worker, std::move(key), *lease, std::move(begin)), false};
  }
  auto round = DeviceRound::StartStreamOrdered(worker, std::move(key), *lease, std::move(begin), WriteMergedSums);
  if (!round.ok()) return round.status();
  return DevicePass{*lease, *std::move(round), true};
}

absl::Status FinishDeviceBackward(const SlotLease& lease, bool has_round, const BatchStatistics& statistics,
                                  const BackwardInputs& inputs, const BackwardOutputs& outputs) {
  const DeviceSlot& forward = statistics.device->slot();
  if (absl::Status status = CheckDevice(lease, inputs.dy, "dy"); !status.ok()) return status;
  const DeviceScope scope(lease.runtime(), inputs.dy.device_index);
  if (!scope.status().ok()) return scope.status();
  cuda::FinalizeBackwardArguments arguments;
  arguments.count = statistics.count;
  arguments.mean = forward.merged[0];
  arguments.m2 = forward.merged[1];
  arguments.eps = statistics.eps;
  arguments.eps_mode = ModeOf(statistics);
  if (statistics.late != nullptr) arguments.late_forward = forward.late();
  if (has_round) {
    arguments.sum_dy = lease.slot().merged[0];
    arguments.sum_dy_xmu = lease.slot().merged[1];
    if (statistics.late != nullptr) {
      if (absl::Status status = EnqueueWait(lease); !status.ok()) return status;
      arguments.late_backward = lease.slot().late();
    }
  }
  return EnqueueGradients(lease, forward, arguments, inputs, outputs);
}

absl::Status EvaluateOnDevice(const TensorView& x, const EvaluateOptions& options, void* y) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  const DeviceScope scope(runtime, x.device_index);
  if (!scope.status().ok()) return scope.status();
  auto lease = LeaseSlot(runtime, x.device_index, StreamOf(options.stream), x.shape.channels);
  if (!lease.ok()) return lease.status();
  absl::Status status = EnqueueEvaluationCoefficients(**lease, x.shape.channels, options, options.weight, options.bias);
  if (!status.ok()) return status;
  return DeviceStatus(runtime,
                      runtime->BatchNormElemt((*lease)->context(), x.shape, x.data, CoefficientsOf((*lease)->slot()),
                                              {options.residual, options.relu, options.relu_mask}, y),
                      "normalization");
}

absl::Status EvaluateBackwardOnDevice(const BackwardInputs& inputs, const EvaluateOptions& options,
                                      const BackwardOutputs& outputs) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  const DeviceScope scope(runtime, inputs.dy.device_index);
  if (!scope.status().ok()) return scope.status();
  const int64_t channels = inputs.dy.shape.channels;
  auto lease = LeaseSlot(runtime, inputs.dy.device_index, StreamOf(options.stream), channels);
  if (!lease.ok()) return lease.status();
  const DeviceSlot& slot = (*lease)->slot();
  absl::Status status = EnqueueEvaluationCoefficients(**lease, channels, options, inputs.weight, inputs.bias);
  if (!status.ok()) return status;
  if (outputs.d_weight.present() || outputs.d_bias.present()) {
    if (status = EnqueueBackwardReduce(**lease, slot, inputs, false); !status.ok()) return status;
  }
  cuda::FinalizeBackwardArguments arguments;
  arguments.count = 1;  // So that the variance stands for m2.
  arguments.mean = slot.mean;
  arguments.m2 = slot.var;
  arguments.eps = options.eps;
  return EnqueueGradients(**lease, slot, arguments, inputs, outputs);
}

}  // namespace syncbn
