#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cc/backend.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_round.h"
#include "plumbing/check.h"

namespace syncbn {
namespace {

namespace cuda = kernels::cuda;

Stream StreamOf(void* stream) { return static_cast<Stream>(stream); }

// The operations of one pass that need no memory but its vectors. Everything is enqueued in one stream.
class CudaOperations : public Backend {
 public:
  CudaOperations(DeviceRuntime* runtime, int device, Stream stream)
      : runtime_(runtime), device_(device), stream_(stream) {}

  DeviceScope Enter() const override { return DeviceScope(runtime_, device_); }
  absl::Status CheckPlace(const TensorView& tensor, const char* name) const override {
    if (tensor.device != Device::kCuda) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is in host memory, and the pass began on a GPU"));
    }
    if (tensor.device_index == device_) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is on CUDA device ", tensor.device_index, ", and the pass began on device ", device_));
  }

  absl::Status Normalize(const kernels::TensorShape& shape, const void* x,
                         const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                         void* y) override {
    return Enqueued(runtime_->BatchNormElemt(context(), shape, x, coefficients, epilogue, y), "normalization");
  }
  absl::Status BackwardElemt(const kernels::TensorShape& shape, const void* dy, const void* x,
                             const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate, void* dx,
                             void* d_residual) override {
    return Enqueued(runtime_->BatchNormBackwardElemt(context(), shape, dy, x, coefficients, gate, dx, d_residual),
                    "backward pass");
  }
  absl::Status Finalize(const kernels::FinalizeForwardArguments& arguments) override {
    return Enqueued(runtime_->FinalizeForward(context(), arguments), "coefficients");
  }
  absl::Status Finalize(const kernels::FinalizeBackwardArguments& arguments) override {
    return Enqueued(runtime_->FinalizeBackward(context(), arguments), "coefficients");
  }

 protected:
  DeviceRuntime* runtime() const { return runtime_; }
  int device() const { return device_; }
  Stream stream() const { return stream_; }
  // The stream without a workspace, for launches other than reductions.
  cuda::Context context() const {
    cuda::Context context;
    context.stream = stream_;
    return context;
  }
  absl::Status Enqueued(DeviceRuntime::Error error, const char* what) const {
    return DeviceStatus(runtime_, error, what);
  }

 private:
  DeviceRuntime* const runtime_;
  const int device_;
  const Stream stream_;
};

// The pass's vectors are those of a slot of its stream's memory.
class CudaBackend : public CudaOperations {
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
      : CudaOperations(lease->runtime(), lease->memory().device(), lease->memory().stream()),
        lease_(std::move(lease)),
        channels_(channels) {
    vectors_ = slot();
  }

  absl::StatusOr<std::shared_ptr<Backend>> ForBackward(int, void* other) const override {
    // The two passes hand memory to each other in the order of one stream.
    if (StreamOf(other) != stream()) {
      return absl::InvalidArgumentError("a backward pass belongs to the CUDA stream of its forward pass");
    }
    return Make(runtime(), device(), channels_, stream());
  }

  absl::Status Reduce(const kernels::TensorShape& shape, const void* x) override {
    return lease_->memory().Reduce(
        shape,
        [&](cuda::Context* context) {
          context->signal = {slot().flag, slot().epoch};
          return runtime()->BatchNormStats(*context, shape, x, vectors_.local[0], vectors_.local[1]);
        },
        "statistics");
  }
  absl::Status BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x, const double* mean,
                              const kernels::ReluGate& gate, bool signals) override {
    return lease_->memory().Reduce(
        shape,
        [&](cuda::Context* context) {
          if (signals) context->signal = {slot().flag, slot().epoch};
          return runtime()->BatchNormBackwardReduce(*context, shape, dy, x, mean, gate, vectors_.local[0],
                                                    vectors_.local[1]);
        },
        "backward reduction");
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

  bool CanBeStreamOrdered() const override { return PrepareStreamOrder(runtime(), device()).ok(); }
  absl::Status AwaitRound() override {
    return Enqueued(runtime()->WaitForValue(stream(), slot().released, slot().epoch), "waiting for the round");
  }
  kernels::PendingRound pending_round() const override { return slot().pending(); }

 private:
  const DeviceSlot& slot() const { return lease_->slot(); }

  const std::shared_ptr<SlotLease> lease_;
  const int64_t channels_;
};

// An evaluation in a stream that is being captured: its vectors and its workspace are allocated and freed by the graph,
// since a slot is another pass's by the time of a replay.
class CapturedEvaluation : public CudaOperations {
 public:
  static absl::StatusOr<std::shared_ptr<Backend>> Make(DeviceRuntime* runtime, int device, int64_t channels,
                                                       Stream stream) {
    auto made = std::make_shared<CapturedEvaluation>(runtime, device, stream);
    const size_t capacity = static_cast<size_t>(channels);
    absl::StatusOr<void*> memory = made->Allocate(kVectors * capacity * sizeof(double));
    if (!memory.ok()) return memory.status();
    double* const vectors = static_cast<double*>(*memory);
    made->vectors_.local[0] = vectors;
    made->vectors_.local[1] = vectors + capacity;
    made->vectors_.PlaceCoefficients(vectors + 2 * capacity, capacity);
    return std::shared_ptr<Backend>(std::move(made));
  }

