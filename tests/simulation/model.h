// Checks that a master keeps the protocol's promises, by what one coordinator is told and what it answers. The checks
// share no code with it: they keep their own books of seats, contributions and outcomes, and merge in long double.

#ifndef SYNCBN_TESTS_SIMULATION_MODEL_H_
#define SYNCBN_TESTS_SIMULATION_MODEL_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/history.h"
#include "tests/simulation/numbers.h"
#include "tests/simulation/settings.h"

namespace syncbn::simulation {

// The incarnations that were ever given out, by run and rank; they outlive masters.
using Incarnations = std::map<std::pair<uint64_t, core::Rank>, uint64_t>;

// One life of a master. Before each event goes to the coordinator, Before...; afterwards After, with its effects.
class Model {
 public:
  Model(const Settings& settings, Incarnations* incarnations, Tally* tally)
      : settings_(settings), incarnations_(*incarnations), tally_(*tally), history_(settings.world_size) {}

  void BeforeFrame(core::StreamId stream, const Frame& frame, absl::Time now);
  void BeforeClose(core::StreamId stream, absl::Time now);
  void BeforeTime(absl::Time now);
  void BeforeShutdown();
  // A worker has died, or two have the same rank. Its successor may contribute other numbers under the same keys.
  void After(const core::Effects& effects, const core::Coordinator& coordinator, absl::Time now);

  // The running statistics are those of the rounds that completed.
  void CheckStatistics(const core::Coordinator& coordinator);
  // Nobody is connected, and nobody has been for long.
  void CheckEmpty(const core::Coordinator& coordinator);

  // The first promise that was broken.
  const std::optional<std::string>& violation() const { return violation_; }
  size_t pending() const { return pending_.size(); }

 private:
  struct Pending {
    absl::Time begun;
    HeldParts parts;
    std::vector<core::Rank> expected;
    int64_t forward_count = 0;
    bool told_late = false;
    bool restored = false;
    bool straddles = false;           // An earlier master has had a contribution, and perhaps ended it.
    std::set<core::Rank> left;        // Then: those that had left before a contribution was begun.
    std::set<core::Rank> repeats;     // Restored: contributors that have the outcome,
    std::set<core::Rank> latecomers;  // and ranks that wait for it and do not count.
    bool idle() const { return restored && latecomers.empty() && repeats.size() == parts.size(); }
  };
  struct Member {
    core::StreamId stream = 0;  // 0 if it has none.
    uint64_t incarnation = 0;
    bool left = false;
    bool left_before = false;      // It has left an earlier master.
    bool had_left = false;         // It had left when it joined, and has sent nothing since,
    bool had_left_before = false;  // and had left an earlier master.
    bool catching_up = false;
    bool returning = false;                    // Came back, and has not said that it has sent all.
    std::map<std::string, uint32_t> channels;  // By layer, as it was declared last.
    std::optional<absl::Time> lost_at;
    std::vector<core::RoundKey> blocked_on;
  };
  // The news that a stream has been told, and its worker has read.
  struct Reading {
    size_t told = 0;                                // Outcomes.
    std::map<uint64_t, size_t> before_memberships;  // How many came before each membership, by its version.
    bool confirms = false;                          // Its worker says which memberships it has read,
    size_t read = 0;                                // and so has read so many outcomes.
  };
  // A rank that has left, and whose leave is not acknowledged.
  struct Departure {
    absl::Time since;
    std::map<core::StreamId, size_t> told;  // Outcomes that other members had been told before they were told of it.
  };
  void Begin();
  void Violate(const std::string& what);
  void TakeFrame(core::Rank rank, absl::Time now);
  void Take(core::Rank rank, const Part& part, absl::Time now);
  // Returns false if the report is not what this master knows, so that the rank is dismissed.
  bool TakeReport(core::Rank rank, const core::EndedReport& report);
  void TakeRepeat(core::Rank rank, const Part& part, absl::Time now);
  // Returns the repeat that the sender's frame has of a round which the report in the same frame has ended, and which
  // then waits alone; null if it came before the end, or there is none.
  const Part* RepeatBehind(const core::RoundEnded& ended, const Pending& round, absl::Time now) const;
  Pending& PendingRestored(const core::RoundKey& key, absl::Time now);
  void TakeRestored(core::Rank rank, const Part& part, absl::Time now);
  void NoteStraddling(core::Rank rank, Pending* round) const;
  // Returns the ranks that are missing from a round and may have contributed to it under an earlier master.
  std::vector<core::Rank> TakenAlong(const Pending& round) const;
  bool MayRepeat(core::Rank rank, absl::Time now) const;
  // A rank that has left another master may come back, which has not acknowledged its leave.
  bool LeaversMayReturn(absl::Time now) const;
  void CheckRunOf(const core::SendJoined& joined, const core::Join& join);
  // A restored round that nobody waits for is forgotten at its deadline, and once every member has caught up.
  void DropIdle(std::optional<absl::Time> now);
  bool EveryoneHasCaughtUp() const;
  size_t InFlight() const;

