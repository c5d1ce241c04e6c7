#include "server/core/members.h"

#include <algorithm>
#include <utility>

#include "plumbing/check.h"
#include "server/core/error.h"

namespace syncbn::core {
namespace {

// Incarnations stay far below this, so that a worker that names a greater one does not spoil those of all others.
constexpr uint64_t kBelievable = uint64_t{1} << 61;

}  // namespace

Members::Members(uint32_t world_size, uint64_t incarnation_floor)
    : members_(world_size), incarnation_floor_(incarnation_floor) {
  SYNCBN_CHECK(world_size != 0);
}

std::optional<Rank> Members::RankOf(StreamId stream) const {
  const auto it = ranks_.find(stream);
  if (it == ranks_.end()) return std::nullopt;
  return it->second;
}

std::vector<StreamId> Members::Streams(std::optional<Rank> except) const {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size(); ++rank) {
    if (members_[rank].state == MemberState::kPresent && rank != except) streams.push_back(members_[rank].stream);
  }
  return streams;
}

Membership Members::Snapshot() const {
  Membership membership;
  membership.world_size = world_size();
  for (Rank rank = 0; rank < world_size(); ++rank) {
    if (members_[rank].state == MemberState::kPresent) membership.present_ranks.push_back(rank);
    if (members_[rank].state == MemberState::kLeft) membership.left_ranks.push_back(rank);
  }
  return membership;
}

bool Members::Vacant(Rank rank) const {
  const MemberState state = members_[rank].state;
  return state == MemberState::kAbsent || state == MemberState::kLost;
}

// ---- Joining --------------------------------------------------------------------------------------------------------

std::optional<Error> Members::CheckClaim(const Join& join, bool resumed) const {
  const Member& member = members_[join.rank];
  if (join.incarnation != 0 && join.incarnation < member.incarnation) {
    return OutdatedIncarnationError(join, member.incarnation);
  }
  // The same incarnation comes back, if it is the same life: whatever its old stream looks like, nobody else is at the
  // other end. A worker without a life key cannot be told from a stranger.
  if (join.incarnation != 0 && join.incarnation == member.incarnation) {
    if (member.life_key.present() && join.life_key != member.life_key) return LifeKeyError(join);
    return std::nullopt;
  }
  if (member.state == MemberState::kPresent) return RankTakenError(join, member.incarnation, member.description);
  // This master knows every incarnation that it has given out; an earlier master of the run may have given out others.
  if (resumed || join.incarnation <= member.incarnation) return std::nullopt;
  return UnknownIncarnationError(join, member.incarnation);
}

Members::Seated Members::Seat(StreamId stream, const Join& join, absl::Time now) {
  Member& member = members_.At(join.rank);
  Seated seated;
  if (member.state == MemberState::kPresent) seated.replaced = member.stream;
  seated.reborn = join.incarnation == 0 || join.incarnation > member.incarnation;
  seated.predecessor_contributed = member.has_contributed;
  // The first that this master sees of an incarnation that an earlier master gave out.
  const bool unheard = join.incarnation != member.incarnation || member.unheard;
  if (unheard) SetCatchingUp(join.rank, join.incarnation != 0);
  // The clock of this master may be behind that of the one before it.
  if (join.incarnation < kBelievable) incarnation_floor_ = std::max(incarnation_floor_, join.incarnation);
  // Another stream of a member that has not taken part yet changes nothing.
  const bool had_left = member.had_left || member.state == MemberState::kLeft;
  const bool had_left_before = member.had_left_before || member.left_before;
  Detach(join.rank);
  member.had_left = had_left;
  member.had_left_before = had_left_before;
  member.unheard = false;
  if (seated.reborn) {
    member.has_contributed = member.confirms = false;
    member.life_key = join.life_key;
    member.incarnation = join.incarnation != 0 ? join.incarnation : NextIncarnation(join.rank);
  }
  member.state = MemberState::kPresent;
  SetLeftBefore(join.rank, false);
  member.stream = stream;
  member.description = join.description;
  member.resumes = join.resumes;
  member.joined_at = now;
  member.read_membership = 0;
  SetReturning(join.rank, join.incarnation != 0);
  const bool inserted = ranks_.emplace(stream, join.rank).second;
  SYNCBN_CHECK(inserted, "stream ", stream, " joins as rank ", join.rank, " and is another rank's already");
  ++present_;
  layer_set_errors_.erase(join.rank);
  return seated;
}

bool Members::AdoptLeft(Rank rank) {
  Member& member = members_.At(rank);
  if (member.state != MemberState::kAbsent) return false;
  member.state = MemberState::kLeft;
  SetLeftBefore(rank, true);
  layer_set_errors_.erase(rank);
  ++left_;
  return true;
}

void Members::SetCatchingUp(Rank rank, bool catching_up) {
  if (members_[rank].catching_up == catching_up) return;
  members_.At(rank).catching_up = catching_up;
  catching_up_ += catching_up ? 1 : -1;
}

