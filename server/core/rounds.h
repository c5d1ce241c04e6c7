// The rounds of a group that are in flight: from a contribution to an outcome.

#ifndef SYNCBN_SERVER_CORE_ROUNDS_H_
#define SYNCBN_SERVER_CORE_ROUNDS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "plumbing/vector_pool.h"
#include "server/core/effects.h"
#include "server/core/events.h"
#include "server/core/flight_recorder.h"
#include "server/core/layers.h"
#include "server/core/limits.h"
#include "server/core/members.h"
#include "server/core/pending_round.h"
#include "server/core/round_statistics.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// A contribution is rejected (its sender alone is told, and nothing changes), answered with the outcome of a round that
// has ended, or accepted into a round, which it begins if it is the first. A round then ends in one of these ways:
//
//   MaybeEnd     what is known of the members decides it: all have contributed, or those missing cannot
//   Expire       its deadline has come
//   FindDeadlock every member is blocked, and on different rounds
//   Fail         something else makes it fail: bad numbers, a conflict about its layer, the end of the group
//
// The first three lead to Complete, which merges the contributions, or to Fail. Both lead to Finish, which records the
// outcome, sends it to the contributors and forgets the round.
//
// A round that ended under an earlier master is recorded, without its outcome, when a member reports it. Its
// contributors repeat what they had sent, and it is merged again, for those who wait for it: it is *restored*.
//
// An event that may decide many rounds (a leave, a loss) starts a *review*: MaybeEnd for each round, in turns of
// Limits::max_turn_bytes, so that events of other groups are handled in between.
//
// Thread safety: none; pure. Methods append what is to be done to `effects`.
class Rounds {
 public:
  // `config` has every default filled in. All arguments must outlive this object.
  Rounds(const GroupId& id, const GroupConfig& config, const Limits& limits, Members& members, Layers& layers)
      : id_(id),
        config_(config),
        limits_(limits),
        members_(members),
        layers_(layers),
        recorder_(members.world_size()) {}
  Rounds(const Rounds&) = delete;
  Rounds& operator=(const Rounds&) = delete;

  // Rounds that somebody waits for.
  size_t size() const { return pending_.size() - idle_; }
  uint64_t completed() const { return completed_; }
  uint64_t failed() const { return failed_; }
  size_t pending_bytes() const { return pending_bytes_; }
  // Returns whether somebody waits for the outcome of a round that ended under an earlier master.
  bool AnyRestoredAwaited() const;
  const RoundStatistics& statistics() const { return statistics_; }
  const FlightRecorder& recorder() const { return recorder_; }
  // Returns when the oldest round in flight began; nothing if there is none.
  std::optional<absl::Time> OldestBegun() const;

  // Begins the work of one event, for the measure of max_turn_bytes.
  void BeginTurn() { turn_ = limits_.max_turn_bytes; }
  // Returns why the keys of a frame cannot be handled: a malformed name, or too many of them.
  std::optional<Error> CheckKeys(const FrameReceived& frame) const;
  // A member that is catching up reports a round that ended under an earlier master. Returns an error if that is not
  // how it ended here: the member's past is not the group's.
  std::optional<Error> OnEnded(Rank rank, const EndedReport& report, absl::Time now, Effects& effects);
  // `left_ranks` as in FrameReceived.
  void OnContribution(Rank rank, const Contribution& contribution, const std::vector<Rank>& left_ranks, absl::Time now,
                      Effects& effects);
  // The member has caught up. `forgotten` as in FrameReceived.
  void OnCaughtUp(Rank rank, const std::vector<RoundKey>& forgotten, absl::Time now, Effects& effects);
  // A member says that it sends nothing until one of these rounds ends. Ignored unless it awaits each of them.
  void OnBlocked(Rank rank, const std::vector<RoundKey>& keys);
  // Ends the rounds that block all members, if there are no others that could still contribute.
  void FindDeadlock(absl::Time now, Effects& effects);
  // Reviews all rounds, as far as this turn goes.
  void BeginReview(absl::Time now, Effects& effects);
  void ContinueReview(absl::Time now, Effects& effects);
  bool under_review() const { return review_.has_value(); }
  // Announces late rounds and ends those whose deadlines have come, as far as this turn goes.
  void OnTimePassed(absl::Time now, Effects& effects);
  // Returns when a review continues, or OnTimePassed is due; InfiniteFuture if neither is.
  absl::Time NextDeadline() const;

  // Fails the rounds of a layer.
  void FailLayer(absl::string_view layer, const Error& error, absl::Time now, Effects& effects);
  // Fails the rounds that the rank has not contributed to: it has restarted, so they wait in vain.
  void FailAwaiting(Rank rank, absl::Time now, Effects& effects);
  // Fails every round because the group ends.
  void FailAll(const Error& why, absl::Time now, Effects& effects);

