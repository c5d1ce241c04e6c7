#include "kernels/batch_norm.h"

namespace syncbn::kernels {

const char* Validate(const TensorShape& shape) {
  if (shape.channels < 1) return "a tensor needs at least one channel";
  if (shape.batch < 0) return "the batch extent is negative";
  if (shape.spatial < 0) return "the spatial extent is negative";
  if (static_cast<uint8_t>(shape.type) > static_cast<uint8_t>(DataType::kBFloat16)) return "unknown data type";
  if (static_cast<uint8_t>(shape.layout) > static_cast<uint8_t>(Layout::kChannelsLast)) return "unknown layout";
  if (shape.batch == 0 || shape.spatial == 0) return nullptr;
  constexpr int64_t kMaxSize = int64_t{1} << 62;
  if (shape.channels > kMaxSize / shape.batch || shape.channels * shape.batch > kMaxSize / shape.spatial) {
    return "the tensor has more than 2^62 elements";
  }
  return nullptr;
}

}  // namespace syncbn::kernels
