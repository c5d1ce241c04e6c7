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

// The inode of the socket that each descriptor was, 0 for none. In blocks that are made when they are needed and never
// moved, so that the child reads them without a lock: the thread that held one at the fork does not exist there. A
// descriptor beyond the last block (four million; Linux allows one million unless told otherwise) is not kept.
constexpr size_t kBlockSize = 1024;
constexpr size_t kBlocks = 4096;

struct Block {
  std::atomic<uint64_t> inodes[kBlockSize] = {};
};

std::atomic<Block*> g_blocks[kBlocks] = {};

// The inode number, or 0 if the descriptor is not a socket.
uint64_t SocketInode(int descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || !S_ISSOCK(status.st_mode)) return 0;
  return status.st_ino;
}

// Only what POSIX allows between a fork and an exec of a process of many threads: system calls.
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
