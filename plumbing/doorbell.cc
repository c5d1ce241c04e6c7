#include "plumbing/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace syncbn {
namespace {

// Between processes, so without FUTEX_PRIVATE_FLAG.
void FutexWake(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

}  // namespace

void Doorbell::Ring() {
  rings_.fetch_add(1, std::memory_order_seq_cst);
  uint32_t sleep = sleeps_.load(std::memory_order_seq_cst);
  if (sleep % 2 == 0) return;
  FutexWake(&rings_);
  // Spares others the wake-up. A later sleep has another number, and stays: the sleeper may have gone to sleep again
  // before this thread goes on.
  sleeps_.compare_exchange_strong(sleep, sleep - 1, std::memory_order_seq_cst);
}

void Doorbell::Sleep(uint32_t seen, std::chrono::nanoseconds timeout) {
  constexpr int64_t kSecond = 1000000000;
  if (timeout.count() <= 0) return;
  timespec relative = {};
  relative.tv_sec = static_cast<time_t>(timeout.count() / kSecond);
  relative.tv_nsec = static_cast<decltype(relative.tv_nsec)>(timeout.count() % kSecond);
  const uint32_t sleep = (sleeps_.load(std::memory_order_seq_cst) | 1) + 2;
  sleeps_.store(sleep, std::memory_order_seq_cst);
  // The kernel compares the word with `seen` again.
  if (rings() == seen) syscall(SYS_futex, &rings_, FUTEX_WAIT, seen, &relative, nullptr, 0);
  sleeps_.store(sleep - 1, std::memory_order_seq_cst);
}

}  // namespace syncbn