  void Check(const core::SendJoined& joined, absl::Time now);
  void Check(const core::SendResults& results, absl::Time now);
  void Check(const core::SendLayerError& error, absl::Time now);
  void Check(const core::SendMembership& change, absl::Time now);
  void Check(const core::SendLateRounds& late, absl::Time now);
  void Check(const core::CloseStream& close, absl::Time now);
  void Check(const core::RoundEnded& ended, absl::Time now);
  void Check(const core::MemberChanged& change, absl::Time now);
  void Check(const core::JoinRefused& refused, absl::Time now);
  void Check(const core::GroupEnded& ended, absl::Time now);

  void CheckFailure(const core::RoundOutcome& outcome, const Pending& round, absl::Time now);
  bool FailureIsDue(const core::RoundOutcome& outcome, const Pending& round, absl::Time now);
  // The same for OUTCOME_LOST. `over`: nobody is awaited any more.
  bool LossIsDue(const core::RoundOutcome& outcome, const Pending& round, bool over, absl::Time now);
  enum class Shown { kNot, kPerhaps, kSurely };
  // Returns whether the end of a round that lacked ranks has shown that members have begun unequally many rounds.
  Shown Divergence(const core::RoundOutcome& outcome) const;
  // Takes note of the sequences that a frame has.
  void NoteSent(const Frame& frame);
  // Every rank that has not left is known to go on at a number that it is told.
  bool AllResume() const;
  // Checks the number at which the round's contributors are to go on.
  void CheckResumption(const core::RoundOutcome& outcome, const Pending& round);
  void CheckCompletion(const core::RoundOutcome& outcome, const Pending& round, absl::Time now);
  void CheckRefusal(core::StreamId stream, const core::RoundOutcome& outcome);
  bool RefusalIsDue(core::Rank rank, const Part& part, const std::string& reason) const;
  // Returns true if the join has other layers than the workers have.
  bool Intrudes(const core::Join& join) const {
    return !join.layers.empty() && join.layers.size() != settings_.layers.size();
  }
  // Returns true if some workers have declared the layer anew and others have not, and no round of it has completed.
  bool MayDisagree(const std::string& layer) const;
  // Returns the reason for which a join is refused, whatever its layers are; empty if it is not.
  std::string WhyRefused(const core::Join& asked) const;
  // A worker that has been told no outcome in another run is a new one in this run.
  core::Join AsNew(core::Join join) const;
  void CheckRefusedJoin(const core::CloseStream& close);
  void NoteRead();
  void NoteDeparture(absl::Time now);
  // A leave is acknowledged: nobody may need any more what its worker holds.
  void CheckDeparture(const Departure& departure, absl::Time now);
  void CheckOutcomes();
  void CheckTold();
  void CheckWaiting(absl::Time now);

