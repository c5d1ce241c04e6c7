// Decides when connections are checked.

#ifndef SYNCBN_SERVER_RPC_CHECK_SCHEDULE_H_
#define SYNCBN_SERVER_RPC_CHECK_SCHEDULE_H_

#include <cstddef>

#include "absl/time/time.h"

namespace syncbn::rpc {

// A check takes a few calls of the system for each connection. All checks take a fiftieth of the time, and up to a
// fifth while the process grows: gRPC keeps what peers send and do not finish, so a check that comes late may come too
// late.
//
// Thread safety: none.
class CheckSchedule {
 public:
  // Longest time between two checks.
  static constexpr absl::Duration kLongest = absl::Seconds(1);
  // The process has grown by so much since it was smallest after the last check: half of what connections without
  // a worker may leave unfinished.
  static constexpr size_t kMuchGrowth = size_t{8} << 20;

  // Returns whether it is time for a check, where the process has `resident` bytes of memory. To be called every few
  // milliseconds.
  bool IsDue(absl::Time now, size_t resident);
  // A check has ended, which took `cpu` of CPU time: a thread that waits for a processor takes nothing from others.
  void Checked(absl::Time now, absl::Duration cpu);

 private:
  absl::Time due_ = absl::InfinitePast();
  absl::Time due_if_grown_ = absl::InfinitePast();
  size_t smallest_ = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CHECK_SCHEDULE_H_
