// A word in shared memory by which one process wakes a thread of another.

#ifndef SYNCBN_PLUMBING_DOORBELL_H_
#define SYNCBN_PLUMBING_DOORBELL_H_

#include <atomic>
#include <chrono>
#include <cstdint>

namespace syncbn {

// Lies in shared memory, zeroed at first. Any number of threads ring; one thread sleeps. Whoever can write to the
// memory can wake the sleeper in vain or fail to wake it, and nothing else.
//
// The sleeper reads rings(), looks for work, and sleeps only if nobody has rung since. So no ring is lost. A process
// that is stopped or killed in the middle of Ring takes only its own ring away: the sleeper counts as asleep until it
// has been woken.
//
// *Thread safety*: any thread of any process may call any method; one sleeps at a time.
class Doorbell {
 public:
  uint32_t rings() const { return rings_.load(std::memory_order_seq_cst); }

  // Wakes the thread that sleeps.
  void Ring();
  // Sleeps until somebody rings, for at most `timeout`; not at all if rings() is no longer `seen`. May return early.
  void Sleep(uint32_t seen, std::chrono::nanoseconds timeout);

 private:
  std::atomic<uint32_t> rings_;
  // Odd while a thread sleeps, and nobody has woken it. Each sleep has another number: one who rings, and goes on after
  // the thread has gone to sleep again, must not take that sleep for the one that he has ended.
  std::atomic<uint32_t> sleeps_;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_DOORBELL_H_
