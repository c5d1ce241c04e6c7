// One group: its members, its layers, its rounds in flight.

#ifndef SYNCBN_SERVER_CORE_GROUP_H_
#define SYNCBN_SERVER_CORE_GROUP_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/effects.h"
#include "server/core/events.h"
#include "server/core/layer.h"
#include "server/core/limits.h"
#include "server/core/merge.h"
#include "server/core/types.h"

namespace syncbn::core {

// Writes the config with every default filled in; or says why it cannot be used.
std::optional<Error> FillConfig(const GroupConfig& config, uint32_t world_size, const Limits& limits,
                                GroupConfig& filled);

// Not thread-safe; pure. Each method appends what is to be done to `effects`. The coordinator has seen to it that a
// join names this group and its generation, and that streams belong to it.
class Group {
 public:
  Group(const Join& join, const GroupConfig& filled, uint64_t run_id, const Limits& limits, absl::Time now);
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  const GroupId& id() const { return id_; }
  uint64_t generation() const { return generation_; }
  uint64_t run_id() const { return run_id_; }
  bool empty() const { return present_ == 0; }

  // Refuses (by closing the stream) or admits the worker. Returns whether it was admitted.
  bool OnJoin(StreamId stream, const Join& join, const GroupConfig& filled, uint32_t protocol_version, absl::Time now,
              Effects& effects);
  // A frame of a member, its join excepted.
  void OnFrame(StreamId stream, const FrameReceived& frame, absl::Time now, Effects& effects);
  void OnStreamClosed(StreamId stream, absl::Time now, Effects& effects);
  // One turn of what is due: see Limits::max_turn_bytes.
  void OnTimePassed(absl::Time now, Effects& effects);
  void OnReaderLags(StreamId stream, bool lags);
  // The group is over: every round ends with GROUP_ENDED, every stream is closed with `why`.
  void End(const Error& why, absl::Time now, Effects& effects);

  // When OnTimePassed is next due.
  absl::Time NextDeadline() const;
  // When the group, having been empty for long enough, is to be dropped; InfiniteFuture while someone is present.
  absl::Time linger_until() const { return linger_until_; }

  // The bytes of the longest result that a round of the layers declared so far can have.
  size_t longest_result() const { return longest_result_; }

  // The streams of members that are present.
  std::vector<StreamId> Streams() const;

  GroupSummary Summary() const;
  GroupView View(absl::Time now) const;
  std::vector<LayerSummary> LayerSummaries() const;
  const Layer* FindLayer(absl::string_view name) const;

 private:
  struct MemberRecord {
    MemberState state = MemberState::kAbsent;
    StreamId stream = 0;
    uint64_t incarnation = 0;
    std::string description;
    uint64_t contributions = 0;
    uint64_t last_arrivals = 0;
    absl::Time joined_at;
    bool has_contributed = false;  // In this incarnation.
    // Has come back from an earlier master, and been told no outcome since: what it contributes may have had one.
    bool resuming = false;
    // While lost: until when it may come back before rounds stop waiting for it, and whether that time has passed.
    absl::Time grace_until;
    bool given_up = false;
    bool lags = false;                 // While present: it has not read what it was sent.
    std::vector<RoundKey> blocked_on;  // Ascending.
  };

  struct PendingRound {
    absl::Time begun;
    absl::Time deadline;
    absl::Time alarm;            // When time next matters to it: when it becomes late, then its deadline.
    bool straddles = false;      // Some of it may be of the time before the master's restart.
    DeclarationPtr declaration;  // Of its first contribution; the others must be made under the same.
    size_t bytes = 0;
    size_t needed = 0;  // Contributions, if nobody leaves.
    // Of a backward round: who is to contribute, ascending, and the count of its forward round, which may be forgotten
    // before this one ends.
    std::vector<Rank> expected;
    int64_t count = 0;
    Payloads payloads;
    Rank last_rank = 0;
  };
  // A std::map: rounds end while others are being looked at, and iterators must survive that.
  using PendingRounds = std::map<RoundKey, PendingRound>;

