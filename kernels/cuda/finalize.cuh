// FinalizeForward, FinalizeEvaluation and FinalizeBackward: one channel, in float64, by the formulas of
// kernels/coefficients.h.
//
// Mapping: a thread for each channel; nothing is shared and nothing added up, so nothing depends on any order.
// A round that was late, that is, had yet to end when the kernel was launched, tells here whether it completed and, of
// a forward round, how many values it counted; the host has written both before it let the stream go on. Bytes moved:
// some 60 to 80 a channel. The time is that of a launch and of reading merged statistics from host memory.

#ifndef SYNCBN_KERNELS_CUDA_FINALIZE_CUH_
#define SYNCBN_KERNELS_CUDA_FINALIZE_CUH_

#include <cstdint>

#include "kernels/coefficients.h"
#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/element.cuh"

namespace syncbn::kernels::cuda {

inline constexpr int kFinalizeThreads = 128;

SYNCBN_HOST_DEVICE inline double NotANumber() { return __builtin_nan(""); }

SYNCBN_HOST_DEVICE inline double ReadParameter(const void* data, DataType type, int64_t i) {
  switch (type) {
    case DataType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DataType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DataType::kFloat16:
      return Widen(static_cast<const Float16*>(data)[i]);
    case DataType::kBFloat16:
      return Widen(static_cast<const BFloat16*>(data)[i]);
  }
  return 0.0;
}

SYNCBN_HOST_DEVICE inline void WriteParameter(double value, void* data, DataType type, int64_t i) {
  switch (type) {
    case DataType::kFloat32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      return;
    case DataType::kFloat64:
      static_cast<double*>(data)[i] = value;
      return;
    case DataType::kFloat16:
      static_cast<Float16*>(data)[i] = Narrow<Float16>::From(static_cast<float>(value));
      return;
    case DataType::kBFloat16:
      static_cast<BFloat16*>(data)[i] = Narrow<BFloat16>::From(static_cast<float>(value));
      return;
  }
}

SYNCBN_HOST_DEVICE inline void UpdateRunningAt(const MutableVector& running, int64_t channel, double observed,
                                               double momentum) {
  if (running.data == nullptr) return;
  const double before = ReadParameter(running.data, running.type, channel);
  WriteParameter(UpdateRunning(before, observed, momentum), running.data, running.type, channel);
}

SYNCBN_HOST_DEVICE inline bool HasFailed(const LateRound& late) {
  return late.words != nullptr && late.words->epoch != late.epoch;
}

SYNCBN_HOST_DEVICE inline void FinalizeForwardChannel(const FinalizeForwardArguments& arguments, int64_t c) {
  if (HasFailed(arguments.late)) {
    arguments.out_mean[c] = arguments.out_scale[c] = arguments.out_shift[c] = NotANumber();
    return;
  }
  const int64_t count = arguments.late.words != nullptr ? arguments.late.words->count : arguments.count;
  const double mean = arguments.mean[c];
  const double var = count > 0 ? arguments.m2[c] / static_cast<double>(count) : 0.0;
  const double weight =
      arguments.weight.data == nullptr ? 1.0 : ReadParameter(arguments.weight.data, arguments.weight.type, c);
  arguments.out_mean[c] = mean;
  arguments.out_scale[c] = weight * InverseStd(var, arguments.eps, arguments.eps_mode);
  arguments.out_shift[c] =
      arguments.bias.data == nullptr ? 0.0 : ReadParameter(arguments.bias.data, arguments.bias.type, c);
  if (count == 0) return;
  UpdateRunningAt(arguments.running_mean, c, mean, arguments.momentum);
  const bool biased = arguments.biased_running_var;
  if (count == 1 && !biased) return;
  UpdateRunningAt(arguments.running_var, c, RunningVariance(var, count, biased), arguments.momentum);
}

SYNCBN_HOST_DEVICE inline void FinalizeEvaluationChannel(const FinalizeEvaluationArguments& arguments, int64_t c) {
  const double var = ReadParameter(arguments.var.data, arguments.var.type, c);
  const double weight =
      arguments.weight.data == nullptr ? 1.0 : ReadParameter(arguments.weight.data, arguments.weight.type, c);
  arguments.out_mean[c] = ReadParameter(arguments.mean.data, arguments.mean.type, c);
  arguments.out_var[c] = var;
  arguments.out_scale[c] = weight * InverseStd(var, arguments.eps, EpsMode::kAdd);
  arguments.out_shift[c] =
      arguments.bias.data == nullptr ? 0.0 : ReadParameter(arguments.bias.data, arguments.bias.type, c);
}

SYNCBN_HOST_DEVICE inline void FinalizeBackwardChannel(const FinalizeBackwardArguments& arguments, int64_t c) {
  if (HasFailed(arguments.late_forward) || HasFailed(arguments.late_backward)) {
    arguments.out_scale[c] = arguments.out_mean_dy[c] = arguments.out_projection[c] = NotANumber();
    if (arguments.weight_gradient.data != nullptr) {
      WriteParameter(NotANumber(), arguments.weight_gradient.data, arguments.weight_gradient.type, c);
    }
    if (arguments.bias_gradient.data != nullptr) {
      WriteParameter(NotANumber(), arguments.bias_gradient.data, arguments.bias_gradient.type, c);
    }
    return;
  }
  const int64_t count = arguments.late_forward.words != nullptr ? arguments.late_forward.words->count : arguments.count;
  const double n = static_cast<double>(count);
  const double var = count > 0 ? arguments.m2[c] / n : 0.0;
  const double invstd = InverseStd(var, arguments.eps, arguments.eps_mode);
  const double weight =
      arguments.weight.data == nullptr ? 1.0 : ReadParameter(arguments.weight.data, arguments.weight.type, c);
  arguments.out_scale[c] = weight * invstd;
  const bool constant = arguments.sum_dy == nullptr || count == 0;
  arguments.out_mean_dy[c] = constant ? 0.0 : arguments.sum_dy[c] / n;
  arguments.out_projection[c] =
      constant ? 0.0 : Projection(arguments.sum_dy_xmu[c], count, var, arguments.eps, arguments.eps_mode);
  if (arguments.weight_gradient.data != nullptr) {
    WriteParameter(arguments.local_sum_dy_xmu[c] * invstd, arguments.weight_gradient.data,
                   arguments.weight_gradient.type, c);
  }
  if (arguments.bias_gradient.data != nullptr) {
    WriteParameter(arguments.local_sum_dy[c], arguments.bias_gradient.data, arguments.bias_gradient.type, c);
  }
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_FINALIZE_CUH_
