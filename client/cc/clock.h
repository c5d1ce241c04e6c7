// The time that a worker lives by.

#ifndef SYNCBN_CLIENT_CC_CLOCK_H_
#define SYNCBN_CLIENT_CC_CLOCK_H_

#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpc/support/time.h"

namespace syncbn {

// The wall clock's time when it was first asked for, and from then on what the monotonic clock has counted: a wait
// takes as long as it should, though someone sets the wall clock meanwhile.
inline absl::Time Now() {
  static const absl::Time wall = absl::Now();
  static const std::chrono::steady_clock::time_point steady = std::chrono::steady_clock::now();
  return wall + absl::FromChrono(std::chrono::steady_clock::now() - steady);
}

// A time of Now() as a completion queue takes it.
inline gpr_timespec QueueDeadline(absl::Time time) {
  if (time == absl::InfiniteFuture()) return gpr_inf_future(GPR_CLOCK_MONOTONIC);
  return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                      gpr_time_from_nanos(absl::ToInt64Nanoseconds(time - Now()), GPR_TIMESPAN));
}

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CLOCK_H_
