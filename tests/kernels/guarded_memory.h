// Memory beside pages that must not be touched: an access before or behind it ends the process.

#ifndef SYNCBN_TESTS_KERNELS_GUARDED_MEMORY_H_
#define SYNCBN_TESTS_KERNELS_GUARDED_MEMORY_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace syncbn::kernels::testing {

// One stretch of memory between two such pages.
class GuardedPages {
 public:
  explicit GuardedPages(size_t capacity)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), size_((capacity + page_ - 1) / page_ * page_) {
    void* const mapped = mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    begin_ = static_cast<uint8_t*>(mapped) + page_;
    if (mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) std::abort();
  }
  ~GuardedPages() { munmap(begin_ - page_, size_ + 2 * page_); }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  // Returns `bytes` bytes, `gap` behind the first guard or before the second one.
  uint8_t* At(size_t bytes, size_t gap, bool at_end) const {
    if (bytes + gap > size_) std::abort();
    return at_end ? begin_ + size_ - bytes - gap : begin_ + gap;
  }

 private:
  const size_t page_;
  const size_t size_;
  uint8_t* begin_;
};

// Arrays in such memory, until Clear().
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t capacity) : capacity_(capacity) {}

  void Clear(size_t gap, bool at_end) {
    used_ = 0;
    gap_ = gap;
    at_end_ = at_end;
  }

  // Returns uninitialized bytes.
  uint8_t* Bytes(size_t bytes) {
    if (used_ == pages_.size()) pages_.push_back(std::make_unique<GuardedPages>(capacity_));
    return pages_[used_++]->At(bytes, gap_, at_end_);
  }

  // Returns an aligned array.
  double* Doubles(size_t size) {
    if (used_ == pages_.size()) pages_.push_back(std::make_unique<GuardedPages>(capacity_));
    return reinterpret_cast<double*>(pages_[used_++]->At(size * sizeof(double), 0, at_end_));
  }

 private:
  const size_t capacity_;
  std::vector<std::unique_ptr<GuardedPages>> pages_;
  size_t used_ = 0;
  size_t gap_ = 0;
  bool at_end_ = false;
};

}  // namespace syncbn::kernels::testing

#endif  // SYNCBN_TESTS_KERNELS_GUARDED_MEMORY_H_
