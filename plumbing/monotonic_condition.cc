#include "plumbing/monotonic_condition.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

#include "plumbing/clock.h"

namespace syncbn {

void MonotonicCondition::WaitFor(absl::Mutex* mutex, absl::Duration timeout) {
  if (timeout <= absl::ZeroDuration()) return;
  // The mutex is held: whoever changes something from here on signals later.
  const uint32_t seen = signals_.load(std::memory_order_relaxed);
  waiters_.fetch_add(1, std::memory_order_seq_cst);
  mutex->Unlock();
  // FUTEX_WAIT measures its timeout by the monotonic clock, and compares the word with `seen` again.
  const timespec relative = absl::ToTimespec(timeout);
  const timespec* const limit = timeout == absl::InfiniteDuration() ? nullptr : &relative;
  syscall(SYS_futex, &signals_, FUTEX_WAIT_PRIVATE, seen, limit, nullptr, 0);
  mutex->Lock();
  waiters_.fetch_sub(1, std::memory_order_relaxed);
}

bool MonotonicCondition::SleepUnless(absl::Mutex* mutex, const bool& ended, absl::Duration timeout) {
  const Clock clock;
  const absl::Time end = clock.Now() + timeout;
  while (!ended && clock.Now() < end) WaitFor(mutex, end - clock.Now());
  return ended;
}

void MonotonicCondition::SignalAll() {
  signals_.fetch_add(1, std::memory_order_seq_cst);
  if (waiters_.load(std::memory_order_seq_cst) == 0) return;
  syscall(SYS_futex, &signals_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace syncbn
