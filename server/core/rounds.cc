#include "server/core/rounds.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "server/core/merge.h"

namespace syncbn::core {

// ---- A round is decided ---------------------------------------------------------------------------------------------

size_t Rounds::LeastWorkers(const PendingRound& round) const {
  if (!proceeds()) return 0;
  // Ranks that announced BACKWARD_ROLE_NONE are not missing from a backward round.
  return std::min<size_t>(config_.min_workers, round.needed);
}

bool Rounds::MayBeDecided(const PendingRound& round) const {
  if (round.restored) return true;
  if (!proceeds() && AnyRankFailsRounds()) return true;
  const size_t gone = members_.left() + (proceeds() ? members_.given_up() : 0);
  const bool all_may_be_in = round.payloads.size() + gone >= round.needed;
  const bool too_few_may_remain = LeastWorkers(round) + gone > round.needed;
  return all_may_be_in || too_few_may_remain;
}

Rounds::Fate Rounds::FateOf(const RoundKey& key, const PendingRound& round, const std::vector<Rank>& missing,
                            absl::Time now) const {
  if (round.restored) return FateOfRestored(key, round, missing);
  const bool layer_set_errors = members_.any_layer_set_errors() && !proceeds();
  std::vector<Rank> lost;
  size_t awaited = 0;
  for (const Rank rank : missing) {
    const Member& member = members_[rank];
    if (member.state == MemberState::kLeft) continue;
    const Error* const layer_set_error = layer_set_errors ? members_.LayerSetErrorOf(rank) : nullptr;
    if (layer_set_error != nullptr) return {true, *layer_set_error};
    if (member.given_up) {
      lost.push_back(rank);
    } else {
      ++awaited;
    }
  }
  if (!lost.empty() && !proceeds()) return {true, WithLastContributions(WorkersLostError(key, lost), now)};
  if (std::vector<Rank> gone = TakenAlong(round, missing); !gone.empty()) {
    // One that is still to come may know how the round has ended.
    if (awaited != 0 || members_.LeaversMayReturn()) return {};
    return {true, OutcomeLostError(key, gone)};
  }
  const size_t possible = round.payloads.size() + awaited;
  const size_t least = LeastWorkers(round);
  if (possible < least) return {true, TooFewWorkersError(key, possible, least, config_.min_workers, lost)};
  return {awaited == 0, std::nullopt};
}

std::vector<Rank> Rounds::TakenAlong(const PendingRound& round, const std::vector<Rank>& missing) const {
  std::vector<Rank> ranks;
  if (!round.straddles) return ranks;
  for (const Rank rank : missing) {
    if (members_[rank].left_before && !round.left.contains(rank)) ranks.push_back(rank);
  }
  return ranks;
}

void Rounds::MaybeEnd(Pending::iterator round, absl::Time now, Effects& effects) {
  if (!MayBeDecided(round->second)) return;
  Spend(RanksCost());
  std::vector<Rank> missing = round->second.MissingRanks(members_.world_size());
  Fate fate = FateOf(round->first, round->second, missing, now);
  if (!fate.decided) return;
  if (fate.error.has_value()) {
    Fail(round, WithResumption(*std::move(fate.error), round->first.sequence), now, effects);
  } else {
    Complete(round, std::move(missing), now, effects);
  }
}

void Rounds::BeginReview(absl::Time now, Effects& effects) {
  review_.emplace(RoundKey(), now);
  ContinueReview(now, effects);
}

void Rounds::ContinueReview(absl::Time now, Effects& effects) {
  if (!review_.has_value()) return;
  for (auto round = pending_.lower_bound(review_->first); round != pending_.end();) {
    if (turn_ == 0 || WaitsForReaders()) {
      review_->first = round->first;
      return;
    }
    const auto next = std::next(round);
    MaybeEnd(round, now, effects);
    round = next;
  }
  review_.reset();
}

// ---- Time passes ----------------------------------------------------------------------------------------------------

absl::Time Rounds::NextDeadline() const {
  absl::Time next = absl::InfiniteFuture();
  if (!alarms_.empty() && !DeadlinesWait()) next = alarms_.begin()->first;
  if (review_.has_value() && !WaitsForReaders()) next = std::min(next, review_->second);
  return next;
}

void Rounds::OnTimePassed(absl::Time now, Effects& effects) {
  while (turn_ != 0 && !alarms_.empty() && alarms_.begin()->first <= now && !DeadlinesWait()) {
    const auto round = pending_.find(alarms_.begin()->second);
    SYNCBN_CHECK(round != pending_.end(), "an alarm is set for the ", Describe(alarms_.begin()->second));
    if (round->second.Idle()) {
      Drop(round);
    } else if (round->second.deadline <= now) {
      Expire(round, now, effects);
    } else {
      AnnounceLate(round, now, effects);
    }
  }
}

std::vector<Rank> Rounds::WithoutLeft(std::vector<Rank> ranks) const {
  if (members_.left() == 0) return ranks;
  const auto left = [this](Rank rank) { return members_[rank].state == MemberState::kLeft; };
  ranks.erase(std::remove_if(ranks.begin(), ranks.end(), left), ranks.end());
  return ranks;
}

void Rounds::AnnounceLate(Pending::iterator round, absl::Time now, Effects& effects) {
  PendingRound& pending = round->second;
  alarms_.erase({pending.alarm, round->first});
  pending.alarm = pending.deadline;
  alarms_.insert({pending.alarm, round->first});
  LateRound late;
  late.key = round->first;
  late.age = now - pending.begun;
  late.missing_ranks = WithoutLeft(pending.MissingRanks(members_.world_size()));
  late.missing = static_cast<uint32_t>(late.missing_ranks.size());
  late.missing_ranks.resize(std::min(late.missing_ranks.size(), kMostNamedRanks));
  Spend(RanksCost());
  std::vector<StreamId> streams;
  for (const auto& [rank, payload] : pending.payloads) {
    if (!payload.repeats && members_[rank].state == MemberState::kPresent) streams.push_back(members_[rank].stream);
  }
  for (const Rank rank : pending.latecomers) {
    if (members_[rank].state == MemberState::kPresent) streams.push_back(members_[rank].stream);
  }
  effects.push_back(SendLateRounds{id_, std::move(streams), {std::move(late)}});
}

void Rounds::Expire(Pending::iterator round, absl::Time now, Effects& effects) {
  const std::string timeout = absl::FormatDuration(*config_.round_timeout);
  EndWithoutMissing(round, absl::StrCat(" within ", timeout, " of its first contribution"), now, effects);
}

void Rounds::EndWithoutMissing(Pending::iterator round, absl::string_view when, absl::Time now, Effects& effects) {
  std::vector<Rank> missing = round->second.MissingRanks(members_.world_size());
  const std::vector<Rank> awaited = WithoutLeft(missing);
  Spend(RanksCost());
  const size_t contributed = round->second.payloads.size();
  if (round->second.restored) {
    Fail(round, OutcomeLostError(round->first, missing), now, effects);
  } else if (!proceeds()) {
    Error error = RoundTimeoutError(round->first, awaited, when, DeclarationHint(round, awaited));
    error = WithLastContributions(std::move(error), now);
    Fail(round, WithResumption(std::move(error), round->first.sequence), now, effects);
  } else if (contributed < LeastWorkers(round->second)) {
    Error error = TooFewContributedError(round->first, contributed, when, config_.min_workers, awaited);
    error = WithLastContributions(std::move(error), now);
    Fail(round, WithResumption(std::move(error), round->first.sequence), now, effects);
  } else if (std::vector<Rank> gone = TakenAlong(round->second, missing); !gone.empty()) {
    Fail(round, OutcomeLostError(round->first, gone), now, effects);
  } else {
    Complete(round, std::move(missing), now, effects);
  }
}

Error Rounds::WithLastContributions(Error error, absl::Time now) const {
  constexpr size_t kShown = 4;
  const size_t shown = std::min(error.ranks.size(), kShown);
  for (size_t i = 0; i < shown; ++i) {
    const Activity* const activity = members_[error.ranks[i]].activity.get();
    if (activity == nullptr) {
      absl::StrAppend(&error.message, "; rank ", error.ranks[i], " has contributed nothing yet");
    } else {
      absl::StrAppend(&error.message, "; rank ", error.ranks[i], " contributed last to the ", Describe(activity->key()),
                      ", ", absl::FormatDuration(absl::Trunc(now - activity->at, absl::Milliseconds(1))), " before");
    }
  }
  return error;
}

std::string Rounds::DeclarationHint(Pending::const_iterator round, const std::vector<Rank>& missing) const {
  const Declarations& declarations = std::as_const(layers_).Get(round->first.layer).declarations();
  if (declarations.AllDeclare(round->second.declaration)) return "";
  for (const Rank rank : missing) {
    const DeclarationPtr declared = declarations.Of(rank);
    if (declared == nullptr || declared == round->second.declaration) continue;
    const std::string difference = Difference(declared->spec, round->second.declaration->spec);
    if (!difference.empty()) return absl::StrCat("; to rank ", rank, " the layer has ", difference);
  }
  return "";
}

// ---- A round ends ---------------------------------------------------------------------------------------------------

void Rounds::FailLayer(absl::string_view layer, const Error& error, absl::Time now, Effects& effects) {
  const RoundKey first{std::string(layer), 0, Phase::kForward};
  for (auto round = pending_.lower_bound(first); round != pending_.end() && round->first.layer == first.layer;) {
    const auto next = std::next(round);
    Fail(round, error, now, effects);
    round = next;
  }
}

void Rounds::FailAwaiting(Rank rank, absl::Time now, Effects& effects) {
  for (auto round = pending_.begin(); round != pending_.end();) {
    const auto next = std::next(round);
    const PendingRound& pending = round->second;
    if (!pending.restored && pending.Expects(rank) && !pending.payloads.contains(rank)) {
      Error error = WithResumption(WorkerRestartedError(round->first, rank), round->first.sequence);
      Fail(round, std::move(error), now, effects);
    }
    round = next;
  }
}

void Rounds::FailAll(const Error& why, absl::Time now, Effects& effects) {
  while (!pending_.empty()) {
    const auto round = pending_.begin();
    if (round->second.Idle()) {
      Drop(round);
    } else {
      Fail(round, GroupEndedError(round->first, why), now, effects);
    }
  }
}

void Rounds::Complete(Pending::iterator round, std::vector<Rank> missing, absl::Time now, Effects& effects) {
  const PendingRound& pending = round->second;
  const LayerSpec& spec = pending.declaration->spec;
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = round->first;
  const EndedRound* const ended =
      pending.restored ? layers_.Get(round->first.layer).Find(round->first.phase, round->first.sequence) : nullptr;
  if (ended != nullptr) missing = ended->missing_ranks;
  outcome->missing_ranks = std::move(missing);
  if (round->first.phase == Phase::kForward) {
    MergeForward(pending.payloads, spec.channels, *outcome);
  } else {
    MergeSums(pending.payloads, spec.channels, *outcome);
  }
  if (auto error = CheckMerged(*outcome, spec)) {
    if (pending.restored) error = OutcomeDiffersError(round->first);
    return Fail(round, *std::move(error), now, effects);
  }
  if (round->first.phase == Phase::kBackward) outcome->count = pending.count;
  outcome->digest = ResultDigest(*outcome);
  if (ended != nullptr && ended->digest != 0 && ended->digest != outcome->digest) {
    return Fail(round, OutcomeDiffersError(round->first), now, effects);
  }
  Finish(round, std::move(outcome), now, effects);
}

void Rounds::Fail(Pending::iterator round, Error error, absl::Time now, Effects& effects) {
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = round->first;
  outcome->error = std::move(error);
  outcome->refused = round->second.restored;  // It has ended otherwise.
  Finish(round, std::move(outcome), now, effects);
}

void Rounds::Finish(Pending::iterator round, std::shared_ptr<const RoundOutcome> outcome, absl::Time now,
                    Effects& effects) {
  const PendingRound& pending = round->second;
  const bool failed = outcome->error.has_value();
  Spend((outcome->first.size() + outcome->second.size()) * sizeof(double) + pending.bytes / 2);
  EndedRound ended;
  ended.outcome = outcome;
  ended.failed = failed;
  ended.alone = pending.payloads.size() == 1 && members_.present() > 1;
  ended.backward_required = outcome->backward_required;
  ended.count = outcome->count;
  ended.digest = outcome->digest;
  ended.declaration = pending.declaration;
  ended.roster = Share(round->first.phase, RosterOf(pending.payloads));
  ended.digests.reserve(pending.payloads.size());
  std::vector<StreamId> streams;
  streams.reserve(pending.payloads.size());
  const auto tell = [&](Rank rank) {
    if (members_[rank].state != MemberState::kPresent) return;
    streams.push_back(members_[rank].stream);
    members_.NoteOutcome(rank, round->first);
  };
  for (const auto& [rank, payload] : pending.payloads) {
    ended.digests.push_back(Digest(payload));
    if (!payload.repeats) tell(rank);
  }
  for (const Rank rank : pending.latecomers) tell(rank);
  Count(pending, *outcome, now);
  recorder_.Record(pending.declaration, pending.payloads, pending.begun, now, outcome);
  const auto contributors = static_cast<uint32_t>(pending.payloads.size());
  effects.push_back(RoundEnded{id_, outcome, now - pending.begun, contributors, pending.last_rank});
  Layer& layer = layers_.Get(round->first.layer);
  if (!pending.restored) {
    layer.Record(round->first, std::move(ended));
  } else if (!failed) {
    layer.Restore(round->first, std::move(ended));
  }
  Erase(round);
  if (!streams.empty()) effects.push_back(SendResults{std::move(streams), {std::move(outcome)}});
}

void Rounds::Erase(Pending::iterator round) {
  PendingRound& pending = round->second;
  SYNCBN_CHECK(pending.bytes <= pending_bytes_, pending.bytes, " of ", pending_bytes_);
  pending_bytes_ -= pending.bytes;
  for (auto& [rank, payload] : pending.payloads) {
    if (!pending.restored) members_.EndAwaiting(rank);
    spare_.Keep(std::move(payload.first));
    spare_.Keep(std::move(payload.second));
  }
  idle_ -= pending.Idle() ? 1 : 0;
  alarms_.erase({pending.alarm, round->first});
  pending_.erase(round);
}

void Rounds::Count(const PendingRound& round, const RoundOutcome& outcome, absl::Time now) {
  PhaseStatistics& statistics = statistics_.of(outcome.key.phase);
  if (outcome.error.has_value()) {
    ++failed_;
    statistics.failed.Add(outcome.error->reason);
    return;
  }
  ++completed_;
  statistics.durations.Add(now - round.begun);
  members_.NoteLastArrival(round.last_rank);
  for (const auto& [rank, payload] : round.payloads) members_.NoteLateness(rank, payload.arrived - round.begun);
}

Roster Rounds::RosterOf(const Payloads& payloads) {
  Roster roster;
  roster.reserve(payloads.size());
  for (const auto& [rank, payload] : payloads) {
    roster.push_back({rank, payload.backward_role, Contributor::LowBits(payload.incarnation)});
  }
  return roster;
}

std::shared_ptr<const Roster> Rounds::Share(Phase phase, Roster roster) {
  std::shared_ptr<const Roster>& newest = newest_rosters_[static_cast<size_t>(phase) - 1];
  if (newest == nullptr || *newest != roster) newest = std::make_shared<const Roster>(std::move(roster));
  return newest;
}

// ---- Deadlock -------------------------------------------------------------------------------------------------------

void Rounds::OnBlocked(Rank rank, const std::vector<RoundKey>& keys) {
  if (keys.empty() || members_[rank].state != MemberState::kPresent) return;
  if (keys.size() > pending_.size()) return;  // They cannot all be in flight.
  for (const RoundKey& key : keys) {
    const auto round = pending_.find(key);
    // A round that nobody awaits may be dropped at any time, without an outcome that would free the rank.
    if (round == pending_.end() || !round->second.AwaitedBy(rank)) return;
  }
  members_.Block(rank, keys);
}

void Rounds::FindDeadlock(absl::Time now, Effects& effects) {
  // Absent and lost members may still come and contribute, and those that catch up have contributions on the way, as
  // have those whose leaves the next master has to acknowledge. Nobody waits for members that have left, and a review
  // may be about to end what does.
  if (members_.catching_up() != 0 || members_.LeaversMayReturn() || review_.has_value()) return;
  const uint32_t blocked = members_.blocked();
  if (blocked == 0 || blocked != members_.present() || members_.present() + members_.left() != members_.world_size()) {
    return;
  }
  std::vector<RoundKey> keys;
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    keys.insert(keys.end(), members_[rank].blocked_on.begin(), members_[rank].blocked_on.end());
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  if (FailRestored(keys, now, effects)) return;
  const std::string waiters = DescribeWaiters();
  const std::optional<uint64_t> resume_at = ResumeAfter(UINT64_MAX);
  for (const RoundKey& key : keys) {
    const auto round = pending_.find(key);
    SYNCBN_CHECK(round != pending_.end(), "a member is blocked on the ", Describe(key));
    Error error = DeadlockError(waiters, round->second.MissingRanks(members_.world_size()));
    error.resume_at = resume_at;
    Fail(round, std::move(error), now, effects);
  }
}

std::string Rounds::DescribeWaiters() const {
  constexpr size_t kShown = 8;
  std::string text = "every worker waits, and on different rounds: ";
  size_t shown = 0;
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    const std::vector<RoundKey>& blocked_on = members_[rank].blocked_on;
    if (blocked_on.empty()) continue;
    if (shown++ >= kShown) continue;
    absl::StrAppend(&text, shown == 1 ? "" : "; ", "rank ", rank, " on the ", Describe(blocked_on.front()));
    if (blocked_on.size() > 1) absl::StrAppend(&text, " and ", blocked_on.size() - 1, " more");
  }
  if (shown > kShown) absl::StrAppend(&text, "; and ", shown - kShown, " more workers");
  return text;
}

