// Memory of vectors that are no longer needed, for those that come.

#ifndef SYNCBN_SERVER_CORE_VECTOR_POOL_H_
#define SYNCBN_SERVER_CORE_VECTOR_POOL_H_

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace syncbn::core {

// Rounds follow each other with vectors of the same lengths, and an allocation of some KiB costs more than to fill it.
//
// Thread safety: none; pure.
class VectorPool {
 public:
  // Keeps at most so many bytes.
  explicit VectorPool(size_t most_bytes) : most_bytes_(most_bytes) {}

  // Returns a copy of the values.
  std::vector<double> Copy(absl::Span<const double> values) {
    std::vector<double> copy;
    if (!spare_.empty() && Fits(spare_.back(), values.size())) {
      copy = std::move(spare_.back());
      spare_.pop_back();
      bytes_ -= BytesOf(copy);
    }
    copy.assign(values.begin(), values.end());
    return copy;
  }

  // Keeps the vector's memory, if there is room for it.
  void Keep(std::vector<double> vector) {
    if (vector.capacity() == 0 || bytes_ + BytesOf(vector) > most_bytes_) return;
    bytes_ += BytesOf(vector);
    spare_.push_back(std::move(vector));
  }

 private:
  static size_t BytesOf(const std::vector<double>& vector) { return vector.capacity() * sizeof(double); }
  // A short vector in the memory of a long one would take more than it counts for.
  static bool Fits(const std::vector<double>& spare, size_t size) {
    return size <= spare.capacity() && spare.capacity() <= 2 * size;
  }

  const size_t most_bytes_;
  std::vector<std::vector<double>> spare_;
  size_t bytes_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_VECTOR_POOL_H_