  // Returns the oldest kMostShownRounds, oldest first.
  std::vector<PendingRoundView> Views(absl::Time now) const;

  // Aborts unless every total and index agrees with the rounds, and every round is rightly in flight.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  // A std::map: rounds end while others are being looked at, and iterators must survive that.
  using Pending = std::map<RoundKey, PendingRound>;
  // For the numbers of contributions. A group that does nothing keeps them too, so they are few.
  static constexpr size_t kMostSpareBytes = size_t{32} << 10;
  // The end that a round is to take, once it is decided.
  struct Fate {
    bool decided = false;
    std::optional<Error> error;
  };

  // ---- Rounds of an earlier master (rounds_restored.cc)
  // Returns the contributors of the round that is reported, by rank; none if the report cannot be used.
  Roster RosterOf(const EndedReport& report, const Layer& layer) const;
  // Notes that the member knows of a forward round that ended under an earlier master: see EndedRound::holders.
  static void NoteHolder(Rank rank, EndedRound* ended);
  // Returns whether the round, which completed under an earlier master, would have failed with these numbers. They are
  // not what the rank contributed then. `round` may be pending_.end().
  bool Contradicts(Rank rank, const Contribution& contribution, const EndedRound* ended,
                   Pending::const_iterator round) const;
  // Notes that the rank has forgotten the round and those of its layer and phase before it, and fails those in flight
  // that it may have contributed to: it will not do so again.
  void NoteForgotten(Rank rank, const RoundKey& key, absl::Time now, Effects& effects);
  // A member that catches up has contributed to the round.
  void NoteStraddling(const std::vector<Rank>& left_ranks, PendingRound* round) const;
  // Has the round, of which contributions have arrived, end as it ended before.
  void Settle(Pending::iterator round, const EndedRound& ended);
  // Fills a round in that is to be merged again.
  void BeginRestored(const EndedRound& ended, PendingRound* round) const;
  // Adds a rank to those that wait for the outcome of a restored round and do not count.
  void AddLatecomer(Rank rank, PendingRound* round);
  // Moves the deadline of a restored round that somebody has come to wait for.
  void NoteWaiter(Pending::iterator round, absl::Time now);
  // Ends those of the rounds that are restored: nobody will repeat what they lack. Returns whether there were any.
  bool FailRestored(const std::vector<RoundKey>& keys, absl::Time now, Effects& effects);
  Fate FateOfRestored(const RoundKey& key, const PendingRound& round, const std::vector<Rank>& missing) const;
  // Forgets an idle round.
  void Drop(Pending::iterator round);
  void DropIdle();

  // ---- Arrival (rounds_arrival.cc)
  // Answers a contribution to a round that has ended. Returns whether it has.
  bool Replay(Rank rank, const Contribution& contribution, const EndedRound* ended, Effects& effects);
  // Returns why the outcome of an ended round cannot be told again, and names the limit.
  Error OutcomeForgotten(const RoundKey& key) const;
  // Returns whether the contribution may be ignored: its sender has the outcome, and nobody needs it.
  bool IsNeedless(Rank rank, const Contribution& contribution, const EndedRound* ended) const;
  // Returns the declaration under which the rank's contribution is made. `round` may be pending_.end().
  DeclarationPtr DeclarationFor(Rank rank, const RoundKey& key, const Layer& layer,
                                Pending::const_iterator round) const;
  // Returns why a contribution is rejected. `round` may be pending_.end().
  std::optional<Error> CheckArrival(Rank rank, const Contribution& contribution, const Layer& layer,
                                    Pending::const_iterator round) const;
  std::optional<Error> CheckBackward(Rank rank, const RoundKey& key, const Layer& layer,
                                     Pending::const_iterator round) const;
  // Returns why the rank takes no part in the backward round of this forward round, which has completed.
  std::optional<Error> CheckContributor(Rank rank, const RoundKey& key, const EndedRound& forward) const;
  std::optional<Error> CheckRoom(Rank rank, const Contribution& contribution, Pending::const_iterator round) const;
  // Returns why a round fails that has just accepted this contribution.
  std::optional<Error> CheckAccepted(Rank rank, const Contribution& contribution, const Layer& layer,
                                     Pending::const_iterator round) const;
  Pending::iterator Begin(const RoundKey& key, const Layer& layer, absl::Time now);
  // Adds the contribution to the round. A repetition changes nothing; a predecessor's contribution, which nobody has
  // seen yet, is replaced. Returns false, having rejected it, if the rank has contributed other numbers.
  bool Accept(Rank rank, const Contribution& contribution, const DeclarationPtr& declaration, Pending::iterator round,
              absl::Time now, Effects& effects);
  void Reject(Rank rank, const RoundKey& key, Error error, Effects& effects);

