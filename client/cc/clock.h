// The clock that all workers of a process share.

#ifndef SYNCBN_CLIENT_CC_CLOCK_H_
#define SYNCBN_CLIENT_CC_CLOCK_H_

#include "absl/time/time.h"
#include "grpc/support/time.h"
#include "plumbing/clock.h"

namespace syncbn {

inline const Clock& ProcessClock() {
  static const Clock clock;
  return clock;
}

inline absl::Time Now() { return ProcessClock().Now(); }
inline gpr_timespec QueueDeadline(absl::Time time) { return ProcessClock().QueueDeadline(time); }

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CLOCK_H_
