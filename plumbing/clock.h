// Monotonic time, and its conversion to the deadlines of gRPC's completion queues.

#ifndef SYNCBN_PLUMBING_CLOCK_H_
#define SYNCBN_PLUMBING_CLOCK_H_

#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpc/support/time.h"

namespace syncbn {

// Starts at the wall clock's time and then advances with the monotonic clock, so that changes of the system time do not
// move deadlines. Times of two clocks are not comparable.
//
// Thread safety: any thread may call any method.
class Clock {
 public:
  absl::Time Now() const { return wall_ + absl::FromChrono(std::chrono::steady_clock::now() - steady_); }

  // Returns `time`, which is one of this clock's, as a completion queue or an alarm takes it. A time that has come is
  // the infinite past: gRPC rounds others up to whole milliseconds, and would sleep until then.
  gpr_timespec QueueDeadline(absl::Time time) const {
    if (time == absl::InfiniteFuture()) return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    const absl::Duration left = time - Now();
    if (left <= absl::ZeroDuration()) return gpr_inf_past(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_nanos(absl::ToInt64Nanoseconds(left), GPR_TIMESPAN));
  }

 private:
  const absl::Time wall_ = absl::Now();
  const std::chrono::steady_clock::time_point steady_ = std::chrono::steady_clock::now();
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_CLOCK_H_
