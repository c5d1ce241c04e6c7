// Memory of vectors that are no longer needed, for those that come.

#ifndef SYNCBN_PLUMBING_VECTOR_POOL_H_
#define SYNCBN_PLUMBING_VECTOR_POOL_H_

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace syncbn {

// Rounds follow each other with vectors of the same lengths, and an allocation of some KiB costs more than to fill it.
//
// Thread safety: none; pure.
class VectorPool {
 public:
  // Keeps at most so many bytes, of the newest vectors.
  explicit VectorPool(size_t most_bytes) : most_bytes_(most_bytes) {}

  // Returns a copy of the values.
  std::vector<double> Copy(absl::Span<const double> values) {
    std::vector<double> copy = TakeSpare(values.size());
    copy.assign(values.begin(), values.end());
    return copy;
  }
  // Returns a vector of that size for the caller to fill: its values may be any.
  std::vector<double> Take(size_t size) {
    std::vector<double> vector = TakeSpare(size);
    vector.resize(size);
    return vector;
  }

  // Takes the vector in place of the oldest ones, unless it is too long: then it stays the caller's.
  void Keep(std::vector<double>&& vector) {
    if (vector.capacity() == 0 || BytesOf(vector) > most_bytes_) return;
    bytes_ += BytesOf(vector);
    spare_.push_back(std::move(vector));
    while (bytes_ > most_bytes_ || spare_.size() > kMostVectors) Remove(spare_.begin());
  }

 private:
  // Few enough to look at all of them.
  static constexpr size_t kMostVectors = 32;

  // Returns the newest vector that fits; an empty one if none does.
  std::vector<double> TakeSpare(size_t size) {
    for (size_t i = spare_.size(); i > 0; --i) {
      if (Fits(spare_[i - 1], size)) return Remove(spare_.begin() + static_cast<std::ptrdiff_t>(i - 1));
    }
    return {};
  }
  std::vector<double> Remove(std::vector<std::vector<double>>::iterator place) {
    std::vector<double> vector = std::move(*place);
    spare_.erase(place);
    bytes_ -= BytesOf(vector);
    return vector;
  }
  static size_t BytesOf(const std::vector<double>& vector) { return vector.capacity() * sizeof(double); }
  // A short vector in the memory of a long one would take more than it counts for.
  static bool Fits(const std::vector<double>& spare, size_t size) {
    return size <= spare.capacity() && spare.capacity() <= 2 * size;
  }

  const size_t most_bytes_;
  std::vector<std::vector<double>> spare_;  // The newest last.
  size_t bytes_ = 0;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_VECTOR_POOL_H_
