// From merged statistics to the coefficients of a pass, with the update of the running statistics and the gradients of
// weight and bias: one channel at a time, in float64, by the formulas of coefficients.h. The CPU's passes, the CUDA
// kernels and their tests on the host all run these functions, so they all give the same bits.

#ifndef SYNCBN_KERNELS_FINALIZE_H_
#define SYNCBN_KERNELS_FINALIZE_H_

#include <cstdint>

#include "kernels/coefficients.h"
#include "kernels/host_device.h"
#include "kernels/vector_view.h"

namespace syncbn::kernels {

// The outcome of a round that had not ended when the kernels that read it were launched. In mapped pinned memory; the
// host writes it, with the round's vectors, before it lets the stream go on.
struct RoundWords {
  int64_t count = 0;   // A forward round's values in each channel.
  uint32_t epoch = 0;  // The newest round of this memory that completed. A round that failed leaves it as it was.
};

// A round that may not have ended at the launch. By the time a kernel reads `words`, the round has ended: it completed
// if their epoch is this one, and failed otherwise.
struct PendingRound {
  const RoundWords* words = nullptr;  // Null: the round had completed at the launch, and the arguments have its count.
  uint32_t epoch = 0;

  SYNCBN_HOST_DEVICE bool HasFailed() const { return words != nullptr && words->epoch != epoch; }
  SYNCBN_HOST_DEVICE int64_t CountOr(int64_t known) const { return words != nullptr ? words->count : known; }
};

// The forward pass, in training and in evaluation. Vectors have `channels` elements.
struct FinalizeForwardArguments {
  int64_t channels = 0;
  int64_t count = 0;       // Values in each channel, over all workers. Not read if `pending` has words.
  ConstVectorView mean;    // Both required: merged statistics, or in evaluation the given ones.
  ConstVectorView var;     // Biased, in training.
  ConstVectorView weight;  // Absent: 1.
  ConstVectorView bias;    // Absent: 0.
  double eps = 1e-5;
  EpsMode eps_mode = EpsMode::kAdd;
  double* out_mean = nullptr;  // The three of ForwardCoefficients. out_mean may be the memory of mean.
  double* out_scale = nullptr;
  double* out_shift = nullptr;
  VectorView running_mean;  // Updated in place. Absent: not kept.
  VectorView running_var;
  double momentum = 0.1;
  bool biased_running_var = false;
  // The number of batches in the running statistics, this one included: the caller has counted it. Null: not kept.
  int64_t* batches = nullptr;
  bool cumulative = false;  // The weight of the new value is 1 / *batches, and momentum is not read.
  PendingRound pending;