  CapturedEvaluation(DeviceRuntime* runtime, int device, Stream stream) : CudaOperations(runtime, device, stream) {}
  // An error ends the capture as well, and CUDA tells it there.
  ~CapturedEvaluation() override {
    const DeviceScope scope = Enter();
    for (void* const memory : allocated_) runtime()->FreeInStream(stream(), memory);
  }

  absl::Status BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x, const double* mean,
                              const kernels::ReluGate& gate, bool) override {
    cuda::Context reduction = context();
    reduction.workspace_bytes = runtime()->WorkspaceBytes(shape);
    absl::StatusOr<void*> workspace = Allocate(reduction.workspace_bytes);
    if (!workspace.ok()) return workspace.status();
    reduction.workspace = *workspace;
    absl::Status status =
        Enqueued(runtime()->ZeroDevice(stream(), reduction.workspace, reduction.workspace_bytes), "workspace");
    if (!status.ok()) return status;
    return Enqueued(
        runtime()->BatchNormBackwardReduce(reduction, shape, dy, x, mean, gate, vectors_.local[0], vectors_.local[1]),
        "backward reduction");
  }

  // An evaluation has no round, and no reduction that begins one.
  absl::StatusOr<std::shared_ptr<Backend>> ForBackward(int, void*) const override { return NoRound(); }
  absl::Status Reduce(const kernels::TensorShape&, const void*) override { return NoRound(); }
  absl::Status StartRound(Worker&, DeviceRound::Key, DeviceRound::Begin, bool) override { return NoRound(); }
  void Deliver() override { SYNCBN_CHECK(false, "an evaluation has no round"); }

 private:
  static constexpr size_t kVectors = 2 + PassVectors::kCoefficients;

  static absl::Status NoRound() { return absl::InternalError("an evaluation has no round"); }

  // On a 256-byte boundary, as all of CUDA's memory is.
  absl::StatusOr<void*> Allocate(size_t bytes) {
    void* memory = nullptr;
    absl::Status status = Enqueued(runtime()->AllocateInStream(stream(), bytes, &memory), "memory of a graph");
    if (!status.ok()) return status;
    allocated_.push_back(memory);
    return memory;
  }

  std::vector<void*> allocated_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Backend>> MakeCudaBackend(int device, int64_t channels, void* stream) {
  return CudaBackend::Make(DeviceRuntime::Get(), device, channels, StreamOf(stream));
}

absl::StatusOr<std::shared_ptr<Backend>> MakeCudaEvaluationBackend(int device, int64_t channels, void* stream) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  const DeviceScope scope(runtime, device);
  if (!scope.status().ok()) return scope.status();
  bool capturing = false;
  absl::Status status = DeviceStatus(runtime, runtime->StreamIsCapturing(StreamOf(stream), &capturing), "stream");
  if (!status.ok()) return status;
  const auto make = capturing ? CapturedEvaluation::Make : CudaBackend::Make;
  return make(runtime, device, channels, StreamOf(stream));
}

absl::Status StreamOrderStatus(int device_index) {
  DeviceRuntime* const runtime = DeviceRuntime::Get();
  if (runtime == nullptr) return absl::UnimplementedError("this build of syncbn is without CUDA");
  const DeviceScope scope(runtime, device_index);
  return scope.status().ok() ? PrepareStreamOrder(runtime, device_index) : scope.status();
}

}  // namespace syncbn
