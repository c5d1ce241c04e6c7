// Memory for the simulator: new and delete of a process that makes and forgets millions of small objects, which take a
// third of its instructions with malloc. A block that is freed is the next of its size to be handed out; nothing goes
// back to the system. Sanitizers keep their own.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

namespace syncbn::simulation {
namespace {

// A block is a multiple of kGrain and begins with its size in grains, 0 if it is malloc's; what follows is aligned to
// kGrain.
constexpr size_t kGrain = 16;
constexpr size_t kHeader = sizeof(uint64_t);
constexpr size_t kMostGrains = 64;
constexpr size_t kSlab = size_t{1} << 18;

struct FreeBlock {
  FreeBlock* next;
};

thread_local FreeBlock* free_blocks[kMostGrains + 1];
thread_local char* slab = nullptr;
thread_local size_t slab_left = 0;

uint64_t& HeaderOf(void* memory) { return *reinterpret_cast<uint64_t*>(static_cast<char*>(memory) - kHeader); }

void* FromMalloc(size_t bytes) {
  char* const block = static_cast<char*>(std::malloc(bytes + kGrain));
  if (block == nullptr) throw std::bad_alloc();
  HeaderOf(block + kGrain) = 0;
  return block + kGrain;
}

void* FromSlab(size_t grains) {
  const size_t bytes = grains * kGrain;
  if (slab_left < bytes) {
    char* const memory = static_cast<char*>(std::malloc(kSlab));
    if (memory == nullptr) throw std::bad_alloc();
    slab = memory + kGrain - kHeader;  // So that what follows a header is aligned.
    slab_left = kSlab - kGrain;
  }
  void* const memory = slab + kHeader;
  HeaderOf(memory) = grains;
  slab += bytes;
  slab_left -= bytes;
  return memory;
}

void* Allocate(size_t bytes) {
  const size_t grains = (bytes + kHeader + kGrain - 1) / kGrain;
  if (grains > kMostGrains) return FromMalloc(bytes);
  FreeBlock* const block = free_blocks[grains];
  if (block == nullptr) return FromSlab(grains);
  free_blocks[grains] = block->next;
  __builtin_prefetch(block->next, /*rw=*/1);  // Most have been out of use for a whole schedule.
  return block;
}

void Free(void* memory) {
  if (memory == nullptr) return;
  const uint64_t grains = HeaderOf(memory);
  if (grains == 0) return std::free(static_cast<char*>(memory) - kGrain);
  FreeBlock* const block = static_cast<FreeBlock*>(memory);
  block->next = free_blocks[grains];
  free_blocks[grains] = block;
}

}  // namespace
}  // namespace syncbn::simulation

void* operator new(size_t bytes) { return syncbn::simulation::Allocate(bytes); }
void operator delete(void* memory) noexcept { syncbn::simulation::Free(memory); }
void operator delete(void* memory, size_t) noexcept { syncbn::simulation::Free(memory); }

#endif