  // ---- End (rounds.cc)
  void MaybeEnd(Pending::iterator round, absl::Time now, Effects& effects);
  // Returns false if a count of members alone shows that the fate of the round is undecided.
  bool MayBeDecided(const PendingRound& round) const;
  Fate FateOf(const RoundKey& key, const PendingRound& round, const std::vector<Rank>& missing, absl::Time now) const;
  // Returns the number of contributions without which a round may not proceed; 0 under the policy FAIL.
  size_t LeastWorkers(const PendingRound& round) const;
  void AnnounceLate(Pending::iterator round, absl::Time now, Effects& effects);
  void Expire(Pending::iterator round, absl::Time now, Effects& effects);
  // Ends the round without those that have not contributed: completes or fails it, by the group's policy. `when` is for
  // the error's message.
  void EndWithoutMissing(Pending::iterator round, absl::string_view when, absl::Time now, Effects& effects);
  // Returns a hint if a missing rank has declared the layer otherwise than the round's contributors; or "".
  std::string DeclarationHint(Pending::const_iterator round, const std::vector<Rank>& missing) const;
  // Returns those of the missing ranks that may have contributed under an earlier master, and been told the outcome,
  // before they left: it was made of numbers that nobody has any more.
  std::vector<Rank> TakenAlong(const PendingRound& round, const std::vector<Rank>& missing) const;
  // Appends to the error what each of its ranks, which are missing from a round, has contributed last.
  Error WithLastContributions(Error error, absl::Time now) const;
  // Removes the ranks that have left: nobody waits for them.
  std::vector<Rank> WithoutLeft(std::vector<Rank> ranks) const;
  void Complete(Pending::iterator round, std::vector<Rank> missing, absl::Time now, Effects& effects);
  void Fail(Pending::iterator round, Error error, absl::Time now, Effects& effects);
  void Erase(Pending::iterator round);
  void Count(const PendingRound& round, const RoundOutcome& outcome, absl::Time now);
  void Finish(Pending::iterator round, std::shared_ptr<const RoundOutcome> outcome, absl::Time now, Effects& effects);
  // Returns the round's contributors.
  static Roster RosterOf(const Payloads& payloads);
  // Returns the roster of the phase's newest round if it is the same.
  std::shared_ptr<const Roster> Share(Phase phase, Roster roster);
  std::string DescribeWaiters() const;
  PendingRoundView ViewOf(Pending::const_iterator round, absl::Time now) const;

  // ---- Going on after a failure (rounds_resumed.cc)
  // A member reports that it was told this error of a round of this sequence by an earlier master.
  void NoteTold(Rank rank, uint64_t sequence, const Error& error);
  // Returns the number at which those go on whose round of this sequence fails, or nothing; see PROTOCOL.md, section 4.
  std::optional<uint64_t> ResumeAfter(uint64_t sequence);
  // Returns whether this end of a round of this sequence shows that members have begun unequally many rounds: a rank
  // that it lacks waits elsewhere, or its contributors are behind a number that others were told.
  bool ShowsDivergence(const Error& error, uint64_t sequence) const;
  // Adds the number to the error if it shows that.
  Error WithResumption(Error error, uint64_t sequence);

  // ---- Turns
  // Returns whether steps that may complete many rounds wait for readers that lag. Steps that fail rounds do not wait:
  // errors are short.
  bool WaitsForReaders() const { return members_.any_lags() && (proceeds() || !AnyRankFailsRounds()); }
  // Returns whether deadlines wait too: under PROCEED they complete rounds.
  bool DeadlinesWait() const { return proceeds() && WaitsForReaders(); }
  bool AnyRankFailsRounds() const { return members_.given_up() != 0 || members_.any_layer_set_errors(); }
  bool proceeds() const { return config_.missing_policy == MissingPolicy::kProceed; }
  bool waits() const { return config_.missing_policy == MissingPolicy::kWait; }
  void Spend(size_t bytes) { turn_ -= std::min(turn_, bytes); }
  // The cost of a look at all ranks, and of a short outcome: the time of so many bytes of a long one.
  size_t RanksCost() const { return 2048 + sizeof(Rank) * members_.world_size(); }

  const GroupId& id_;
  const GroupConfig& config_;
  const Limits& limits_;
  Members& members_;
  Layers& layers_;

  Pending pending_;
  absl::btree_set<std::pair<absl::Time, RoundKey>> alarms_;  // The pending rounds'.
  size_t idle_ = 0;                                          // Restored rounds that nobody waits for.
  size_t pending_bytes_ = 0;
  VectorPool spare_{kMostSpareBytes};
  size_t turn_ = 0;  // The rest of max_turn_bytes.
  // The key from which on rounds are still to be reviewed, and when that became due.
  std::optional<std::pair<RoundKey, absl::Time>> review_;
  std::array<std::shared_ptr<const Roster>, 3> newest_rosters_;  // By phase.
  uint64_t resume_at_ = 0;  // The newest number at which members were told to go on.
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
  RoundStatistics statistics_;
  FlightRecorder recorder_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_ROUNDS_H_
