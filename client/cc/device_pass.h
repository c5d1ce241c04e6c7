// The passes of batch_norm_pass.h over CUDA tensors. Everything is enqueued in the caller's stream; nothing here waits
// for it, but for what DeviceRound says. Which passes are stream-ordered is decided here.

#ifndef SYNCBN_CLIENT_CC_DEVICE_PASS_H_
#define SYNCBN_CLIENT_CC_DEVICE_PASS_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_round.h"

namespace syncbn {

struct DevicePass {
  std::shared_ptr<SlotLease> lease;
  std::shared_ptr<DeviceRound> round;  // Null: there is none.
  bool stream_ordered = false;         // Of a forward pass.
};

// Writes a round's result, merged moments (with the count) or sums, where the finalizing kernels read it. The pass's
// flag is up.
void WriteMerged(const DeviceSlot& slot, const RoundResult& moments);
void WriteMergedSums(const DeviceSlot& slot, const RoundResult& sums);

// The arguments have been checked as for a CPU.
absl::StatusOr<DevicePass> StartDeviceForward(Worker& worker, absl::string_view layer, const TensorView& x,
                                              const PassOptions& options);
absl::Status FinishDeviceForward(const BatchStatistics& statistics, bool biased_running_var, const TensorView& x,
                                 const ForwardOutputs& outputs);
absl::StatusOr<DevicePass> StartDeviceBackward(Worker& worker, const BatchStatistics& statistics,
                                               const BackwardInputs& inputs, const PassOptions& options,
                                               bool has_round);
absl::Status FinishDeviceBackward(const SlotLease& lease, bool has_round, const BatchStatistics& statistics,
                                  const BackwardInputs& inputs, const BackwardOutputs& outputs);
absl::Status EvaluateOnDevice(const TensorView& x, const EvaluateOptions& options, void* y);
absl::Status EvaluateBackwardOnDevice(const BackwardInputs& inputs, const EvaluateOptions& options,
                                      const BackwardOutputs& outputs);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_PASS_H_
