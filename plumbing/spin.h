// A short wait without sleeping, as long as such waits pay.

#ifndef SYNCBN_PLUMBING_SPIN_H_
#define SYNCBN_PLUMBING_SPIN_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <thread>

namespace syncbn {

// A sleep and a wake-up cost more than the wait for an answer of another process that runs. Two processes that answer
// each other leave their sleeps behind only if both spin for longer than the other takes to wake up. On the other hand,
// whoever spins keeps the processor from those that it waits for, if there are fewer processors than processes. So a
// wait spins if the waits of late, their sleeps included, were short enough to be replaced by spinning; and the more of
// these attempts are in vain, the more waits sleep at once. A spin in vain costs three times what another one saves.
//
// sched_yield is no help: on a busy machine it gives milliseconds away.
//
// *Thread safety*: none.
class Spin {
 public:
  // Looks until `ready`, once at least. Returns false if that took too long: Slept is to be called after the sleep.
  // `waiting_for`: how many others may need a processor meanwhile.
  template <typename Ready>
  bool Until(Ready ready, size_t waiting_for = 1) {
    begun_ = Clock::now();
    if (usual_ > kLongest || waiting_for >= processors_) return Once(ready);
    if (skips_ > 0) {
      --skips_;
      return Once(ready);
    }
    do {
      for (int i = 0; i < kLooks; ++i) {
        if (Once(ready)) {
          penalty_ -= (penalty_ + 3) / 4;
          return true;
        }
        Relax();
      }
    } while (Clock::now() - begun_ < kLongest);
    skips_ = penalty_ = std::min(2 * penalty_ + 1, kMostSkips);
    return false;
  }

  // Notes the end of the wait that Until has begun.
  void Slept() {
    const Clock::duration length = std::min<Clock::duration>(Clock::now() - begun_, kMostNoted);
    usual_ += (length - usual_) / 4;
  }

  // Tells the processor that a loop waits, which leaves more of the core to its other thread.
  static void Relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  using Clock = std::chrono::steady_clock;

  static constexpr int kLooks = 8;  // Between two looks at the clock.
  static constexpr unsigned kMostSkips = 1023;
  // Twice what it takes to wake a process up on a slow machine.
  static constexpr Clock::duration kLongest = std::chrono::microseconds(100);
  // A longer wait counts as one of this length, so that a few short ones make up for it.
  static constexpr Clock::duration kMostNoted = 4 * kLongest;

  template <typename Ready>
  bool Once(Ready& ready) {
    if (!ready()) return false;
    Slept();
    return true;
  }

  const size_t processors_ = std::thread::hardware_concurrency();
  Clock::time_point begun_;
  Clock::duration usual_{0};  // The mean length of the waits of late.
  unsigned penalty_ = 0;      // How many waits sleep at once after a spin in vain,
  unsigned skips_ = 0;        // and how many of these are still to come.
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SPIN_H_