// ---- Views and invariants -------------------------------------------------------------------------------------------

std::optional<absl::Time> Rounds::OldestBegun() const {
  std::optional<absl::Time> oldest;
  for (const auto& [key, round] : pending_) oldest = std::min(oldest.value_or(round.begun), round.begun);
  return oldest;
}

std::vector<PendingRoundView> Rounds::Views(absl::Time now) const {
  std::vector<Pending::const_iterator> rounds;
  rounds.reserve(pending_.size());
  for (auto round = pending_.begin(); round != pending_.end(); ++round) {
    if (!round->second.Idle()) rounds.push_back(round);
  }
  // Rounds that began at the same time are ordered by their keys.
  const auto older = [](const auto& a, const auto& b) {
    return a->second.begun < b->second.begun || (a->second.begun == b->second.begun && a->first < b->first);
  };
  const size_t shown = std::min(rounds.size(), kMostShownRounds);
  std::partial_sort(rounds.begin(), rounds.begin() + shown, rounds.end(), older);
  std::vector<PendingRoundView> views;
  views.reserve(shown);
  for (size_t i = 0; i < shown; ++i) views.push_back(ViewOf(rounds[i], now));
  return views;
}

PendingRoundView Rounds::ViewOf(Pending::const_iterator round, absl::Time now) const {
  const PendingRound& pending = round->second;
  PendingRoundView view;
  view.key = round->first;
  for (const auto& [rank, payload] : pending.payloads) {
    if (view.arrived_ranks.size() < kMostNamedRanks) view.arrived_ranks.push_back(rank);
  }
  view.arrived = pending.payloads.size();
  view.missing_ranks = pending.MissingRanks(members_.world_size());
  view.missing = view.missing_ranks.size();
  view.missing_ranks.resize(std::min(view.missing, kMostNamedRanks));
  view.age = now - pending.begun;
  view.time_left = pending.deadline - now;
  return view;
}

