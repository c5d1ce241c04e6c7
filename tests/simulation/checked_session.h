// Checks that a worker keeps the protocol's promises: each call of one session is compared with what it should do. The
// checks share no code with the session; they keep their own books of rounds, declarations and attempts.

#ifndef SYNCBN_TESTS_SIMULATION_CHECKED_SESSION_H_
#define SYNCBN_TESTS_SIMULATION_CHECKED_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cc/session/session.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/session_mutant.h"
#include "tests/simulation/settings.h"

namespace syncbn::simulation {

// Returns whether two results are the same to the bit.
bool SameResult(const RoundResult& a, const RoundResult& b);

// The session of one simulated worker. Its methods are the session's, whose comments hold for them.
class CheckedSession {
 public:
  using State = session::Session::State;

  CheckedSession(const Settings& settings, core::Rank rank, uint64_t first_sequence, absl::Time now, SessionBug bug,
                 Tally* tally);

  State state() const { return session_.state(); }
  uint64_t incarnation() const { return incarnation_; }
  uint64_t run_id() const { return run_id_; }
  // Returns whether it knows that the rank has left, and that its rounds end without that.
  bool KnowsLeft(core::Rank rank) const;
  bool may_come_back() const { return session_.may_come_back(); }
  absl::Time NextTimer() const { return session_.NextTimer(); }
  // The first promise that was broken.
  const std::optional<std::string>& violation() const { return violation_; }

  session::Effects OnTime(absl::Time now);
  session::Effects OnMasterFound(const absl::StatusOr<std::string>& targets, absl::Time now);
  session::Effects OnStreamUp(absl::Time now);
  // `stale`: the frame comes from an earlier stream.
  session::Effects OnFrame(const session::ServerFrame& frame, bool stale, absl::Time now);
  void OnWritten();
  session::Effects OnStreamBroken(const session::Break& why, absl::Time now);
  void OnAttended(absl::Time planned, absl::Time now);

  void Declare(const LayerOptions& layer);
  // Returns the contributions: one, or the chunks of a long vector.
  std::vector<ContributionRef> Begin(const RoundKey& key, const NumbersPtr& numbers);
  void ResumeAfter(const absl::Status& error);
  session::Effects Send(absl::Time now);
  void Blocked(const ContributionRef& contribution, bool sure, absl::Time now);
  void Unblocked(bool retract);
  void Leave(absl::Time now);
  session::Effects FinishLeave(absl::Time now);
  // Returns the time at which the program stops waiting for its leave to be acknowledged; InfiniteFuture if it has not
  // left.
  absl::Time LeaveDue() const;

 private:
  // A round that was begun and has not ended.
  struct Round {
    ContributionRef contribution;
    std::string vector;  // The long vector that it is a chunk of.
    uint64_t order = 0;
    uint32_t channels = 0;       // The layer's when it was begun; 0 for a backward round.
    bool on_stream = false;      // Written to the present stream.
    std::vector<uint32_t> left;  // Ranks that left before its end.
    // Those of them that had when the newest stream broke, if it was written to that or to one before.
    std::optional<std::vector<uint32_t>> left_earlier;
    std::optional<absl::Time> first_sent;
    absl::Time sent;
  };
  // A round that has ended for all who contributed to it.
  struct Answered {
    Round round;
    uint64_t memory = 0;  // The master's that has told its outcome.
  };
  // The session's answer to one call, in short.
  struct Done {
    bool wrote = false;
    bool searched = false;
    std::optional<absl::Status> ended;
  };

  void Violate(const std::string& what);
  // Checks what the session does. `cause`: what it may end with, beyond what time and the program are to blame for.
  Done Check(const session::Effects& effects, absl::Time now, const absl::Status& cause = absl::OkStatus());
  void Check(const session::FindMaster& find, absl::Time now);
  void Check(const session::Connect& connect, absl::Time now);
  void Check(const session::Write& write, absl::Time now);
  void Check(const session::CloseStream& close, absl::Time now);
  void Check(const session::Complete& complete, absl::Time now);
  void Check(const session::JoinedGroup& joined, absl::Time now);
  void Check(const session::Notice& notice, absl::Time now);
  void Check(const session::Ended& ended, absl::Time now);

  // ---- What is written
  void CheckJoin(const session::ClientFrame& frame);
  void CheckLeft(const session::ClientFrame& frame);
  void CheckPart(const session::ContributionPtr& part, absl::Time now);
  void CheckRepeat(const session::ContributionPtr& part);
  void CheckPlace(Round& round);
  void CheckCaughtUp(const session::ClientFrame& frame);
  void CheckChunk(const Round& round);
  void CheckBlocked(const session::ContributionPtr& on);
  void CheckAllSent(absl::Time now);

  // ---- Attempts to connect
  void NoteBreak(bool joined, absl::Time now);
  void PauseBefore(absl::Time now);

  // ---- A silent master
  absl::Time AnswerDue(const Round& round) const;
  bool AnswerIsDue(absl::Time now) const;

  void NoteLeft(const std::vector<uint32_t>& left_ranks);

  Round* Find(const session::Contribution* contribution);
  size_t ChunksUnderWay(const std::string* vector) const;

  const Settings& settings_;
  Tally& tally_;
  SessionMutant session_;
  std::optional<std::string> violation_;
  bool ended_ = false;

  // The stream.
  bool asked_ = false;  // The session has asked where the master is, and was not told yet.
  bool open_ = false;
  bool up_ = false;
  bool join_written_ = false;
  bool joined_ = false;
  bool writing_ = false;
  uint64_t incarnation_ = 0;
  uint64_t run_id_ = 0;
  const session::ServerFrame* frame_ = nullptr;  // The one that is being handled.
  absl::Status cause_;                           // The stream's status, with which the session may end now.
  bool silent_ = false;                          // The master has owed an answer for too long.

  // Attempts.
  bool searched_ = false;  // With success.
  size_t target_ = 0;      // The number of the target that is next, counted on and on.
  size_t failures_ = 0;    // Since a master was reached.
  absl::Duration pause_;   // The next one.
  absl::Time connect_at_;
  absl::Time give_up_at_;
  absl::Time joined_at_;
  bool answered_ = false;  // The stream has brought an outcome.

  // Rounds.
  std::vector<Round> rounds_;  // In the order in which they were begun.
  std::vector<Answered> answered_rounds_;
  uint64_t memory_ = 0;  // The master's.
  // On this stream: the version of the newest membership that has come, and of the one that the master was told of.
  uint64_t membership_ = 0;
  uint64_t membership_said_ = 0;
  bool must_catch_up_ = false;
  std::vector<uint32_t> left_ranks_;
  uint64_t begun_ = 0;
  // The order of the newest that was written to this stream; of each long vector's chunks, and of all others.
  std::map<std::string, uint64_t> last_written_;
  std::map<std::string, uint64_t> next_sequence_;  // By layer and phase.
  uint64_t first_sequence_;
  std::map<std::string, uint32_t> declared_;  // Channels by layer, as the program has declared it,
  std::map<std::string, uint32_t> said_;      // and as the master has it from this stream.
  bool all_said_ = false;                     // Nothing has changed since they were found equal.
  absl::Time heard_at_ = absl::InfinitePast();
  absl::Time attended_since_ = absl::InfinitePast();

  // Blocked.
  session::ContributionPtr blocked_on_;
  absl::Time say_blocked_by_;
  session::ContributionPtr said_blocked_on_;  // The round that the master believes the worker to be blocked on.
  bool must_retract_ = false;

  bool leaving_ = false;
  bool leave_written_ = false;
  absl::Time left_at_;
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_CHECKED_SESSION_H_