  // ---- Membership and layers (group.cc)
  std::optional<Error> CheckJoin(const Join& join, const GroupConfig& filled) const;
  // A rank whose stream is alive goes to nobody but the incarnation that holds it, and incarnations are given, not
  // taken.
  std::optional<Error> CheckSeat(const Join& join) const;
  // The difference between the layers that the join declares to be all and those that the group knows to be all.
  std::optional<Error> CheckLayerSet(const Join& join) const;
  void TakeSeat(StreamId stream, const Join& join, absl::Time now, Effects& effects);
  // Clears what ties the member to its stream and to a loss before.
  void Vacate(Rank rank);
  void Leave(Rank rank, absl::Time now, Effects& effects);
  // The join was refused for the set of its layers.
  void NoteRefused(const Join& join, const Error& error, absl::Time now, Effects& effects);
  // Why these layers cannot be declared; nothing if they can.
  std::optional<Error> CheckLayers(const std::vector<LayerSpec>& specs) const;
  // The limit that the frame's rounds exceed, or the key that is malformed; nothing if it can be taken.
  std::optional<Error> CheckRounds(const FrameReceived& frame) const;
  // `returning`: the rank has come back, and repeats what it has declared before; see declarations.h.
  void DeclareLayers(Rank rank, const std::vector<LayerSpec>& specs, bool returning, absl::Time now, Effects& effects);
  void Declare(Rank rank, const LayerSpec& spec, bool returning, Layer& layer, absl::Time now, Effects& effects);
  void AnnounceConflict(const Layer& layer, const Error& conflict, Effects& effects) const;
  // Every round of the layer that is in flight.
  void FailRounds(const Layer& layer, const Error& error, absl::Time now, Effects& effects);
  void AnnounceMembership(std::optional<Rank> except, Effects& effects) const;
  Membership CurrentMembership() const;
  PendingRoundView ViewOf(const RoundKey& key, const PendingRound& round, absl::Time now) const;

