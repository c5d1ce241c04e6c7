// The places where a pass can compute: the CPU, and a stream of a CUDA device.
//
// A Backend belongs to one pass. It owns the pass's vectors, one element per channel, runs the operations of kernels/
// on them and has the pass's round, so that ForwardPass and BackwardPass are written once for both places.

#ifndef SYNCBN_CLIENT_CC_BACKEND_H_
#define SYNCBN_CLIENT_CC_BACKEND_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_round.h"
#include "client/cc/pass_vectors.h"
#include "client/cc/tensor_view.h"
#include "client/cc/worker.h"
#include "kernels/batch_norm.h"
#include "kernels/finalize.h"

namespace syncbn {

// Operations return OK when they are complete (CPU) or enqueued in the stream (CUDA, whose errors are INTERNAL). On
// CUDA they need the device to be current: see Enter.
//
// Thread safety: one thread at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  // Makes the backend's device current for as long as the scope lives.
  virtual DeviceScope Enter() const = 0;
  // OK if the tensor is where the backend computes. INVALID_ARGUMENT otherwise, beginning with `name`.
  virtual absl::Status CheckPlace(const TensorView& tensor, const char* name) const = 0;
  // A backend in the same place for a backward pass through this one's forward pass. INVALID_ARGUMENT for another
  // stream than this one's; the errors of MakeBackend.
  virtual absl::StatusOr<std::shared_ptr<Backend>> ForBackward(int num_threads, void* stream) const = 0;

  // The pass's vectors: the reduction's results, the merged ones and the coefficients.
  const PassVectors& vectors() const { return vectors_; }
  kernels::ForwardCoefficients forward_coefficients() const { return {vectors_.mean, vectors_.scale, vectors_.shift}; }

  // The operations of kernels/batch_norm.h and kernels/finalize.h. Reductions write vectors().local; those that signal
  // are followed by StartRound.
  virtual absl::Status Reduce(const kernels::TensorShape& shape, const void* x) = 0;
  virtual absl::Status Normalize(const kernels::TensorShape& shape, const void* x,
                                 const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                                 void* y) = 0;
  virtual absl::Status BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x,
                                      const double* mean, const kernels::ReluGate& gate, bool signals) = 0;
  virtual absl::Status BackwardElemt(const kernels::TensorShape& shape, const void* dy, const void* x,
                                     const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate,
                                     void* dx, void* d_residual) = 0;
  virtual absl::Status Finalize(const kernels::FinalizeForwardArguments& arguments) = 0;
  virtual absl::Status Finalize(const kernels::FinalizeBackwardArguments& arguments) = 0;

  // Begins the round of vectors().local: now, or once the reduction is complete.
  virtual absl::Status StartRound(Worker& worker, DeviceRound::Key key, DeviceRound::Begin begin,
                                  bool stream_ordered) = 0;
  // As Round::Wait, or DeviceRound::Wait.
  absl::Status Wait(absl::Duration timeout) {
    return device_round_ != nullptr ? device_round_->Wait(timeout) : round_.Wait(timeout);
  }
  // After a successful Wait; a CPU round has its sequence from the start.
  const RoundResult& result() const { return device_round_ != nullptr ? device_round_->result() : round_.result(); }
  uint64_t sequence() const { return device_round_ != nullptr ? device_round_->sequence() : round_.sequence(); }
  // Makes vectors().merged the round's result, after a successful Wait. The result of a stream-ordered round arrives
  // there by itself.
  virtual void Deliver() = 0;

  // Stream-ordered rounds, which only CUDA has. True if work enqueued here can wait for one.
  virtual bool CanBeStreamOrdered() const { return false; }
  // Makes the operations that follow wait for the end of the round.
  virtual absl::Status AwaitRound() { return absl::OkStatus(); }
  // The round as finalizing operations recognize it.
  virtual kernels::PendingRound pending_round() const { return {}; }
  const std::shared_ptr<DeviceRound>& device_round() const { return device_round_; }

  // True once the forward coefficients have been computed.
  bool has_coefficients = false;

 protected:
  PassVectors vectors_;
  Round round_;                                // On a CPU.
  std::shared_ptr<DeviceRound> device_round_;  // On CUDA.
};

// A backend for a pass over `x`, which Check accepts. FAILED_PRECONDITION for a device that cannot be used and for a
// stream that is being captured into a graph; RESOURCE_EXHAUSTED past kMaxSlotBytesPerStream; INTERNAL for CUDA's
// errors.
absl::StatusOr<std::shared_ptr<Backend>> MakeBackend(const TensorView& x, int num_threads, void* stream);

// The same for an evaluation, which has no round: a stream that is being captured into a graph is not refused. The
// graph then allocates the vectors and frees them where the backend ends, which is where the evaluation returns.
absl::StatusOr<std::shared_ptr<Backend>> MakeEvaluationBackend(const TensorView& x, int num_threads, void* stream);

std::shared_ptr<Backend> MakeCpuBackend(int64_t channels, int num_threads);
absl::StatusOr<std::shared_ptr<Backend>> MakeCudaBackend(int device, int64_t channels, void* stream);
absl::StatusOr<std::shared_ptr<Backend>> MakeCudaEvaluationBackend(int device, int64_t channels, void* stream);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_BACKEND_H_