void Members::SetLeftBefore(Rank rank, bool left_before) {
  if (members_[rank].left_before == left_before) return;
  members_.At(rank).left_before = left_before;
  left_before_ += left_before ? 1 : -1;
}

void Members::SetReturning(Rank rank, bool returning) {
  if (members_[rank].returning == returning) return;
  members_.At(rank).returning = returning;
  returning_ += returning ? 1 : -1;
}

void Members::NoteLayerSetError(Rank rank, Error error) {
  SYNCBN_CHECK(Vacant(rank), "rank ", rank);
  layer_set_errors_.insert_or_assign(rank, std::move(error));
}

const Error* Members::LayerSetErrorOf(Rank rank) const {
  const auto it = layer_set_errors_.find(rank);
  return it == layer_set_errors_.end() ? nullptr : &it->second;
}

// ---- Losses and leaves ----------------------------------------------------------------------------------------------

void Members::Detach(Rank rank) {
  Member& member = members_.At(rank);
  Unblock(rank);
  switch (member.state) {
    case MemberState::kPresent:
      ranks_.erase(member.stream);
      --present_;
      SetLags(rank, false);
      SetReturning(rank, false);
      member.had_left = member.had_left_before = false;
      break;
    case MemberState::kLost:
      graces_.erase({member.grace_until, rank});
      given_up_ -= std::exchange(member.given_up, false) ? 1 : 0;
      break;
    case MemberState::kLeft:
      --left_;
      break;
    case MemberState::kAbsent:
      break;
  }
}

void Members::Lose(Rank rank, absl::Time grace_until) {
  SYNCBN_CHECK(members_[rank].state == MemberState::kPresent, "rank ", rank);
  Detach(rank);
  Member& member = members_.At(rank);
  member.state = MemberState::kLost;
  member.grace_until = grace_until;
  graces_.insert({grace_until, rank});
}

void Members::Leave(Rank rank) {
  SYNCBN_CHECK(members_[rank].state == MemberState::kPresent, "rank ", rank);
  Detach(rank);
  SetCatchingUp(rank, false);
  members_.At(rank).state = MemberState::kLeft;
  ++left_;
}

void Members::TakePart(Rank rank) {
  if (!members_[rank].had_left) return;
  members_.At(rank).had_left = members_.At(rank).had_left_before = false;
}

void Members::LeaveAgain(Rank rank) {
  SYNCBN_CHECK(members_[rank].had_left, "rank ", rank);
  const bool left_before = members_[rank].had_left_before;
  const bool unheard = members_[rank].catching_up;
  Leave(rank);
  members_.At(rank).unheard = unheard;
  SetLeftBefore(rank, left_before);
}

bool Members::GiveUpOverdue(absl::Time now) {
  bool any = false;
  while (NextGrace() <= now) {
    Member& member = members_.At(graces_.begin()->second);
    SYNCBN_CHECK(member.state == MemberState::kLost && !member.given_up, "rank ", graces_.begin()->second);
    graces_.erase(graces_.begin());
    member.given_up = true;
    ++given_up_;
    any = true;
  }
  return any;
}

absl::Time Members::NextGrace() const { return graces_.empty() ? absl::InfiniteFuture() : graces_.begin()->first; }

void Members::SetLags(Rank rank, bool lags) {
  if (members_[rank].lags == lags) return;
  members_.At(rank).lags = lags;
  lagging_ += lags ? 1 : -1;
}

void Members::NoteRead(Rank rank, uint64_t version) {
  Member& member = members_.At(rank);
  member.confirms = true;
  member.read_membership = std::max(member.read_membership, version);
}

bool Members::AllHaveRead(uint64_t version) const {
  return std::none_of(ranks_.begin(), ranks_.end(), [&](const auto& stream_and_rank) {
    const Member& member = members_[stream_and_rank.second];
    return member.confirms && member.read_membership < version;
  });
}

// ---- Rounds ---------------------------------------------------------------------------------------------------------

void Members::Block(Rank rank, std::vector<RoundKey> keys) {
  Member& member = members_.At(rank);
  SYNCBN_CHECK(member.state == MemberState::kPresent && member.blocked_on.empty() && !keys.empty(), "rank ", rank);
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  keys.shrink_to_fit();
  member.blocked_on = std::move(keys);
  ++blocked_;
}

void Members::Unblock(Rank rank) {
  if (members_[rank].blocked_on.empty()) return;
  members_.At(rank).blocked_on.clear();
  --blocked_;
}

void Members::NoteContribution(Rank rank, const RoundKey& key, const DeclarationPtr& declaration, absl::Time now,
                               bool fresh) {
  Member& member = members_.At(rank);
  member.has_contributed = true;
  NoteUsed(rank, key.sequence);
  if (!fresh) return;
  ++member.contributions;
  if (member.activity == nullptr) member.activity = std::make_unique<Activity>();
  Activity& activity = *member.activity;
  if (activity.layer != declaration) activity.layer = declaration;
  activity.sequence = key.sequence;
  activity.phase = key.phase;
  activity.at = now;
}