  // ---- Rounds (group_rounds.cc)
  void OnContribution(Rank rank, const Contribution& contribution, absl::Time now, Effects& effects);
  // Answers a contribution to a key whose round has ended. Returns whether it has.
  bool Replay(Rank rank, const Contribution& contribution, Layer& layer, Effects& effects) const;
  Error ExpiredError(const RoundKey& key, const Layer& layer) const;
  // Why a contribution that the round's outcome does not depend on is refused, to its sender alone.
  std::optional<Error> CheckBackward(Rank rank, const RoundKey& key, Layer& layer) const;
  std::optional<Error> CheckRoom(Rank rank, const Contribution& contribution) const;
  // The declaration that the rank's contribution is made under.
  DeclarationPtr DeclarationFor(Rank rank, const RoundKey& key, Layer& layer) const;
  PendingRounds::iterator Begin(const RoundKey& key, Layer& layer, absl::Time now);
  // Returns whether the round now holds the contribution; if not, the sender has been told why.
  bool Take(Rank rank, const Contribution& contribution, DeclarationPtr declaration, PendingRounds::iterator round,
            Effects& effects);
  // Why the round cannot hold what the rank has contributed: it was made under another declaration than the rest.
  static std::optional<Error> CheckDeclared(Rank rank, PendingRounds::const_iterator round);
  // Ends the round if what is known of its members says how.
  void Settle(PendingRounds::iterator round, absl::Time now, Effects& effects);
  // Every round, in this turn and those that follow.
  void SettleAll(absl::Time now, Effects& effects);
  void SettleOn(absl::Time now, Effects& effects);
  // Returns whether events that may complete many rounds wait for readers that lag. Rounds that fail do not: errors are
  // short.
  bool Held() const { return lagging_ != 0 && (proceeds() || (given_up_ == 0 && refused_.empty())); }
  bool proceeds() const { return config_.missing_policy == MissingPolicy::kProceed; }
  void BeginTurn() { turn_ = limits_.max_turn_bytes; }
  // The cost of a look at all ranks.
  size_t RanksCost() const { return 512 + sizeof(Rank) * world_size_; }
  void Spend(size_t bytes) { turn_ -= std::min(turn_, bytes); }
  // The round has waited for long: its contributors are told.
  void TellLate(PendingRounds::iterator round, absl::Time now, Effects& effects);
  // Ends the round because its time is up.
  void Expire(PendingRounds::iterator round, absl::Time now, Effects& effects);
  // Ends it with those that have contributed, or with an error, as the policy has it. `when`: " within 30s of ...".
  void EndWithout(PendingRounds::iterator round, absl::string_view when, absl::Time now, Effects& effects);
  // "; to rank 1 the layer has channels 23 instead of 41", if one of the missing has not declared it as the round's
  // contributors have.
  std::string StillDeclaring(PendingRounds::const_iterator round, const std::vector<Rank>& missing) const;
  // Those that have not contributed, of all that the round is for.
  std::vector<Rank> MissingRanks(const RoundKey& key, const PendingRound& round) const;
  // The missing ranks that have not left.
  std::vector<Rank> AwaitedRanks(const RoundKey& key, const PendingRound& round) const;
  // With fewer contributions than this, the round may not proceed.
  size_t LeastWorkers(const PendingRound& round) const;
  void Complete(PendingRounds::iterator round, absl::Time now, Effects& effects);
  void Fail(PendingRounds::iterator round, Error error, absl::Time now, Effects& effects);
  void Finish(PendingRounds::iterator round, std::shared_ptr<const RoundOutcome> outcome, absl::Time now,
              Effects& effects);
  // Who contributed: the roster of the newest round of the phase, if they are the same.
  std::shared_ptr<const Roster> RosterOf(Phase phase, const Payloads& payloads);
  // A member says that it sends nothing until one of these rounds ends. Not believed if one of them has ended.
  void Block(Rank rank, const std::vector<RoundKey>& keys);
  void Unblock(Rank rank);
  void FindDeadlock(absl::Time now, Effects& effects);
  std::string DescribeWaiters() const;
  // Tells one member alone that its contribution was refused.
  void Refuse(Rank rank, const RoundKey& key, Error error, Effects& effects) const;

  const GroupId id_;
  const uint64_t generation_;
  const uint64_t run_id_;
  // New incarnations are greater than this. An earlier master of the same run may have given out some that this one has
  // not seen; the time, in microseconds, is beyond all of them.
  const uint64_t incarnation_floor_;
  const uint32_t world_size_;
  const GroupConfig config_;
  const Limits& limits_;

  std::vector<MemberRecord> members_;  // By rank.
  absl::flat_hash_map<StreamId, Rank> ranks_;
  uint32_t present_ = 0;
  uint32_t left_ = 0;
  uint32_t given_up_ = 0;
  uint32_t blocked_ = 0;  // Members whose blocked_on is not empty.
  uint32_t lagging_ = 0;
  absl::Time linger_until_;
  absl::btree_set<std::pair<absl::Time, Rank>> graces_;
  // Ranks without a stream whose last join was refused for the set of its layers, and why: they will not contribute
  // before they join with another.
  absl::btree_map<Rank, Error> refused_;

  OutcomeBudget budget_;
  std::array<std::shared_ptr<const Roster>, 3> newest_rosters_;  // By phase.
  absl::btree_map<std::string, std::unique_ptr<Layer>> layers_;
  // The complete set of layers, by the first member that declared one.
  std::optional<Rank> set_declared_by_;
  absl::btree_set<std::string> set_;

  PendingRounds pending_;
  absl::btree_set<std::pair<absl::Time, RoundKey>> alarms_;  // Of the pending rounds.
  size_t pending_bytes_ = 0;
  size_t turn_ = 0;  // What is left of max_turn_bytes.
  // Rounds from this key on are to be settled, since this time.
  std::optional<std::pair<RoundKey, absl::Time>> unsettled_;
  size_t longest_result_ = 0;
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_GROUP_H_
