// The lines of a master's log about its groups.

#ifndef SYNCBN_SERVER_RPC_EVENT_LOG_H_
#define SYNCBN_SERVER_RPC_EVENT_LOG_H_

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/core/types.h"
#include "server/log/throttle.h"

namespace syncbn::rpc {

// One line each, at a bounded rate for each reason. `now`: of a clock that only goes forward. Not thread-safe.
class EventLog {
 public:
  // A round that failed; nothing of others.
  void OnRoundEnded(const core::RoundEnded& ended, absl::Time now);
  // Rounds that have waited for long, and for whom they wait.
  void OnLateRounds(const core::SendLateRounds& late, absl::Time now);
  // A stream that is closed with an error: a join that is refused, a frame that is malformed.
  void OnStreamClosed(const core::Error& error, absl::Time now);

 private:
  Throttle throttle_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_EVENT_LOG_H_
