// The C interface: passes over tensors.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "client/c/arguments.h"
#include "client/c/handles.h"
#include "client/c/syncbn.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/tensor_view.h"

namespace {

using syncbn::TensorView;
using syncbn::VectorView;
using syncbn::c::First;
using syncbn::c::Missing;
using syncbn::c::ReadEnum;
using syncbn::c::ReadOptions;
using syncbn::c::Report;
using syncbn::c::Timeout;

absl::Status ReadTensor(const syncbn_tensor* given, const char* name, TensorView* tensor) {
  if (given == nullptr) return Missing(name);
  tensor->data = given->data;
  tensor->shape.batch = given->batch;
  tensor->shape.channels = given->channels;
  tensor->shape.spatial = given->spatial;
  tensor->device_index = given->device_index;
  using kernels_type = syncbn::kernels::DataType;
  using kernels_layout = syncbn::kernels::Layout;
  if (absl::Status status = ReadEnum(given->type, SYNCBN_FLOAT32, SYNCBN_BFLOAT16, kernels_type::kFloat32,
                                     "a tensor's type", &tensor->shape.type);
      !status.ok()) {
    return status;
  }
  if (absl::Status status = ReadEnum(given->layout, SYNCBN_CHANNELS_FIRST, SYNCBN_CHANNELS_LAST,
                                     kernels_layout::kChannelsFirst, "a tensor's layout", &tensor->shape.layout);
      !status.ok()) {
    return status;
  }
  return ReadEnum(given->device, SYNCBN_DEVICE_CPU, SYNCBN_DEVICE_CUDA, syncbn::Device::kCpu, "a tensor's device",
                  &tensor->device);
}

absl::Status ReadVector(const syncbn_vector& given, const char* name, VectorView* vector) {
  vector->data = given.data;
  return ReadEnum(given.type, SYNCBN_FLOAT32, SYNCBN_BFLOAT16, syncbn::kernels::DataType::kFloat32, name,
                  &vector->type);
}

absl::Status ReadPassOptions(const syncbn_pass_options* given, syncbn::PassOptions* pass) {
  syncbn_pass_options options;
  if (absl::Status status = ReadOptions(given, &options); !status.ok()) return status;
  if (options.num_threads != 0) pass->num_threads = options.num_threads;
  pass->stream = options.stream;
  if (options.has_sequence != 0) pass->sequence = options.sequence;
  pass->stream_ordered = options.stream_ordered != 0;
  pass->again = options.again != 0;
  return syncbn::c::ReadRole(options.backward_role, &pass->backward_role);
}

absl::Status ReadBackwardInputs(const syncbn_backward_inputs* given, syncbn::BackwardInputs* inputs) {
  if (given == nullptr) return Missing("inputs");
  syncbn_backward_inputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  inputs->x = known.x;
  inputs->relu = known.relu != 0;
  inputs->relu_mask = known.relu_mask;
  return First({ReadTensor(&known.dy, "dy", &inputs->dy), ReadVector(known.weight, "weight's type", &inputs->weight),
                ReadVector(known.bias, "bias's type", &inputs->bias)});
}

absl::Status ReadBackwardOutputs(const syncbn_backward_outputs* given, syncbn::BackwardOutputs* outputs) {
  if (given == nullptr) return Missing("outputs");
  syncbn_backward_outputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  outputs->dx = known.dx;
  outputs->d_residual = known.d_residual;
  return First({ReadVector(known.d_weight, "d_weight's type", &outputs->d_weight),
                ReadVector(known.d_bias, "d_bias's type", &outputs->d_bias)});
}

absl::Status ReadForwardOutputs(const syncbn_forward_outputs* given, syncbn::ForwardArguments* outputs) {
  if (given == nullptr) return Missing("outputs");
  syncbn_forward_outputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  outputs->momentum = known.momentum;
  outputs->batches = known.batches;
  outputs->cumulative = known.cumulative != 0;
  outputs->residual = known.residual;
  outputs->relu = known.relu != 0;
  outputs->relu_mask = known.relu_mask;
  return First({ReadVector(known.weight, "weight's type", &outputs->weight),
                ReadVector(known.bias, "bias's type", &outputs->bias),
                ReadVector(known.running_mean, "running_mean's type", &outputs->running_mean),
                ReadVector(known.running_var, "running_var's type", &outputs->running_var),
                ReadTensor(&known.y, "y", &outputs->y)});
}

absl::Status ReadEvaluateOptions(const syncbn_evaluate_options* given, syncbn::EvaluateArguments* options) {
  if (given == nullptr) return Missing("options");
  syncbn_evaluate_options known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  if (known.num_threads != 0) options->num_threads = known.num_threads;
  options->stream = known.stream;
  options->eps = known.eps;
  options->residual = known.residual;
  options->relu = known.relu != 0;
  options->relu_mask = known.relu_mask;
  return First({ReadVector(known.mean, "mean's type", &options->mean),
                ReadVector(known.var, "var's type", &options->var),
                ReadVector(known.weight, "weight's type", &options->weight),
                ReadVector(known.bias, "bias's type", &options->bias)});
}

// A pass of the parent's is left as it is: its device memory and its locks are the parent's.
template <typename Pass>
void Delete(Pass* pass) {
  if (pass != nullptr && pass->worker->CheckProcess().ok()) delete pass;
}

// Zeros before a successful wait.
const syncbn::BatchStatistics& Known(const syncbn_forward* forward) {
  static const auto* const unknown = new syncbn::BatchStatistics();
  return forward->pass.statistics() == nullptr ? *unknown : *forward->pass.statistics();
}

}  // namespace

