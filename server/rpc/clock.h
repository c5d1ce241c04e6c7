// The time that a master's loop lives by.

#ifndef SYNCBN_SERVER_RPC_CLOCK_H_
#define SYNCBN_SERVER_RPC_CLOCK_H_

#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpc/support/time.h"

namespace syncbn::rpc {

// The wall clock's time when it is made, and from then on what the monotonic clock has counted: a deadline comes when
// it is due, though someone sets the wall clock meanwhile.
class Clock {
 public:
  absl::Time Now() const { return wall_ + absl::FromChrono(std::chrono::steady_clock::now() - steady_); }

  // `time` as a completion queue takes it.
  gpr_timespec Deadline(absl::Time time) const {
    if (time == absl::InfiniteFuture()) return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_nanos(absl::ToInt64Nanoseconds(time - Now()), GPR_TIMESPAN));
  }

 private:
  const absl::Time wall_ = absl::Now();
  const std::chrono::steady_clock::time_point steady_ = std::chrono::steady_clock::now();
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CLOCK_H_
