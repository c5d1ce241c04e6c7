// Views of tensors and of parameter vectors in memory that the viewer does not own.

#ifndef SYNCBN_CLIENT_CC_TENSOR_VIEW_H_
#define SYNCBN_CLIENT_CC_TENSOR_VIEW_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/batch_norm.h"
#include "kernels/vector_view.h"

namespace syncbn {

enum class Device : uint8_t { kCpu = 0, kCuda = 1 };

// A dense tensor: [batch, channels, spatial] or [batch, spatial, channels] (see kernels/batch_norm.h). The viewer does
// not own the memory; `data` may be null if the tensor is empty.
struct TensorView {
  void* data = nullptr;
  kernels::TensorShape shape;
  Device device = Device::kCpu;
  int device_index = 0;  // The CUDA device.
};

// OK if the view can be read: a valid shape of 2^56 bytes at most, data where there are elements, a device that this
// build can use.
// INVALID_ARGUMENT or UNIMPLEMENTED otherwise, beginning with `name`.
absl::Status Check(const TensorView& tensor, const char* name);

// OK if Check accepts `tensor` and it has the shape, type, layout and device of `reference`. INVALID_ARGUMENT or
// UNIMPLEMENTED otherwise.
absl::Status CheckAlike(const TensorView& tensor, const TensorView& reference, const char* name);

// Returns OK if an operation may write `output` while it reads `input`, or writes it too: they are the same memory,
// share none, or one is null. Both have that shape.
//
// *Errors*: INVALID_ARGUMENT, naming both, if they overlap otherwise: elements would be overwritten before they are
// read.
absl::Status CheckOverlap(const kernels::TensorShape& shape, const void* output, const char* output_name,
                          const void* input, const char* input_name);

// One parameter for each channel, in the memory of the device that the tensors are on. Absent: `data` is null.
using kernels::VectorView;

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_TENSOR_VIEW_H_
