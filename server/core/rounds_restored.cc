// Rounds that ended under an earlier master: members report them, and repeat what they had contributed.

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>

#include "plumbing/check.h"
#include "server/core/error.h"
#include "server/core/merge.h"
#include "server/core/rounds.h"

namespace syncbn::core {
namespace {

// Returns the error that a member reports, if any, without a number at which to go on that this master would not have
// given.
std::optional<Error> Believed(const EndedReport& report, const Limits& limits) {
  if (!report.error.has_value()) return std::nullopt;
  Error error = *report.error;
  const uint64_t sequence = report.key.sequence;
  const uint64_t most = sequence + std::min(limits.max_sequence_jump, UINT64_MAX - sequence);
  if (error.resume_at.has_value() && *error.resume_at > most) error.resume_at.reset();
  return error;
}

// Returns whether a report agrees with what is recorded.
bool Agree(const EndedReport& report, const EndedRound& ended) {
  if (report.error.has_value() || ended.failed) return report.error.has_value() == ended.failed;
  return report.digest == 0 || ended.digest == 0 || report.digest == ended.digest;
}

}  // namespace

// ---- Reports --------------------------------------------------------------------------------------------------------

std::optional<Error> Rounds::OnEnded(Rank rank, const EndedReport& report, absl::Time now, Effects& effects) {
  const RoundKey& key = report.key;
  Layer* const layer = layers_.Find(key.layer);
  if (layer == nullptr || !members_[rank].catching_up) return std::nullopt;
  members_.NoteUsed(rank, key.sequence);
  const std::optional<Error> error = Believed(report, limits_);
  if (error.has_value()) NoteTold(rank, key.sequence, *error);
  if (EndedRound* const ended = layer->Find(key.phase, key.sequence)) {
    if (!Agree(report, *ended)) return OutcomeChangedError(rank, key);
    NoteHolder(rank, ended);
    return std::nullopt;
  }
  if (layer->Expired(key.phase, key.sequence)) return std::nullopt;
  const auto round = pending_.find(key);
  if (error.has_value() && round != pending_.end()) {
    Fail(round, *error, now, effects);
    return std::nullopt;
  }
  EndedRound ended;
  ended.declaration = DeclarationFor(rank, key, *layer, round);
  if ((ended.declaration->spec.kind == LayerKind::kSum) != (key.phase == Phase::kSum)) return std::nullopt;
  if (error.has_value()) {
    auto outcome = std::make_shared<RoundOutcome>();
    outcome->key = key;
    outcome->error = error;
    ended.failed = true;
    ended.outcome = std::move(outcome);
    ended.roster = Share(key.phase, {});
    layer->Record(key, std::move(ended));
    return std::nullopt;
  }
  Roster roster = RosterOf(report, *layer);
  if (roster.empty()) {
    // Nobody has told of its forward round yet, so that the report is of no use; but the round has ended.
    if (key.phase == Phase::kBackward) NoteForgotten(rank, key, now, effects);
    return std::nullopt;
  }
  ended.restored = true;
  ended.alone = roster.size() == 1 && members_.present() > 1;
  ended.backward_required = report.backward_required;
  ended.count = report.count;
  if (key.phase == Phase::kBackward) ended.count = layer->Find(Phase::kForward, key.sequence)->count;
  ended.digest = report.digest;
  ended.missing_ranks = report.missing_ranks;
  ended.digests.resize(roster.size());
  ended.roster = Share(key.phase, std::move(roster));
  if (key.phase == Phase::kForward) ended.holders.insert(rank);
  const EndedRound settled = ended;
  layer->Record(key, std::move(ended));
  if (round == pending_.end()) return std::nullopt;
  Settle(round, settled);
  MaybeEnd(round, now, effects);
  return std::nullopt;
}

Roster Rounds::RosterOf(const EndedReport& report, const Layer& layer) const {
  const auto contains = [](const std::vector<Rank>& ascending, Rank rank) {
    return std::binary_search(ascending.begin(), ascending.end(), rank);
  };
  Roster roster;
  if (report.key.phase != Phase::kBackward) {
    for (Rank rank = 0; rank < members_.world_size(); ++rank) {
      if (contains(report.missing_ranks, rank)) continue;
      const bool abstains = contains(report.abstaining_ranks, rank);
      roster.push_back({rank, abstains ? BackwardRole::kNone : BackwardRole::kRequired, 0});
    }
    return roster;
  }
  const EndedRound* const forward = layer.Find(Phase::kForward, report.key.sequence);
  if (forward == nullptr || forward->failed) return roster;
  for (const Contributor& contributor : *forward->roster) {
    if (contributor.role == BackwardRole::kNone || contains(report.missing_ranks, contributor.rank)) continue;
    roster.push_back({contributor.rank, BackwardRole::kRequired, 0});
  }
  return roster;
}

void Rounds::NoteHolder(Rank rank, EndedRound* ended) {
  if (!ended->holders.empty()) ended->holders.insert(rank);
}

void Rounds::NoteForgotten(Rank rank, const RoundKey& key, absl::Time now, Effects& effects) {
  Layer* const layer = layers_.Find(key.layer);
  if (layer == nullptr) return;
  // Lesser sequences were looked at when they were forgotten, or when their rounds began.
  const std::optional<uint64_t> least = layer->NoteForgotten(rank, key);
  if (!least.has_value()) return;
  auto round = pending_.lower_bound({key.layer, *least, Phase::kForward});
  while (round != pending_.end() && round->first.layer == key.layer && round->first.sequence <= key.sequence) {
    const auto next = std::next(round);
    const PendingRound& pending = round->second;
    const bool unknown = round->first.phase == key.phase && !pending.restored && pending.Expects(rank) &&
                         !pending.payloads.contains(rank) &&
                         layer->MayHaveForgotten(rank, key.phase, round->first.sequence);
    if (unknown) Fail(round, OutcomeUnknownError(round->first, rank), now, effects);
    round = next;
  }
}

bool Rounds::Contradicts(Rank rank, const Contribution& contribution, const EndedRound* ended,
                         Pending::const_iterator round) const {
  const bool pending = round != pending_.end();
  if (pending ? !round->second.restored : ended == nullptr || !ended->restored) return false;
  if (pending ? !round->second.Expects(rank) : ended->Find(rank) == nullptr) return false;
  const DeclarationPtr& declaration = pending ? round->second.declaration : ended->declaration;
  return CheckNumbers(contribution, declaration->spec, rank, limits_).has_value();
}

void Rounds::BeginRestored(const EndedRound& ended, PendingRound* round) const {
  round->restored = true;
  round->alarm = round->deadline;
  round->expected.clear();
  for (const Contributor& contributor : *ended.roster) round->expected.push_back(contributor.rank);
  round->needed = round->expected.size();
  round->count = ended.count;
  round->declaration = ended.declaration;
}

void Rounds::Settle(Pending::iterator round, const EndedRound& ended) {
  PendingRound& pending = round->second;
  const absl::Time alarm = pending.alarm;
  for (const auto& [rank, payload] : pending.payloads) members_.EndAwaiting(rank);
  BeginRestored(ended, &pending);
  pending.alarm = alarm;
  for (auto payload = pending.payloads.begin(); payload != pending.payloads.end();) {
    if (pending.Expects(payload->first)) {
      ++payload;
      continue;
    }
    const size_t bytes = payload->second.bytes();
    SYNCBN_CHECK(bytes <= pending.bytes && pending.bytes <= pending_bytes_, bytes, " of ", pending_bytes_);
    pending.bytes -= bytes;
    pending_bytes_ -= bytes;
    const Rank rank = payload->first;
    payload = pending.payloads.erase(payload);
    AddLatecomer(rank, &pending);
  }
}

void Rounds::NoteStraddling(const std::vector<Rank>& left_ranks, PendingRound* round) const {
  round->straddles = true;
  for (const Rank rank : left_ranks) {
    if (rank < members_.world_size()) round->left.insert(rank);
  }
}

// ---- Those who wait -------------------------------------------------------------------------------------------------

void Rounds::AddLatecomer(Rank rank, PendingRound* round) {
  if (!round->AwaitedBy(rank)) round->latecomers.push_back(rank);
}

void Rounds::NoteWaiter(Pending::iterator round, absl::Time now) {
  PendingRound& pending = round->second;
  SYNCBN_CHECK(idle_ != 0 && pending.restored, Describe(round->first));
  --idle_;
  alarms_.erase({pending.alarm, round->first});
  pending.begun = now;
  pending.deadline = now + *config_.round_timeout;
  pending.alarm = std::min(pending.deadline, now + limits_.late_round_after);
  alarms_.insert({pending.alarm, round->first});
}

Rounds::Fate Rounds::FateOfRestored(const RoundKey& key, const PendingRound& round,
                                    const std::vector<Rank>& missing) const {
  if (missing.empty()) return {true, std::nullopt};
  if (round.Idle()) return {};
  // A member that has caught up would have repeated its contribution if it could, and one that has left cannot, unless
  // its leave was not acknowledged. A worker in the place of a predecessor may have gone back to an earlier step, and
  // contribute anew.
  std::vector<Rank> silent;
  for (const Rank rank : missing) {
    const Member& member = members_[rank];
    const bool goes_back = waits() && member.state != MemberState::kLeft;
    const bool may_come = member.state == MemberState::kAbsent || (member.left_before && members_.LeaversMayReturn()) ||
                          ((member.catching_up || goes_back) && !member.given_up);
    if (!may_come) silent.push_back(rank);
  }
  if (silent.empty()) return {};
  return {true, OutcomeLostError(key, silent)};
}

bool Rounds::AnyRestoredAwaited() const {
  return std::any_of(pending_.begin(), pending_.end(),
                     [](const auto& round) { return round.second.restored && !round.second.Idle(); });
}

bool Rounds::FailRestored(const std::vector<RoundKey>& keys, absl::Time now, Effects& effects) {
  bool any = false;
  for (const RoundKey& key : keys) {
    const auto round = pending_.find(key);
    if (round == pending_.end() || !round->second.restored) continue;
    Fail(round, OutcomeLostError(key, round->second.MissingRanks(members_.world_size())), now, effects);
    any = true;
  }
  return any;
}

// ---- The end of catching up -----------------------------------------------------------------------------------------

void Rounds::OnCaughtUp(Rank rank, const std::vector<RoundKey>& forgotten, absl::Time now, Effects& effects) {
  if (!members_[rank].catching_up) return;
  members_.CatchUp(rank);
  for (const RoundKey& key : forgotten) {
    members_.NoteUsed(rank, key.sequence);
    NoteForgotten(rank, key, now, effects);
  }
  // Under MISSING_POLICY_WAIT a worker may yet restart, and need them. Their deadlines drop them.
  const bool all_here = members_.present() + members_.left() == members_.world_size();
  if (members_.catching_up() == 0 && all_here && !waits()) DropIdle();
  BeginReview(now, effects);
}

void Rounds::Drop(Pending::iterator round) {
  SYNCBN_CHECK(round->second.Idle(), Describe(round->first));
  Erase(round);
}

void Rounds::DropIdle() {
  for (auto round = pending_.begin(); idle_ != 0 && round != pending_.end();) {
    const auto next = std::next(round);
    if (round->second.Idle()) Drop(round);
    round = next;
  }
}

}  // namespace syncbn::core
