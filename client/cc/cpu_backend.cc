#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/backend.h"
#include "kernels/cpu/batch_norm.h"
#include "plumbing/check.h"

namespace syncbn {
namespace {

namespace cpu = kernels::cpu;

class CpuBackend : public Backend {
 public:
  CpuBackend(int64_t channels, int num_threads)
      : channels_(channels), context_{num_threads}, memory_(new double[kVectors * static_cast<size_t>(channels)]) {
    vectors_.local[0] = memory_.get();
    vectors_.local[1] = memory_.get() + channels;
    vectors_.PlaceCoefficients(memory_.get() + 2 * channels, static_cast<size_t>(channels));
  }

  DeviceScope Enter() const override { return DeviceScope(); }
  absl::Status CheckPlace(const TensorView& tensor, const char* name) const override {
    if (tensor.device == Device::kCpu) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(name, " is on a GPU, and the pass began on the CPU"));
  }
  absl::StatusOr<std::shared_ptr<Backend>> ForBackward(int num_threads, void*) const override {
    return MakeCpuBackend(channels_, num_threads);
  }

  absl::Status Reduce(const kernels::TensorShape& shape, const void* x) override {
    cpu::BatchNormStats(context_, shape, x, vectors_.local[0], vectors_.local[1]);
    return absl::OkStatus();
  }
  absl::Status Normalize(const kernels::TensorShape& shape, const void* x,
                         const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                         void* y) override {
    cpu::BatchNormElemt(context_, shape, x, coefficients, epilogue, y);
    return absl::OkStatus();
  }
  absl::Status BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x, const double* mean,
                              const kernels::ReluGate& gate, bool) override {
    cpu::BatchNormBackwardReduce(context_, shape, dy, x, mean, gate, vectors_.local[0], vectors_.local[1]);
    return absl::OkStatus();
  }
  absl::Status BackwardElemt(const kernels::TensorShape& shape, const void* dy, const void* x,
                             const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate, void* dx,
                             void* d_residual) override {
    cpu::BatchNormBackwardElemt(context_, shape, dy, x, coefficients, gate, dx, d_residual);
    return absl::OkStatus();
  }
  absl::Status Finalize(const kernels::FinalizeForwardArguments& arguments) override {
    for (int64_t c = 0; c < arguments.channels; ++c) kernels::FinalizeForwardChannel(arguments, c);
    return absl::OkStatus();
  }
  absl::Status Finalize(const kernels::FinalizeBackwardArguments& arguments) override {
    for (int64_t c = 0; c < arguments.channels; ++c) kernels::FinalizeBackwardChannel(arguments, c);
    return absl::OkStatus();
  }

  absl::Status StartRound(Worker& worker, DeviceRound::Key, DeviceRound::Begin begin, bool stream_ordered) override {
    SYNCBN_CHECK(!stream_ordered, "a CPU has no stream");
    absl::StatusOr<Round> round = begin(worker, vectors_.local[0], vectors_.local[1]);
    if (!round.ok()) return round.status();
    round_ = *std::move(round);
    return absl::OkStatus();
  }
  void Deliver() override {
    SYNCBN_CHECK(result().first.size() == static_cast<size_t>(channels_), result().first.size(), " elements");
    vectors_.merged[0] = result().first.data();
    vectors_.merged[1] = result().second.data();
  }

 private:
  static constexpr size_t kVectors = 2 + PassVectors::kCoefficients;

  const int64_t channels_;
  const cpu::Context context_;
  const std::unique_ptr<double[]> memory_;
};

}  // namespace

std::shared_ptr<Backend> MakeCpuBackend(int64_t channels, int num_threads) {
  return std::make_shared<CpuBackend>(channels, num_threads);
}

absl::StatusOr<std::shared_ptr<Backend>> MakeBackend(const TensorView& x, int num_threads, void* stream) {
  if (x.device == Device::kCpu) return MakeCpuBackend(x.shape.channels, num_threads);
  return MakeCudaBackend(x.device_index, x.shape.channels, stream);
}

absl::StatusOr<std::shared_ptr<Backend>> MakeEvaluationBackend(const TensorView& x, int num_threads, void* stream) {
  if (x.device == Device::kCpu) return MakeCpuBackend(x.shape.channels, num_threads);
  return MakeCudaEvaluationBackend(x.device_index, x.shape.channels, stream);
}

}  // namespace syncbn