syncbn_code syncbn_stream_order_check(int32_t device_index, syncbn_error** error) {
  return Report(syncbn::StreamOrderStatus(device_index), error);
}

syncbn_code syncbn_forward_start(syncbn_worker* worker, const char* layer, const syncbn_tensor* given_x,
                                 const syncbn_pass_options* given, syncbn_forward** out, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (layer == nullptr || out == nullptr) return Report(Missing(layer == nullptr ? "layer" : "out"), error);
  TensorView x;
  syncbn::PassOptions options;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadPassOptions(given, &options)}); !status.ok()) {
    return Report(status, error);
  }
  auto pass = syncbn::ForwardPass::Start(*worker->worker, layer, x, options);
  if (!pass.ok()) return Report(pass.status(), error);
  *out = new syncbn_forward{worker->worker, *std::move(pass)};
  return 0;
}

syncbn_code syncbn_forward_wait(syncbn_forward* forward, int64_t timeout_ns, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  return Report(forward->pass.Wait(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_forward_finish(syncbn_forward* forward, const syncbn_tensor* given_x,
                                  const syncbn_forward_outputs* given, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  TensorView x;
  syncbn::ForwardArguments outputs;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadForwardOutputs(given, &outputs)}); !status.ok()) {
    return Report(status, error);
  }
  return Report(forward->pass.Finish(x, outputs), error);
}

int32_t syncbn_forward_stream_ordered(const syncbn_forward* forward) { return forward->pass.stream_ordered() ? 1 : 0; }
uint64_t syncbn_forward_sequence(const syncbn_forward* forward) { return forward->pass.sequence(); }
int64_t syncbn_forward_count(const syncbn_forward* forward) { return Known(forward).count; }
const double* syncbn_forward_mean(const syncbn_forward* forward) { return Known(forward).mean.data(); }
const double* syncbn_forward_var(const syncbn_forward* forward) { return Known(forward).var.data(); }
int32_t syncbn_forward_backward_required(const syncbn_forward* forward) {
  return Known(forward).backward_required ? 1 : 0;
}
void syncbn_forward_destroy(syncbn_forward* forward) { Delete(forward); }

syncbn_code syncbn_backward_start(const syncbn_forward* forward, const syncbn_backward_inputs* given_inputs,
                                  const syncbn_pass_options* given, syncbn_backward** out, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  if (out == nullptr) return Report(Missing("out"), error);
  syncbn::BackwardInputs inputs;
  syncbn::PassOptions options;
  if (absl::Status status = First({ReadBackwardInputs(given_inputs, &inputs), ReadPassOptions(given, &options)});
      !status.ok()) {
    return Report(status, error);
  }
  auto pass = syncbn::BackwardPass::Start(*forward->worker, forward->pass.statistics(), inputs, options);
  if (!pass.ok()) return Report(pass.status(), error);
  *out = new syncbn_backward{forward->worker, *std::move(pass)};
  return 0;
}

syncbn_code syncbn_backward_wait(syncbn_backward* backward, int64_t timeout_ns, syncbn_error** error) {
  if (backward == nullptr) return Report(Missing("backward"), error);
  return Report(backward->pass.Wait(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_backward_finish(syncbn_backward* backward, const syncbn_backward_inputs* given_inputs,
                                   const syncbn_backward_outputs* given_outputs, syncbn_error** error) {
  if (backward == nullptr) return Report(Missing("backward"), error);
  syncbn::BackwardInputs inputs;
  syncbn::BackwardOutputs outputs;
  if (absl::Status status =
          First({ReadBackwardInputs(given_inputs, &inputs), ReadBackwardOutputs(given_outputs, &outputs)});
      !status.ok()) {
    return Report(status, error);
  }
  // The pass has its inputs from the start. Others here would be ignored, so they are refused.
  if (inputs.dy.data != backward->pass.inputs().dy.data || inputs.x != backward->pass.inputs().x) {
    return Report(absl::InvalidArgumentError("dy and x are not those that the backward pass was started with"), error);
  }
  return Report(backward->pass.Finish(outputs), error);
}

void syncbn_backward_destroy(syncbn_backward* backward) { Delete(backward); }

syncbn_code syncbn_evaluate(const syncbn_tensor* given_x, const syncbn_evaluate_options* given, void* y,
                            syncbn_error** error) {
  TensorView x;
  syncbn::EvaluateArguments options;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadEvaluateOptions(given, &options)}); !status.ok()) {
    return Report(status, error);
  }
  return Report(syncbn::Evaluate(x, options, y), error);
}

syncbn_code syncbn_evaluate_backward(const syncbn_backward_inputs* given_inputs, const syncbn_evaluate_options* given,
                                     const syncbn_backward_outputs* given_outputs, syncbn_error** error) {
  syncbn::BackwardInputs inputs;
  syncbn::EvaluateArguments options;
  syncbn::BackwardOutputs outputs;
  if (absl::Status status = First({ReadBackwardInputs(given_inputs, &inputs), ReadEvaluateOptions(given, &options),
                                   ReadBackwardOutputs(given_outputs, &outputs)});
      !status.ok()) {
    return Report(status, error);
  }
  return Report(syncbn::EvaluateBackward(inputs, options, outputs), error);
}