  SYNCBN_HOST_DEVICE double Momentum() const { return cumulative ? 1.0 / static_cast<double>(*batches) : momentum; }
};

// Running statistics stay as they are after a round without values; the running variance does, too, where the round has
// none to give (see RunningUpdate). After a pending round that failed, the three outputs are NaN and running statistics
// stay as they are. The batch is counted out again where the running statistics have not taken it: with channel 0, and
// no channel reads the count then.
SYNCBN_HOST_DEVICE inline void FinalizeForwardChannel(const FinalizeForwardArguments& arguments, int64_t c) {
  // All is read before any of it is used: to a GPU each read of the host's memory takes a microsecond.
  const ConstVectorView running_mean = arguments.running_mean;
  const ConstVectorView running_var = arguments.running_var;
  const uint64_t mean_bits = arguments.mean.Bits(c);
  const uint64_t var_bits = arguments.var.Bits(c);
  const uint64_t weight_bits = arguments.weight.BitsOrNone(c);
  const uint64_t bias_bits = arguments.bias.BitsOrNone(c);
  const uint64_t running_mean_bits = running_mean.BitsOrNone(c);
  const uint64_t running_var_bits = running_var.BitsOrNone(c);
  const bool failed = arguments.pending.HasFailed();
  const int64_t count = arguments.pending.CountOr(arguments.count);
  if (c == 0 && arguments.batches != nullptr && (failed || count == 0)) --*arguments.batches;
  const double mean = arguments.mean.Value(mean_bits);
  const double var = arguments.var.Value(var_bits);
  const double scale = arguments.weight.ValueOr(1.0, weight_bits) * InverseStd(var, arguments.eps, arguments.eps_mode);
  const double shift = arguments.bias.ValueOr(0.0, bias_bits);
  arguments.out_mean[c] = failed ? __builtin_nan("") : mean;
  arguments.out_scale[c] = failed ? __builtin_nan("") : scale;
  arguments.out_shift[c] = failed ? __builtin_nan("") : shift;
  if (failed || count == 0) return;
  const RunningUpdate update(count, arguments.Momentum(), arguments.biased_running_var);
  if (running_mean.present() && update.moves_mean()) {
    arguments.running_mean.Set(c, update.Mean(running_mean.Value(running_mean_bits), mean));
  }
  if (running_var.present() && update.moves_var()) {
    arguments.running_var.Set(c, update.Var(running_var.Value(running_var_bits), var));
  }
}

// The backward pass.
struct FinalizeBackwardArguments {
  int64_t channels = 0;
  int64_t count = 0;               // The forward round's. Not read if `pending_forward` has words.
  ConstVectorView var;             // As in the forward pass.
  const double* sum_dy = nullptr;  // Summed over all workers. Both null: the statistics are constants.
  const double* sum_dy_xmu = nullptr;
  ConstVectorView weight;  // Absent: 1.
  double eps = 1e-5;
  EpsMode eps_mode = EpsMode::kAdd;
  double* out_scale = nullptr;  // With the mean, the four of BackwardCoefficients.
  double* out_mean_dy = nullptr;
  double* out_projection = nullptr;
  // This worker's sums, for the gradients of weight and bias; needed only where one of these is wanted.
  const double* local_sum_dy = nullptr;
  const double* local_sum_dy_xmu = nullptr;
  VectorView weight_gradient;  // sum_dy_xmu * invstd. Absent: not wanted.
  VectorView bias_gradient;    // sum_dy.
  PendingRound pending_forward;
  PendingRound pending_backward;
};

// Writes NaN alone if either pending round failed: to the gradients too, which would otherwise lack what the backward
// pass of the next layers has lost.
SYNCBN_HOST_DEVICE inline void FinalizeBackwardChannel(const FinalizeBackwardArguments& arguments, int64_t c) {
  // All is read before any of it is used, as in the forward pass.
  const bool has_sums = arguments.sum_dy != nullptr;
  const uint64_t var_bits = arguments.var.Bits(c);
  const double merged_dy = has_sums ? arguments.sum_dy[c] : 0.0;
  const double merged_dy_xmu = has_sums ? arguments.sum_dy_xmu[c] : 0.0;
  const double local_dy_xmu = arguments.weight_gradient.present() ? arguments.local_sum_dy_xmu[c] : 0.0;
  const double local_dy = arguments.bias_gradient.present() ? arguments.local_sum_dy[c] : 0.0;
  const uint64_t weight_bits = arguments.weight.BitsOrNone(c);
  const int64_t count = arguments.pending_forward.CountOr(arguments.count);
  const bool forward_failed = arguments.pending_forward.HasFailed();
  const bool backward_failed = arguments.pending_backward.HasFailed();
  const bool failed = forward_failed || backward_failed;
  const double var = arguments.var.Value(var_bits);
  const bool constant = !has_sums || count == 0;
  const double nan = __builtin_nan("");
  const double invstd = failed ? nan : InverseStd(var, arguments.eps, arguments.eps_mode);
  const double mean_dy = constant ? 0.0 : merged_dy / static_cast<double>(count);
  const double projection = constant ? 0.0 : Projection(merged_dy_xmu, count, var, arguments.eps, arguments.eps_mode);
  arguments.out_scale[c] = arguments.weight.ValueOr(1.0, weight_bits) * invstd;
  arguments.out_mean_dy[c] = failed ? nan : mean_dy;
  arguments.out_projection[c] = failed ? nan : projection;
  if (arguments.weight_gradient.present()) arguments.weight_gradient.Set(c, local_dy_xmu * invstd);
  if (arguments.bias_gradient.present()) arguments.bias_gradient.Set(c, failed ? nan : local_dy);
}

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_FINALIZE_H_
