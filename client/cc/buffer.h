// Bytes on their way to a transport.

#ifndef SYNCBN_CLIENT_CC_BUFFER_H_
#define SYNCBN_CLIENT_CC_BUFFER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace syncbn {

// A block of bytes that its maker fills and that transports then share, without copies. Copies of a Buffer refer to the
// same bytes. Takes one allocation.
//
// *Thread safety*: different Buffers of the same bytes may be used by different threads once the bytes are filled.
class Buffer {
 public:
  Buffer() = default;
  // The bytes are not initialized.
  explicit Buffer(size_t size) : block_(new (Allocate(sizeof(Block) + size)) Block{{1}, size}) {}
  Buffer(const Buffer& other) : block_(other.block_) {
    if (block_ != nullptr) block_->references.fetch_add(1, std::memory_order_relaxed);
  }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() { Drop(block_); }

  size_t size() const { return block_ == nullptr ? 0 : block_->size; }
  uint8_t* data() { return block_ == nullptr ? nullptr : reinterpret_cast<uint8_t*>(block_ + 1); }
  const uint8_t* data() const { return const_cast<Buffer*>(this)->data(); }

  // Takes a reference to the bytes for code that knows no Buffer; it ends the reference with Drop.
  void* Share() const { return Buffer(*this).Forget(); }
  static void Drop(void* shared) {
    auto* const block = static_cast<Block*>(shared);
    if (block != nullptr && block->references.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(block);
  }

 private:
  // The bytes follow it.
  struct alignas(alignof(std::max_align_t)) Block {
    std::atomic<size_t> references;
    size_t size;
  };

  static void* Allocate(size_t bytes) {
    void* const block = std::malloc(bytes);
    if (block == nullptr) throw std::bad_alloc();
    return block;
  }
  void* Forget() { return std::exchange(block_, nullptr); }

  Block* block_ = nullptr;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_BUFFER_H_
