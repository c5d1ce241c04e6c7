// The members of a group: which worker is connected as which rank.
//
//   absent --Seat--> present --Lose--> lost --GiveUpOverdue--> lost and given up
//                    present --Leave--> left
//   left   --Seat--> present --LeaveAgain--> left
//
// LeaveAgain takes the place of Lose while nothing but a join has come from a worker whose rank had left. Seat leads
// from every state to present: a worker reconnects, or its successor takes the rank. Only a lost member may be given
// up: from then on no round waits for it, until it is seated again.

#ifndef SYNCBN_SERVER_CORE_MEMBERS_H_
#define SYNCBN_SERVER_CORE_MEMBERS_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "server/core/member.h"
#include "server/core/types.h"

namespace syncbn::core {

// Thread safety: none; pure.
class Members {
 public:
  // New incarnations are greater than `incarnation_floor`.
  Members(uint32_t world_size, uint64_t incarnation_floor);

  uint32_t world_size() const { return members_.world_size(); }
  const Member& operator[](Rank rank) const { return members_[rank]; }
  uint32_t present() const { return present_; }
  uint32_t left() const { return left_; }
  uint32_t given_up() const { return given_up_; }
  // Members whose streams have broken,
  uint32_t lost() const { return given_up_ + in_grace(); }
  // and those of them that have not been given up.
  uint32_t in_grace() const { return static_cast<uint32_t>(graces_.size()); }
  uint32_t blocked() const { return blocked_; }
  bool any_lags() const { return lagging_ != 0; }
  uint32_t catching_up() const { return catching_up_; }
  uint32_t returning() const { return returning_; }
  // Members of which nothing is known here.
  uint32_t absent() const { return world_size() - present_ - left_ - lost(); }

  // Returns the rank that is connected by the stream, if any.
  std::optional<Rank> RankOf(StreamId stream) const;
  // Returns the streams of the present members, by rank.
  std::vector<StreamId> Streams(std::optional<Rank> except = std::nullopt) const;
  Membership Snapshot() const;
  // Returns true if a join of the rank displaces nobody: it is absent or lost.
  bool Vacant(Rank rank) const;

  // ---- Joining
  // Returns why the join may not have its rank: a newer incarnation exists (FENCED), another worker is connected
  // (RANK_TAKEN), the incarnation is another worker's (LIFE_KEY_MISMATCH) or was never given out (MALFORMED_FRAME).
  // `resumed`: an earlier master of the run may have given out incarnations that this one has not seen.
  std::optional<Error> CheckClaim(const Join& join, bool resumed) const;
  struct Seated {
    std::optional<StreamId> replaced;      // The stream that the same rank was connected by until now.
    bool reborn = false;                   // A new incarnation.
    bool predecessor_contributed = false;  // The rank had contributed, in the incarnation that ends here.
  };
  // New incarnations are greater than this from now on.
  void RaiseFloor(uint64_t floor) { incarnation_floor_ = std::max(incarnation_floor_, floor); }
  // Gives the rank a new incarnation, though it is the same worker.
  void Renumber(Rank rank) { members_.At(rank).incarnation = NextIncarnation(rank); }
  // Takes an earlier master's word that a rank has left, of which nothing is known here. Returns whether that is news.
  bool AdoptLeft(Rank rank);
  // Returns whether a rank that has left under an earlier master may yet come back, because its leave was not
  // acknowledged.
  bool LeaversMayReturn() const { return leavers_may_return_ && left_before_ != 0; }
  void SetLeaversMayReturn(bool may_return) { leavers_may_return_ = may_return; }
  // Connects the rank by the stream. CheckClaim has found nothing against it.
  Seated Seat(StreamId stream, const Join& join, absl::Time now);
  // Keeps the error of a join that was refused for the set of its layers. The rank must be vacant. Rounds do not wait
  // for it: it will not contribute before it joins with other layers.
  void NoteLayerSetError(Rank rank, Error error);
  const Error* LayerSetErrorOf(Rank rank) const;
  bool any_layer_set_errors() const { return !layer_set_errors_.empty(); }

