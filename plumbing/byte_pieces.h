// Bytes that lie in several places of memory, as gRPC receives a message.

#ifndef SYNCBN_PLUMBING_BYTE_PIECES_H_
#define SYNCBN_PLUMBING_BYTE_PIECES_H_

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "absl/base/attributes.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "plumbing/check.h"

namespace syncbn {

// A view: neither the bytes nor the list of pieces are owned, and both must outlive it and what is taken from it.
//
// *Thread safety*: that of a std::string_view.
class BytePieces {
 public:
  BytePieces() = default;
  BytePieces(absl::string_view whole) : front_(whole), size_(whole.size()) {}  // NOLINT: a piece is one of few.
  explicit BytePieces(absl::Span<const absl::string_view> pieces) : next_(pieces.data()) {
    for (const absl::string_view piece : pieces) size_ += piece.size();
    FindFront();
  }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  // Returns the bytes up to the first cut: at least one, unless there are none.
  absl::string_view front() const { return front_; }
  // Returns whether the bytes are all in one place, which front() is then.
  bool whole() const { return front_.size() == size_; }

  // Drops the first `size` bytes, of which there must be as many.
  void RemovePrefix(size_t size) {
    if (size > front_.size() || (size == front_.size() && !whole())) return RemovePieces(size);
    front_.remove_prefix(size);
    size_ -= size;
  }
  // Returns the first `size` bytes, of which there must be as many, and drops them.
  BytePieces TakePrefix(size_t size) {
    BytePieces prefix = *this;
    RemovePrefix(size);
    prefix.size_ = size;
    prefix.CutFront();
    return prefix;
  }

  // Copies all bytes.
  void CopyTo(void* to) const {
    auto* place = static_cast<char*>(to);
    ForEach([&place](absl::string_view piece) {
      std::memcpy(place, piece.data(), piece.size());
      place += piece.size();
    });
  }
  // Returns the bytes in one place, which is `*copy` unless they are in one place already.
  absl::string_view Join(std::string* copy) const {
    if (whole()) return front_;
    copy->clear();
    copy->reserve(size_);
    ForEach([copy](absl::string_view piece) { copy->append(piece.data(), piece.size()); });
    return *copy;
  }

 private:
  // Calls `visit` with each piece that is not empty.
  template <typename Visit>
  void ForEach(const Visit& visit) const {
    for (BytePieces rest = *this; !rest.empty(); rest.RemovePrefix(rest.front_.size())) visit(rest.front_);
  }
  // RemovePrefix, where the first piece ends.
  ABSL_ATTRIBUTE_NOINLINE void RemovePieces(size_t size) {
    SYNCBN_CHECK(size <= size_, size, " of ", size_);
    size_ -= size;
    while (size > front_.size()) {
      size -= front_.size();
      front_ = *next_++;
    }
    front_.remove_prefix(size);
    FindFront();
  }
  // Passes over empty pieces.
  void FindFront() {
    while (front_.empty() && size_ > 0) front_ = *next_++;
    CutFront();
  }
  void CutFront() { front_ = absl::string_view(front_.data(), std::min(front_.size(), size_)); }

  absl::string_view front_;
  const absl::string_view* next_ = nullptr;  // The piece after `front_`, while there are bytes beyond that.
  size_t size_ = 0;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_BYTE_PIECES_H_
