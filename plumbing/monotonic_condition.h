// A condition variable whose timed waits do not follow the wall clock.

#ifndef SYNCBN_PLUMBING_MONOTONIC_CONDITION_H_
#define SYNCBN_PLUMBING_MONOTONIC_CONDITION_H_

#include <atomic>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace syncbn {

// Abseil's timed waits end at a time of the wall clock: a clock that is set back by an hour lengthens those under way
// by an hour. These are measured by the monotonic clock. Waits may end early.
//
// A forked child may destroy one that threads of its parent wait for; the standard library's would wait for those.
//
// Thread safety: any thread may call any method.
class MonotonicCondition {
 public:
  // Gives the mutex up until SignalAll is called, for at most `timeout`.
  void WaitFor(absl::Mutex* mutex, absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  void Wait(absl::Mutex* mutex) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { WaitFor(mutex, absl::InfiniteDuration()); }
  // Waits for `timeout`, whoever calls SignalAll meanwhile, or until `ended`, which the mutex guards. Returns `ended`.
  bool SleepUnless(absl::Mutex* mutex, const bool& ended, absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  // Wakes all that wait. What they wait for has been changed with the mutex held.
  void SignalAll();

 private:
  std::atomic<uint32_t> signals_{0};
  std::atomic<uint32_t> waiters_{0};
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_MONOTONIC_CONDITION_H_
