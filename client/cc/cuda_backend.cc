#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/backend.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_round.h"

namespace syncbn {
namespace {

namespace cuda = kernels::cuda;

Stream StreamOf(void* stream) { return static_cast<Stream>(stream); }

// The pass's vectors are those of a slot of its stream's memory. Everything is enqueued in that stream.
class CudaBackend : public Backend {
 public:
  // FAILED_PRECONDITION for a device that cannot be used; the errors of LeaseSlot.
  static absl::StatusOr<std::shared_ptr<Backend>> Make(DeviceRuntime* runtime, int device, int64_t channels,
                                                       Stream stream) {
    const DeviceScope scope(runtime, device);
    if (!scope.status().ok()) return scope.status();
    auto lease = LeaseSlot(runtime, device, stream, channels);
    if (!lease.ok()) return lease.status();
    return std::make_shared<CudaBackend>(*std::move(lease), channels);
  }

  CudaBackend(std::shared_ptr<SlotLease> lease, int64_t channels)
      : lease_(std::move(lease)), runtime_(lease_->runtime()), channels_(channels) {
    vectors_ = slot();
  }

  DeviceScope Enter() const override { return DeviceScope(runtime_, device()); }
  absl::Status CheckPlace(const TensorView& tensor, const char* name) const override {
    if (tensor.device != Device::kCuda) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is in host memory, and the pass began on a GPU"));
    }
    if (tensor.device_index == device()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is on CUDA device ", tensor.device_index, ", and the pass began on device ", device()));
  }
  absl::StatusOr<std::shared_ptr<Backend>> ForBackward(int, void* stream) const override {
    // The two passes hand memory to each other in the order of one stream.
    if (StreamOf(stream) != lease_->memory().stream()) {
      return absl::InvalidArgumentError("a backward pass belongs to the CUDA stream of its forward pass");
    }
    return Make(runtime_, device(), channels_, StreamOf(stream));
  }

  absl::Status Reduce(const kernels::TensorShape& shape, const void* x) override {
    return lease_->memory().Reduce(
        shape,
        [&](cuda::Context* context) {
          context->signal = {slot().flag, slot().epoch};
          return runtime_->BatchNormStats(*context, shape, x, vectors_.local[0], vectors_.local[1]);
        },
        "statistics");
  }
  absl::Status Normalize(const kernels::TensorShape& shape, const void* x,
                         const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                         void* y) override {
    return Enqueued(runtime_->BatchNormElemt(lease_->context(), shape, x, coefficients, epilogue, y), "normalization");
  }
  absl::Status BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x, const double* mean,
                              const kernels::ReluGate& gate, bool signals) override {
    return lease_->memory().Reduce(
        shape,
        [&](cuda::Context* context) {
          if (signals) context->signal = {slot().flag, slot().epoch};
          return runtime_->BatchNormBackwardReduce(*context, shape, dy, x, mean, gate, vectors_.local[0],
                                                   vectors_.local[1]);
        },
        "backward reduction");
  }
  absl::Status BackwardElemt(const kernels::TensorShape& shape, const void* dy, const void* x,
                             const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate, void* dx,
                             void* d_residual) override {
    return Enqueued(
        runtime_->BatchNormBackwardElemt(lease_->context(), shape, dy, x, coefficients, gate, dx, d_residual),
        "backward pass");
  }
  absl::Status Finalize(const kernels::FinalizeForwardArguments& arguments) override {
    return Enqueued(runtime_->FinalizeForward(lease_->context(), arguments), "coefficients");
  }
  absl::Status Finalize(const kernels::FinalizeBackwardArguments& arguments) override {
    return Enqueued(runtime_->FinalizeBackward(lease_->context(), arguments), "coefficients");
  }

  absl::Status StartRound(Worker& worker, DeviceRound::Key key, DeviceRound::Begin begin,
                          bool stream_ordered) override {
    if (!stream_ordered) {
      device_round_ = DeviceRound::Start(worker, std::move(key), lease_, std::move(begin));
      return absl::OkStatus();
    }
    auto round = DeviceRound::StartStreamOrdered(worker, std::move(key), lease_, std::move(begin));
    if (!round.ok()) return round.status();
    device_round_ = *std::move(round);
    return absl::OkStatus();
  }
  void Deliver() override { slot().Deliver(result().first, result().second); }

  bool CanBeStreamOrdered() const override { return PrepareStreamOrder(runtime_, device()).ok(); }
  absl::Status AwaitRound() override {
    return Enqueued(runtime_->WaitForValue(lease_->memory().stream(), slot().released, slot().epoch),
                    "waiting for the round");
  }
  kernels::PendingRound pending_round() const override { return slot().pending(); }

 private:
  const DeviceSlot& slot() const { return lease_->slot(); }
  int device() const { return lease_->memory().device(); }
  absl::Status Enqueued(DeviceRuntime::Error error, const char* what) const {
    return DeviceStatus(runtime_, error, what);
  }

  const std::shared_ptr<SlotLease> lease_;
  DeviceRuntime* const runtime_;
  const int64_t channels_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Backend>> MakeCudaBackend(int device, int64_t channels, void* stream) {
  return CudaBackend::Make(DeviceRuntime::Get(), device, channels, StreamOf(stream));
}

absl::Status StreamOrderStatus(int device_index) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  if (runtime == nullptr) return absl::UnimplementedError("this build of syncbn is without CUDA");
  const DeviceScope scope(runtime, device_index);
  return scope.status().ok() ? PrepareStreamOrder(runtime, device_index) : scope.status();
}

}  // namespace syncbn
