#include "client/cc/tensor_view.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "client/cc/device_runtime.h"
#include "plumbing/check.h"

namespace syncbn {
namespace {

// The addresses that a process on x86-64 can have. Sums of an address and a size below it do not overflow.
constexpr int64_t kMostBytes = int64_t{1} << 56;

}  // namespace

absl::Status Check(const TensorView& tensor, const char* name) {
  if (const char* const wrong = kernels::Validate(tensor.shape)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", wrong, " (batch ", tensor.shape.batch, ", channels ",
                                                   tensor.shape.channels, ", spatial ", tensor.shape.spatial, ")"));
  }
  if (tensor.shape.size() > kMostBytes / static_cast<int64_t>(kernels::SizeOf(tensor.shape.type))) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has ", tensor.shape.size(), " elements, which are more than 2^56 bytes"));
  }
  if (tensor.device != Device::kCpu && DeviceRuntime::Get() == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat(name, " is on a CUDA device, and this build computes on the CPU only"));
  }
  if (tensor.data == nullptr && tensor.shape.size() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has ", tensor.shape.size(), " elements and no data"));
  }
  return absl::OkStatus();
}

absl::Status CheckAlike(const TensorView& tensor, const TensorView& reference, const char* name) {
  if (absl::Status status = Check(tensor, name); !status.ok()) return status;
  const kernels::TensorShape& a = tensor.shape;
  const kernels::TensorShape& b = reference.shape;
  if (a.batch == b.batch && a.channels == b.channels && a.spatial == b.spatial && a.type == b.type &&
      a.layout == b.layout && tensor.device == reference.device) {
    if (a.size() == 0 || tensor.device == Device::kCpu || tensor.device_index == reference.device_index) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is on CUDA device ", tensor.device_index, " instead of ", reference.device_index));
  }
  return absl::InvalidArgumentError(absl::StrCat(name, " differs in shape, type, layout or device: [", a.batch, ", ",
                                                 a.channels, ", ", a.spatial, "] instead of [", b.batch, ", ",
                                                 b.channels, ", ", b.spatial, "]"));
}

absl::Status CheckOverlap(const kernels::TensorShape& shape, const void* output, const char* output_name,
                          const void* input, const char* input_name) {
  if (output == input || output == nullptr || input == nullptr) return absl::OkStatus();
  const auto a = reinterpret_cast<uintptr_t>(output), b = reinterpret_cast<uintptr_t>(input);
  SYNCBN_CHECK(shape.size() <= kMostBytes, "a shape of ", shape.size(), " elements that Check has not seen");
  const uint64_t bytes = static_cast<uint64_t>(shape.size()) * kernels::SizeOf(shape.type);
  if (std::max(a, b) - std::min(a, b) >= bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(output_name, " and ", input_name, " overlap without being the same memory"));
}

}  // namespace syncbn