void Members::NoteLateness(Rank rank, absl::Duration lateness) {
  SYNCBN_CHECK(members_[rank].activity != nullptr, "rank ", rank);
  members_.At(rank).activity->lateness.Add(lateness);
}

void Members::NoteOutcome(Rank rank, const RoundKey& key) {
  const Member& member = members_[rank];
  if (std::binary_search(member.blocked_on.begin(), member.blocked_on.end(), key)) Unblock(rank);
}

void Members::EndAwaiting(Rank rank) {
  SYNCBN_CHECK(members_[rank].awaited != 0, "rank ", rank);
  --members_.At(rank).awaited;
}

void Members::NoteUsed(Rank rank, uint64_t sequence) {
  uint64_t& beyond = members_.At(rank).beyond_used;
  beyond = std::max(beyond, sequence == UINT64_MAX ? sequence : sequence + 1);
}

std::optional<uint64_t> Members::BeyondUsed(uint64_t most_apart) const {
  uint64_t least = UINT64_MAX;
  for (Rank rank = 0; rank < world_size(); ++rank) {
    const Member& member = members_[rank];
    if (member.state == MemberState::kLeft) continue;
    if (!member.resumes) return std::nullopt;
    if (member.beyond_used != 0) least = std::min(least, member.beyond_used);
  }
  const uint64_t bound = least + std::min(most_apart, UINT64_MAX - least);
  uint64_t beyond = 0;
  for (Rank rank = 0; rank < world_size(); ++rank) {
    if (members_[rank].beyond_used <= bound) beyond = std::max(beyond, members_[rank].beyond_used);
  }
  if (beyond == 0 || beyond == UINT64_MAX) return std::nullopt;
  return beyond;
}

void Members::CheckInvariants() const {
  uint32_t present = 0, left = 0, given_up = 0, blocked = 0, lagging = 0, graces = 0, catching_up = 0, returning = 0;
  uint32_t left_before = 0;
  for (Rank rank = 0; rank < world_size(); ++rank) {
    const Member& member = members_[rank];
    const bool is_present = member.state == MemberState::kPresent;
    const bool is_lost = member.state == MemberState::kLost;
    if (is_present) SYNCBN_CHECK(RankOf(member.stream) == rank, "rank ", rank, ", stream ", member.stream);
    if (is_lost && !member.given_up) {
      SYNCBN_CHECK(graces_.contains({member.grace_until, rank}), "rank ", rank);
      ++graces;
    }
    SYNCBN_CHECK(is_lost || !member.given_up, "rank ", rank);
    SYNCBN_CHECK(is_present || (!member.lags && member.blocked_on.empty()), "rank ", rank);
    SYNCBN_CHECK(!(is_present || is_lost) || member.incarnation != 0, "rank ", rank);
    present += is_present;
    left += member.state == MemberState::kLeft;
    given_up += member.given_up;
    blocked += !member.blocked_on.empty();
    lagging += member.lags;
    catching_up += member.catching_up;
    returning += member.returning;
    left_before += member.left_before;
    SYNCBN_CHECK(member.state == MemberState::kLeft || !(member.left_before || member.unheard), "rank ", rank);
    SYNCBN_CHECK(is_present || !member.returning, "rank ", rank);
    SYNCBN_CHECK((is_present || !member.had_left) && (member.had_left || !member.had_left_before), "rank ", rank);
    SYNCBN_CHECK(is_present || is_lost || !member.catching_up, "rank ", rank);
    SYNCBN_CHECK((member.activity == nullptr) == (member.contributions == 0), "rank ", rank);
  }
  SYNCBN_CHECK(present_ == present && ranks_.size() == present, present_, " and ", ranks_.size(), ", not ", present);
  SYNCBN_CHECK(left_ == left, left_, ", not ", left);
  SYNCBN_CHECK(given_up_ == given_up, given_up_, ", not ", given_up);
  SYNCBN_CHECK(blocked_ == blocked, blocked_, ", not ", blocked);
  SYNCBN_CHECK(lagging_ == lagging, lagging_, ", not ", lagging);
  SYNCBN_CHECK(catching_up_ == catching_up, catching_up_, ", not ", catching_up);
  SYNCBN_CHECK(left_before_ == left_before, left_before_, ", not ", left_before);
  SYNCBN_CHECK(returning_ == returning, returning_, ", not ", returning);
  SYNCBN_CHECK(graces_.size() == graces, graces_.size(), ", not ", graces);
  for (const auto& [rank, error] : layer_set_errors_) SYNCBN_CHECK(rank < world_size() && Vacant(rank), "rank ", rank);
}

}  // namespace syncbn::core