  // ---- Losses and leaves
  void Lose(Rank rank, absl::Time grace_until);
  void Leave(Rank rank);
  // Something but a join has come from the member, so that it takes part, whether its rank had left or not.
  void TakePart(Rank rank);
  // The stream has ended of a member whose rank had left, and that has not taken part since: its rank has left as it
  // had before.
  void LeaveAgain(Rank rank);
  // Gives up the lost members whose grace is over. Returns whether there were any.
  bool GiveUpOverdue(absl::Time now);
  // Returns when GiveUpOverdue is next due; InfiniteFuture if no grace is running.
  absl::Time NextGrace() const;
  void SetLags(Rank rank, bool lags);

  // ---- Rounds
  void CatchUp(Rank rank) { SetCatchingUp(rank, false); }
  // The member has sent again all that it had no outcome of.
  void EndReturn(Rank rank) { SetReturning(rank, false); }
  // The member has read the membership of this version, and what it was sent before.
  void NoteRead(Rank rank, uint64_t version);
  // Returns whether every present member has read the membership of this version, but for those that never say so.
  bool AllHaveRead(uint64_t version) const;
  // Marks the member as blocked on the keys, each of which it has contributed to and awaits.
  void Block(Rank rank, std::vector<RoundKey> keys);
  void Unblock(Rank rank);
  // `fresh`: not a repetition of what the round already held.
  void NoteContribution(Rank rank, const RoundKey& key, const DeclarationPtr& declaration, absl::Time now, bool fresh);
  // The member contributed to a round that has completed, so much after the first.
  void NoteLateness(Rank rank, absl::Duration lateness);
  // The member is told how a round that it contributed to has ended.
  void NoteOutcome(Rank rank, const RoundKey& key);
  void NoteLastArrival(Rank rank) { ++members_.At(rank).last_arrivals; }
  // The rank has contributed to a round in flight, which has not ended before. EndAwaiting takes one such round back.
  void BeginAwaiting(Rank rank) { ++members_.At(rank).awaited; }
  void EndAwaiting(Rank rank);
  // The rank has contributed to a round of this sequence, here or under an earlier master.
  void NoteUsed(Rank rank, uint64_t sequence);
  // Returns the least sequence that is greater than all that the ranks have contributed to; nothing before the first
  // contribution, if there is no such number, or unless every rank that has not left goes on at Error::resume_at. A
  // rank that is `most_apart` beyond another one does not count, so that it drives nobody to the end of the range.
  std::optional<uint64_t> BeyondUsed(uint64_t most_apart) const;

  // Aborts unless every counter and index agrees with the members.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  // Ends what the rank's state implies: its stream, its grace, its block.
  void Detach(Rank rank);
  uint64_t NextIncarnation(Rank rank) const { return std::max(members_[rank].incarnation, incarnation_floor_) + 1; }
  void SetCatchingUp(Rank rank, bool catching_up);
  void SetReturning(Rank rank, bool returning);
  void SetLeftBefore(Rank rank, bool left_before);

  MemberTable members_;
  uint64_t incarnation_floor_;
  absl::flat_hash_map<StreamId, Rank> ranks_;  // Of present members.
  uint32_t present_ = 0;
  uint32_t left_ = 0;
  uint32_t given_up_ = 0;
  uint32_t blocked_ = 0;  // Members whose blocked_on is not empty.
  uint32_t lagging_ = 0;
  uint32_t catching_up_ = 0;
  uint32_t returning_ = 0;
  uint32_t left_before_ = 0;
  bool leavers_may_return_ = false;
  absl::btree_set<std::pair<absl::Time, Rank>> graces_;  // Of lost members that are not given up.
  absl::btree_map<Rank, Error> layer_set_errors_;        // Of vacant ranks.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_MEMBERS_H_
