// A worker's session with a bug planted around it, to show that the checks of sessions have teeth.

#ifndef SYNCBN_TESTS_SIMULATION_SESSION_MUTANT_H_
#define SYNCBN_TESTS_SIMULATION_SESSION_MUTANT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cc/session/session.h"
#include "tests/simulation/frame.h"

namespace syncbn::simulation {

enum class SessionBug {
  kNone,
  kForgottenResend,    // Rounds that were under way when a stream broke are not sent again.
  kResentAnswer,       // A round that has its outcome is sent again, with other numbers.
  kRepeatedSequence,   // A sequence is counted twice.
  kReorderedRounds,    // Rounds of a frame go in another order than that in which they were begun.
  kIgnoredRetraction,  // The master still takes the worker for blocked when another thread begins to use it.
  kSilentBlock,        // The master is not told that the worker is blocked.
  kNeverGivesUp,       // The worker looks for a master beyond join_timeout.
  kNoBackoff,          // It connects anew at once.
  kBlindTrust,         // A master that has been silent for too long is waited for.
  kHaste,              // A master is given up before its time.
  kDroppedResult,      // A round's outcome does not reach its caller.
  kCompletedTwice,     // It reaches the caller twice,
  kChangedResult,      // or differs from the master's in its last bit.
  kLateDeclaration,    // A layer is declared after its contributions.
  kUnboundedChunks,    // All chunks of a long vector go at once.
  kEarlyLeave,         // The worker leaves before it has sent what it has begun,
  kSendAfterLeave,     // or sends once more afterwards.
  kStaleFrame,         // A frame of an earlier stream is taken for one of the present stream.
  kForgottenSelf,      // A worker that comes back does not say who it was.
  kSecondStream,       // Two streams are opened at once.
  kForgottenRepeat,    // Answered contributions are not sent to a master that does not know them.
  kLateRepeat,         // It is sent after the worker has said that it had sent all.
  kIgnoredMemory,      // A master that has lost its memory is not noticed.
  kShortLog,           // Answered rounds are forgotten too early.
  kForgottenLeaves,    // A master that starts anew is not told who has left,
  kUnknownLeaves,      // or that they had left before rounds ended;
  kInventedLeaves,     // or it is told so of one who had not.
  kUnreadLeaves,       // It is told that leaves were read that are still on their way.
  kKeptBackward,       // It is not told which backward rounds have been forgotten.
  kIgnoredNumber,      // The worker does not go on at the number that an error names.
  kTakenForGranted,    // A master that goes away is taken to have acknowledged a leave.
};

// A session, and the part of its driver that keeps the events of earlier streams away from it.
class SessionMutant {
 public:
  SessionMutant(session::Options options, absl::Time now, SessionBug bug);

  session::Session::State state() const { return session_.state(); }
  bool writing() const { return session_.writing(); }
  bool may_come_back() const { return session_.may_come_back(); }
  size_t present_ranks() const { return session_.present_ranks(); }
  absl::Time NextTimer() const;

  session::Effects OnTime(absl::Time now);
  session::Effects OnMasterFound(const absl::StatusOr<std::string>& targets, absl::Time now) {
    return Distort(session_.OnMasterFound(targets, now));
  }
  session::Effects OnStreamUp() { return Distort(session_.OnStreamUp()); }
  session::Effects OnFrame(session::ServerFrame frame, bool stale, absl::Time now);
  void OnWritten() { session_.OnWritten(); }
  session::Effects OnStreamBroken(session::Break why, absl::Time now);
  void OnAttended(absl::Time planned, absl::Time now) { session_.OnAttended(planned, now); }

  absl::Status Declare(const LayerOptions& layer) { return session_.Declare(layer); }
  absl::Status Begin(RoundKey key, size_t length, session::Session::MakeContribution make);
  absl::Status ResumeAt(uint64_t sequence) { return session_.ResumeAt(sequence); }
  void ResumeAfter(const absl::Status& error) {
    if (bug_ != SessionBug::kIgnoredNumber) session_.ResumeAfter(error);
  }
  session::Effects Send(absl::Time now);
  void Blocked(const session::ContributionPtr& contribution, bool sure, absl::Time now) {
    if (bug_ != SessionBug::kSilentBlock) session_.Blocked(contribution, sure, now);
  }
  void Unblocked(bool retract) { session_.Unblocked(retract && bug_ != SessionBug::kIgnoredRetraction); }
  void Leave() {
    left_ = true;
    session_.Leave("finished");
  }
  session::Effects FinishLeave() { return Distort(session_.FinishLeave()); }

 private:
  session::Effects Distort(session::Effects effects);
  void Distort(session::ClientFrame& frame);
  void AddResentAnswer(session::ClientFrame& frame);

  const SessionBug bug_;
  session::Session session_;
  bool left_ = false;
  bool leave_written_ = false;
  std::vector<ContributionRef> begun_;                     // And not sent yet; for kUnboundedChunks.
  std::set<session::ContributionPtr> sent_;                // On any stream,
  std::set<session::ContributionPtr> lost_;                // and on one that has broken.
  std::map<std::string, uint64_t> last_sequence_;          // By layer; for kRepeatedSequence.
  session::ContributionPtr answered_;                      // For kResentAnswer.
  std::vector<std::shared_ptr<const LayerOptions>> late_;  // For kLateDeclaration.
  std::vector<session::ContributionPtr> late_repeats_;     // For kLateRepeat.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_SESSION_MUTANT_H_
