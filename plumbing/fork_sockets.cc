#include "plumbing/fork_sockets.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace syncbn {
namespace {

// The inode of each descriptor's socket, 0 for none. The blocks are allocated on demand and never move, so that a
// forked child can read them without a lock, whose holder might not exist there. Descriptors beyond the last block
// (four million; Linux allows one million by default) are not kept.
constexpr size_t kBlockSize = 1024;
constexpr size_t kBlocks = 4096;

struct Block {
  std::atomic<uint64_t> inodes[kBlockSize] = {};
};

std::atomic<Block*> g_blocks[kBlocks] = {};

// Returns the inode number, or 0 if the descriptor is not a socket.
uint64_t SocketInode(int descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || !S_ISSOCK(status.st_mode)) return 0;
  return status.st_ino;
}

// Makes system calls only, as POSIX demands between fork and exec in a process of many threads.
void GiveUpInChild() {
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (size_t b = 0; b < kBlocks; ++b) {
    Block* const block = g_blocks[b].load(std::memory_order_acquire);
    if (block == nullptr) continue;
    for (size_t i = 0; i < kBlockSize; ++i) {
      const uint64_t inode = block->inodes[i].exchange(0, std::memory_order_relaxed);
      const int descriptor = static_cast<int>(b * kBlockSize + i);
      if (inode == 0 || SocketInode(descriptor) != inode) continue;
      if (null < 0 || dup3(null, descriptor, O_CLOEXEC) < 0) close(descriptor);
    }
  }
  if (null >= 0) close(null);
}

Block* BlockOf(size_t index) {
  Block* block = g_blocks[index].load(std::memory_order_acquire);
  if (block != nullptr) return block;
  auto* const made = new Block();  // Stays until the process ends: a fork may come at any time.
  if (g_blocks[index].compare_exchange_strong(block, made, std::memory_order_acq_rel)) return made;
  delete made;
  return block;
}

}  // namespace

bool GiveUpInForkedChildren(int descriptor) {
  static const int registered = pthread_atfork(nullptr, nullptr, GiveUpInChild);
  (void)registered;
  const uint64_t inode = SocketInode(descriptor);
  const size_t number = static_cast<size_t>(descriptor);
  if (inode == 0 || number / kBlockSize >= kBlocks) return false;
  BlockOf(number / kBlockSize)->inodes[number % kBlockSize].store(inode, std::memory_order_relaxed);
  return true;
}

}  // namespace syncbn
