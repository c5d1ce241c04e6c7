// Attempts to connect: the next one's time and target, and the moment at which a worker gives up.

#ifndef SYNCBN_CLIENT_CC_SESSION_ATTEMPTS_H_
#define SYNCBN_CLIENT_CC_SESSION_ATTEMPTS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/errors.h"
#include "client/cc/session/targets.h"

namespace syncbn::session {

// The cause for which a stream broke, and its status.
struct Break {
  enum class Cause {
    kOther,
    kRefusedByTls,  // TLS found no agreement: another attempt would meet the same.
    kClosedByPeer,  // The other side closed the connection.
    kFrameTooLong,  // A frame exceeded what gRPC takes: another attempt would bring it again.
  };
  absl::Status
      status;  // With its details (client/cc/errors.h), if the master gave them. OK: the master ended the call.
  Cause cause = Cause::kOther;
};

// The reason of a join that was refused because another worker holds the rank.
inline constexpr absl::string_view kRankTaken = "RANK_TAKEN";

// Returns true if the master refuses a join for now: another worker holds the rank, or there are too many groups, in
// all or of this host's. A master's groups go as their jobs end, or as strangers who have opened them leave.
bool IsRefusedForNow(const ErrorDetails& details);

// Times attempts with exponential backoff, going through the targets in turn.
//
// *Thread safety*: none.
class Attempts {
 public:
  // `tls`: streams are encrypted; for error texts.
  Attempts(uint32_t rank, absl::Duration join_timeout, bool tls, absl::Time now);

  absl::Time retry_at() const { return retry_at_; }
  absl::Time give_up_at() const { return give_up_at_; }
  // After SetTargets succeeded.
  const TargetTurn& targets() const { return targets_; }
  // Returns the time that a connection to one address may take.
  absl::Duration connect_timeout() const;

  absl::Status SetTargets(absl::string_view list) { return targets_.SetList(list); }
  // Notes that a master has let the worker in.
  void Joined(absl::Time now);
  // Notes that the stream has brought an outcome.
  void Answered() { answered_ = true; }

  // Plans the next attempt after a stream that broke: one that had joined, or one that had not.
  void BrokeAfterJoin(Break why, absl::Time now);
  void Failed(Break why, absl::Time now);

  // Returns the warning to log if the newest break says that another worker holds the rank; once for each text.
  std::optional<std::string> RankTakenNotice();
  // Returns the error to end with when give_up_at() has come.
  absl::Status GiveUpError() const;

 private:
  void PauseFrom(absl::Time now);
  // Returns an explanation of a connection that the other side has closed before it let the worker in, or nothing.
  absl::string_view Hint() const;

  const uint32_t rank_;
  const absl::Duration join_timeout_;
  const bool tls_;
  TargetTurn targets_;
  absl::Time retry_at_;
  absl::Time give_up_at_;
  absl::Duration backoff_;
  Break last_break_;
  bool ever_joined_ = false;
  absl::Time joined_at_;
  bool answered_ = false;     // The stream that joined last has brought an outcome.
  std::string taken_notice_;  // The newest of RankTakenNotice since the last join.
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_ATTEMPTS_H_