  std::optional<core::Rank> SeatOf(core::StreamId stream) const;
  // The rank has a stream; or it has left, as the sender of a last frame has already.
  bool Present(core::Rank rank) const;
  bool Left(core::Rank rank) const;
  bool Open(core::StreamId stream) const { return closed_.count(stream) == 0; }
  bool GivenUp(core::Rank rank, absl::Time now) const;
  bool Blocked(core::Rank rank) const;
  bool Deadlocked() const;
  bool proceeds() const { return settings_.config.missing_policy == core::MissingPolicy::kProceed; }
  bool waits() const { return settings_.config.missing_policy == core::MissingPolicy::kWait; }
  size_t Least(const Pending& round) const;
  std::vector<core::Rank> Missing(const Pending& round) const;
  // Returns the rank's contribution, as it is held from now on.
  Held Hold(core::Rank rank, const Part& part) const {
    return {members_.at(rank).incarnation, part.numbers, HasBadNumbers(part.key, *part.numbers)};
  }
  bool HasBadNumbers(const core::RoundKey& key, const testing::Numbers& numbers) const {
    return IsBad(key.phase, numbers, settings_.LayerOf(key));
  }

  const Settings& settings_;
  Incarnations& incarnations_;
  Tally& tally_;
  std::optional<std::string> violation_;

  std::map<core::StreamId, core::Join> joining_;
  std::map<core::StreamId, Reading> readings_;
  std::map<core::StreamId, Departure> departures_;
  std::set<core::StreamId> closed_;
  std::map<core::Rank, Member> members_;
  std::map<core::RoundKey, Pending> pending_;
  History history_;
  std::map<std::string, RunningModel> running_;
  // Ranks that have left another master may come to this one until then.
  std::optional<absl::Time> leavers_until_;
  absl::Time now_ = absl::InfinitePast();
  std::set<std::string> completed_;  // Layers that have had a completed round.
  std::set<core::Rank> refused_;     // Vacant, and last claimed by someone with other layers.
  uint64_t run_id_ = 0;              // 0 while there is no group.
  uint64_t over_run_id_ = 0;         // The run before it, which this master has ended.
  bool resumed_ = false;             // The run may have begun under another master,
  bool continues_ = false;           // and a round has ended there.
  size_t completions_ = 0;
  // Greater than all sequences of the group's rounds, as far as is sure; than all that were sent; and the newest number
  // at which members were to go on.
  uint64_t used_beyond_ = 0;
  uint64_t sent_beyond_ = 0;
  uint64_t told_beyond_ = 0;
  std::set<uint64_t> reported_;  // Such numbers that members say an earlier master has told.
  bool shutting_down_ = false;

  // The event that is being handled.
  struct Sender {
    core::StreamId stream = 0;
    core::Rank rank = 0;
    bool seated = false;
    bool leaves = false;
  };
  Sender sender_;
  const Frame* frame_ = nullptr;
  // A part that was taken from the frame, and what its round had before.
  struct Added {
    std::optional<Held> replaced;
    bool straddled = false;
    std::set<core::Rank> left;
  };
  std::map<core::RoundKey, Added> added_;
  std::vector<std::pair<const core::SendResults*, const core::RoundOutcome*>> outcomes_;
  std::vector<std::pair<core::StreamId, core::RoundKey>> to_tell_;
  std::set<std::pair<core::StreamId, core::RoundKey>> told_;
  std::vector<core::RoundKey> must_answer_;
  std::set<core::RoundKey> ended_now_;
  std::set<core::RoundKey> settled_now_;  // Rounds in flight that were reported to have ended before.
  bool deadlock_now_ = false;
  bool diverged_now_ = false;
  std::optional<uint64_t> deadlock_number_;  // At which its members are to go on.
  bool group_ends_now_ = false;
  bool all_caught_up_now_ = false;
  std::map<core::RoundKey, const core::RoundOutcome*> lost_now_;  // Restored rounds that failed.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_MODEL_H_
