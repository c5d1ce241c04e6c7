// A short wait without sleeping, as long as such waits pay.

#ifndef SYNCBN_PLUMBING_SPIN_H_
#define SYNCBN_PLUMBING_SPIN_H_

#include <algorithm>
#include <chrono>
#include <thread>

namespace syncbn {

// A sleep and a wake-up cost more than the wait for an answer of another process that runs. On the other hand, whoever
// spins keeps the processor from those that it waits for, if there are fewer processors than processes. So the time
// that a wait may take is halved whenever one was in vain, and restored by one that was not; now and then a full wait
// is tried again. There is no wait on a single processor.
//
// sched_yield is no help: on a busy machine it gives milliseconds away.
//
// *Thread safety*: none.
class Spin {
 public:
  // Looks again and again until `ready`. Returns false if that took too long.
  template <typename Ready>
  bool Until(Ready ready) {
    const std::chrono::nanoseconds longest = Budget();
    const auto end = std::chrono::steady_clock::now() + longest;
    do {
      for (int i = 0; i < kLooks; ++i) {
        if (ready()) return Won();
        Relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    ++misses_;
    return false;
  }

 private:
  static constexpr int kLooks = 8;  // Between two looks at the clock.
  static constexpr std::chrono::nanoseconds kLongest = std::chrono::microseconds(20);
  static constexpr unsigned kMostHalvings = 6;
  static constexpr unsigned kRetryAfter = 32;

  static void Relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::chrono::nanoseconds Budget() const {
    if (!several_processors_) return std::chrono::nanoseconds(0);
    if (misses_ % kRetryAfter == kRetryAfter - 1) return kLongest;
    return kLongest / (1 << std::min(misses_, kMostHalvings));
  }

  bool Won() {
    misses_ = 0;
    return true;
  }

  const bool several_processors_ = std::thread::hardware_concurrency() > 1;
  unsigned misses_ = 0;  // Waits in vain since the last one that was not.
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SPIN_H_
