// Memory that belongs to someone else, seen as a tensor or as a vector of parameters.

#ifndef SYNCBN_CLIENT_CC_TENSOR_VIEW_H_
#define SYNCBN_CLIENT_CC_TENSOR_VIEW_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/batch_norm.h"

namespace syncbn {

enum class Device : uint8_t { kCpu = 0, kCuda = 1 };

// A dense tensor: [batch, channels, spatial] or [batch, spatial, channels] (see kernels/batch_norm.h). The viewer does
// not own the memory; `data` may be null if the tensor is empty.
struct TensorView {
  void* data = nullptr;
  kernels::TensorShape shape;
  Device device = Device::kCpu;
  int device_index = 0;  // Of a CUDA device.
};

// OK if the view can be read: a valid shape, data where there are elements, a device that this build can use.
// INVALID_ARGUMENT or UNIMPLEMENTED otherwise, beginning with `name`.
absl::Status Check(const TensorView& tensor, const char* name);

// OK if `tensor` can stand for what belongs to `reference` element by element.
absl::Status CheckAlike(const TensorView& tensor, const TensorView& reference, const char* name);

// One parameter for each channel, in the memory of the device that the tensors are on. Absent: `data` is null.
struct VectorView {
  void* data = nullptr;
  kernels::DataType type = kernels::DataType::kFloat32;

  bool present() const { return data != nullptr; }
  // The element as float64. Of host memory, as is the next.
  double Get(int64_t channel) const;
  // Rounded to the vector's type once.
  void Set(int64_t channel, double value) const;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_TENSOR_VIEW_H_