void Rounds::CheckInvariants() const {
  size_t bytes = 0, idle = 0;
  std::vector<uint32_t> awaited(members_.world_size());
  for (const auto& [key, round] : pending_) {
    round.CheckInvariants(members_.world_size());
    for (const auto& [rank, payload] : round.payloads) awaited[rank] += round.restored ? 0 : 1;
    SYNCBN_CHECK(alarms_.contains({round.alarm, key}), Describe(key));
    const Layer& layer = std::as_const(layers_).Get(key.layer);
    const EndedRound* const ended = layer.Find(key.phase, key.sequence);
    SYNCBN_CHECK(ended == nullptr || (round.restored && ended->restored), "the ", Describe(key), " has ended");
    idle += round.Idle() ? 1 : 0;
    SYNCBN_CHECK(!layer.declarations().conflict().has_value(), Describe(key));
    const bool to_be_reviewed = review_.has_value() && !(key < review_->first);
    if (!to_be_reviewed && MayBeDecided(round)) {
      const std::vector<Rank> missing = round.MissingRanks(members_.world_size());
      SYNCBN_CHECK(!FateOf(key, round, missing, round.begun).decided, Describe(key));
    }
    bytes += round.bytes;
  }
  SYNCBN_CHECK(pending_bytes_ == bytes, pending_bytes_, ", not ", bytes);
  SYNCBN_CHECK(idle_ == idle, idle_, ", not ", idle);
  SYNCBN_CHECK(alarms_.size() == pending_.size(), alarms_.size(), ", not ", pending_.size());
  SYNCBN_CHECK(pending_bytes_ <= limits_.max_pending_bytes && size() <= limits_.max_rounds_in_flight);
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    SYNCBN_CHECK(members_[rank].awaited == awaited[rank], "rank ", rank, " awaits ", awaited[rank], " rounds");
    for (const RoundKey& key : members_[rank].blocked_on) {
      const auto round = pending_.find(key);
      SYNCBN_CHECK(round != pending_.end() && round->second.AwaitedBy(rank), "rank ", rank, ", ", Describe(key));
    }
  }
}

}  // namespace syncbn::core
