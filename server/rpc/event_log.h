// Log lines about a master's groups.

#ifndef SYNCBN_SERVER_RPC_EVENT_LOG_H_
#define SYNCBN_SERVER_RPC_EVENT_LOG_H_

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/core/types.h"
#include "server/log/throttle.h"

namespace syncbn::rpc {

// Writes one line for each event, at a bounded rate for each reason. `now` must not go backwards.
//
// Thread safety: none.
class EventLog {
 public:
  // Reports a round that failed, and ignores others.
  void OnRoundEnded(const core::RoundEnded& ended, absl::Time now);
  // Reports rounds that have waited for long, and the ranks that they wait for.
  void OnLateRounds(const core::SendLateRounds& late, absl::Time now);
  // Reports a stream that is closed with an error: a refused join, a malformed frame.
  void OnStreamClosed(const core::Error& error, absl::Time now);

 private:
  Throttle throttle_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_EVENT_LOG_H_
