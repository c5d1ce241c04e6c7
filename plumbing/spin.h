// A short wait without sleeping, as long as such waits pay.

#ifndef SYNCBN_PLUMBING_SPIN_H_
#define SYNCBN_PLUMBING_SPIN_H_

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <thread>
#include <utility>

namespace syncbn {

// The time and the processors of this machine, as Spin needs them.
class SpinSystem {
 public:
  using Clock = std::chrono::steady_clock;

  static Clock::time_point Now() { return Clock::now(); }
  size_t processors() const { return processors_; }
  // Tells the processor that a loop waits, which leaves more of the core to its other thread.
  static void Relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  // Gives the processor to another thread that is ready to run, if there is one.
  static void Yield() { sched_yield(); }

 private:
  const size_t processors_ = std::max(1u, std::thread::hardware_concurrency());  // 0 is the system's "unknown".
};

// How much to skip after an attempt that was in vain: the more, the more such attempts there are.
class Backoff {
 public:
  // The penalty grows to twice what it was and `least`, up to `most`, and falls by a `share`-th of it.
  constexpr Backoff(unsigned least, unsigned most, unsigned share) : least_(least), most_(most), share_(share) {}

  // Returns whether this attempt is to be skipped.
  bool Skip() {
    if (skips_ == 0) return false;
    --skips_;
    return true;
  }
  // `price`: how many attempts that succeed make up for this one.
  void OnFailure(unsigned price = 0) { skips_ = penalty_ = std::min(2 * penalty_ + std::max(price, least_), most_); }
  void OnSuccess() { penalty_ -= (penalty_ + share_ - 1) / share_; }

 private:
  const unsigned least_;
  const unsigned most_;
  const unsigned share_;
  unsigned penalty_ = 0;  // How many attempts are skipped after a failure,
  unsigned skips_ = 0;    // and how many of these are still to come.
};

// A sleep and a wake-up cost more than the wait for an answer of another process that runs. Two processes that answer
// each other leave their sleeps behind only if both spin for longer than the other takes to wake up. On the other hand,
// whoever spins keeps the processor from those that it waits for, if there are fewer processors than processes. There
// it yields the processor between its looks: those that it waits for run at once, and nobody has to be woken.
//
// A machine that does other work gives a processor that was yielded to that work, for milliseconds. One such yield
// costs as much as dozens of others save, so after each of them as many waits sleep at once instead.
//
// A wait spins if the waits of late, their sleeps included, were short enough to be replaced by spinning; and the more
// of these attempts are in vain, the more waits sleep at once. A spin in vain costs three times what another one saves.
//
// *Thread safety*: none.
template <typename System>
class BasicSpin {
 public:
  BasicSpin() = default;
  explicit BasicSpin(System system) : system_(std::move(system)) {}

  // Looks until `ready`, once at least. Returns false if that took too long: Slept is to be called after the sleep.
  // `waiting_for`: how many others may need a processor meanwhile.
  template <typename Ready>
  bool Until(Ready ready, size_t waiting_for) {
    begun_ = system_.Now();
    const bool yields = waiting_for >= system_.processors();
    const int crowd = yields ? Crowd(waiting_for) : 1;
    longest_ = yields ? crowd * kLongestYielding : kLongest;
    held_up_ = crowd * kHeldUp;
    if (crowd > kMostCrowded || usual_ > longest_ || (yields && yields_.Skip()) || spins_.Skip()) return Once(ready);
    bool yielded = false;
    do {
      for (int i = 0; i < kLooks; ++i) {
        if (Once(ready)) {
          spins_.OnSuccess();
          if (yielded) yields_.OnSuccess();
          return true;
        }
        system_.Relax();
      }
      if (yields && IsHeldUp()) return Once(ready);
      yielded = yields;
    } while (system_.Now() - begun_ < longest_);
    spins_.OnFailure();
    return false;
  }

  // Notes the end of the wait that Until has begun.
  void Slept() {
    // A longer wait counts as one of this length, so that a few short ones make up for it.
    const Duration length = std::min<Duration>(system_.Now() - begun_, 4 * longest_);
    usual_ += (length - usual_) / 4;
  }

 private:
  using Clock = typename System::Clock;
  using Duration = typename Clock::duration;

  static constexpr int kLooks = 8;  // Between two looks at the clock.
  // Twice what it takes to wake a process up on a slow machine.
  static constexpr Duration kLongest = std::chrono::microseconds(100);
  // Four processes on two processors answer each other in this time, and more of them in as much more.
  static constexpr Duration kLongestYielding = 4 * kLongest;
  // A yield of this length has given the processor to something else than processes that answer; longer, as above.
  static constexpr Duration kHeldUp = std::chrono::microseconds(200);
  static constexpr size_t kUncrowded = 2;  // Processes for each processor to which the two times belong.
  // Waits of more than four times as many processes sleep at once, since each would have its turn too late.
  static constexpr int kMostCrowded = 4;
  // Time that a wait saves, its own sleep and its part in those of others, or less.
  static constexpr Duration kSaved = std::chrono::microseconds(50);

  // Beyond kMostCrowded the number does not matter.
  int Crowd(size_t processes) const {
    return static_cast<int>(std::clamp<size_t>(processes / system_.processors() / kUncrowded, 1, kMostCrowded + 1));
  }

  template <typename Ready>
  bool Once(Ready& ready) {
    if (!ready()) return false;
    Slept();
    return true;
  }

  // Yields. Returns whether something else had the processor meanwhile, for so long that waits had better sleep.
  bool IsHeldUp() {
    const auto before = system_.Now();
    system_.Yield();
    const Duration length = system_.Now() - before;
    if (length < held_up_) return false;
    yields_.OnFailure(static_cast<unsigned>(std::min<Duration>(length, std::chrono::seconds(1)) / kSaved));
    return true;
  }

  System system_;
  typename Clock::time_point begun_;
  Duration longest_{0};  // The time that the wait may spin.
  Duration held_up_{0};  // The least length of a yield that shows other work.
  Duration usual_{0};    // The mean length of the waits of late.
  Backoff spins_{1, 1023, 4};
  Backoff yields_{31, 16383, 8};
};

using Spin = BasicSpin<SpinSystem>;

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SPIN_H_
