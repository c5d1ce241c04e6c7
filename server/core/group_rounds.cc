// The rounds of a group: from a contribution to an outcome.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/error.h"
#include "server/core/group.h"

namespace syncbn::core {

// ---- A contribution arrives -----------------------------------------------------------------------------------------

void Group::OnContribution(Rank rank, const Contribution& contribution, absl::Time now, Effects& effects) {
  const RoundKey& key = contribution.key;
  const auto it = layers_.find(key.layer);
  if (it != layers_.end() && Replay(rank, contribution, *it->second, effects)) return;
  const DeclarationPtr declaration = it == layers_.end() ? nullptr : DeclarationFor(rank, key, *it->second);
  if (declaration == nullptr || (declaration->spec.kind == LayerKind::kSum) != (key.phase == Phase::kSum)) {
    Refuse(rank, key,
           MakeError(absl::StatusCode::kInvalidArgument, kInvalidContribution,
                     absl::StrCat("rank ", rank, " contributes to the ", Describe(key), ", but ",
                                  it == layers_.end() ? "no worker has declared a layer of that name"
                                                      : "that layer was declared to be of another kind"),
                     {rank}),
           effects);
    return;
  }
  Layer& layer = *it->second;
  auto round = pending_.find(key);
  std::optional<Error> refusal;
  if (layer.Expired(key.phase, key.sequence) && round == pending_.end()) {
    refusal = ExpiredError(key, layer);
  } else if (key.phase == Phase::kBackward) {
    refusal = CheckBackward(rank, key, layer);
  }
  if (!refusal.has_value()) refusal = CheckRoom(rank, contribution);
  if (refusal.has_value()) {
    Refuse(rank, key, std::move(*refusal), effects);
    return;
  }
  if (round == pending_.end()) round = Begin(key, layer, now);
  if (!Take(rank, contribution, declaration, round, effects)) return;
  if (auto conflict = layer.declarations().conflict()) {
    Fail(round, std::move(*conflict), now, effects);
  } else if (auto different = CheckDeclared(rank, round)) {
    Fail(round, std::move(*different), now, effects);
  } else if (auto error = CheckNumbers(contribution, round->second.declaration->spec, rank, limits_)) {
    Fail(round, std::move(*error), now, effects);
  } else {
    Settle(round, now, effects);
  }
}

Error Group::ExpiredError(const RoundKey& key, const Layer& layer) const {
  std::string text;
  if (key.phase == Phase::kBackward && layer.LostAwaited(key.sequence)) {
    text =
        absl::StrCat("the forward round of the ", Describe(key), " has been forgotten: forward rounds that wait for ",
                     "their backward rounds exceed the master's limit max_awaited_bytes = ", limits_.max_awaited_bytes);
  } else {
    text = absl::StrCat("the ", Describe(key), " is more than ", limits_.retained_rounds,
                        " sequences behind the newest that has completed, and has been forgotten");
  }
  return MakeError(absl::StatusCode::kFailedPrecondition, kRoundExpired, std::move(text));
}

bool Group::Replay(Rank rank, const Contribution& contribution, Layer& layer, Effects& effects) const {
  const RoundKey& key = contribution.key;
  const EndedRound* const ended = layer.Find(key.phase, key.sequence);
  if (ended == nullptr) return false;
  const Contributor* const before = ended->Find(rank);
  if (before != nullptr && ended->DigestOf(before) != Digest(contribution)) {
    const bool reborn = before->incarnation != Contributor::LowBits(members_[rank].incarnation);
    Refuse(rank, key,
           MakeError(absl::StatusCode::kAlreadyExists, kPayloadChanged,
                     absl::StrCat("the ", Describe(key), " has ended, and rank ", rank,
                                  reborn ? " contributed other numbers before it restarted; workers that restart must "
                                           "resume at a sequence that is greater than any used before"
                                         : " contributed other numbers to it; the first ones stand"),
                     {rank}),
           effects);
  } else if (ended->outcome == nullptr) {
    Refuse(
        rank, key,
        MakeError(absl::StatusCode::kFailedPrecondition, kRoundExpired,
                  absl::StrCat("the ", Describe(key), " has ended, and its result has been forgotten to stay within ",
                               "max_retained_bytes = ", limits_.max_retained_bytes)),
        effects);
  } else {
    effects.push_back(SendResults{{members_[rank].stream}, {ended->outcome}});
  }
  return true;
}

std::optional<Error> Group::CheckBackward(Rank rank, const RoundKey& key, Layer& layer) const {
  if (const auto round = pending_.find(key); round != pending_.end()) {
    const std::vector<Rank>& expected = round->second.expected;
    if (std::binary_search(expected.begin(), expected.end(), rank)) return std::nullopt;
  }
  const EndedRound* const forward = layer.Find(Phase::kForward, key.sequence);
  if (forward == nullptr || forward->failed) {
    return MakeError(absl::StatusCode::kFailedPrecondition, kForwardRoundUnknown,
                     absl::StrCat("the ", Describe(key), " has no completed forward round",
                                  forward == nullptr ? "" : ": that one failed"));
  }
  const Contributor* const contributor = forward->Find(rank);
  if (contributor != nullptr && contributor->role != BackwardRole::kNone && forward->backward_required) {
    return std::nullopt;
  }
  return MakeError(absl::StatusCode::kFailedPrecondition, kNotAContributor,
                   absl::StrCat("rank ", rank, " contributes to the ", Describe(key), ", but ",
                                contributor == nullptr       ? "its forward contribution did not count"
                                : forward->backward_required ? "it announced BACKWARD_ROLE_NONE in its forward round"
                                                             : "no worker required that round"),
                   {rank});
}

std::optional<Error> Group::CheckRoom(Rank rank, const Contribution& contribution) const {
  const auto round = pending_.find(contribution.key);
  if (round == pending_.end() && pending_.size() >= limits_.max_rounds_in_flight) {
    return LimitError(pending_.size() + 1, "rounds in flight", "max_rounds_in_flight", limits_.max_rounds_in_flight);
  }
  size_t bytes = pending_bytes_ + (contribution.first.size() + contribution.second.size()) * sizeof(double);
  if (round != pending_.end()) {
    // What this rank has sent before is sent again, or gives way.
    const auto before = round->second.payloads.find(rank);
    if (before != round->second.payloads.end()) bytes -= before->second.bytes();
  }
  if (bytes > limits_.max_pending_bytes) {
    return LimitError(bytes, "bytes of contributions to rounds in flight", "max_pending_bytes",
                      limits_.max_pending_bytes);
  }
  return std::nullopt;
}

DeclarationPtr Group::DeclarationFor(Rank rank, const RoundKey& key, Layer& layer) const {
  const auto round = pending_.find(key);
  // A backward round is of its forward round's size, whatever the layer has become since.
  if (key.phase == Phase::kBackward) {
    if (round != pending_.end()) return round->second.declaration;
    if (const EndedRound* const forward = layer.Find(Phase::kForward, key.sequence)) return forward->declaration;
  }
  if (DeclarationPtr declared = layer.declarations().Of(rank)) return declared;
  return round != pending_.end() ? round->second.declaration : layer.declarations().current();
}

std::optional<Error> Group::CheckDeclared(Rank rank, PendingRounds::const_iterator round) {
  const DeclarationPtr& mine = round->second.payloads.at(rank).declaration;
  const DeclarationPtr& theirs = round->second.declaration;
  if (mine == theirs) return std::nullopt;
  const std::string difference = Difference(mine->spec, theirs->spec);
  if (difference.empty()) return std::nullopt;
  return MakeError(
      absl::StatusCode::kFailedPrecondition, kLayerSpecMismatch,
      absl::StrCat("workers disagree about the ", Describe(round->first), ": rank ", rank, " has ", difference),
      {rank});
}

Group::PendingRounds::iterator Group::Begin(const RoundKey& key, Layer& layer, absl::Time now) {
  PendingRound round;
  round.begun = now;
  round.deadline = now + *config_.round_timeout;
  round.needed = world_size_;
  if (key.phase == Phase::kBackward) {
    const EndedRound& forward = *layer.Find(Phase::kForward, key.sequence);
    for (const Contributor& contributor : *forward.roster) {
      if (contributor.role != BackwardRole::kNone) round.expected.push_back(contributor.rank);
    }
    round.needed = round.expected.size();
    round.count = forward.count;
    round.declaration = forward.declaration;
  }
  round.alarm = std::min(round.deadline, now + limits_.late_round_after);
  alarms_.insert({round.alarm, key});
  return pending_.emplace(key, std::move(round)).first;
}

bool Group::Take(Rank rank, const Contribution& contribution, DeclarationPtr declaration, PendingRounds::iterator round,
                 Effects& effects) {
  MemberRecord& member = members_[rank];
  const auto before = round->second.payloads.find(rank);
  if (before != round->second.payloads.end()) {
    if (SameNumbers(before->second, contribution)) {
      before->second.incarnation = member.incarnation;
      member.has_contributed = true;
      return true;
    }
    if (before->second.incarnation == member.incarnation) {
      Refuse(rank, round->first,
             MakeError(absl::StatusCode::kAlreadyExists, kPayloadChanged,
                       absl::StrCat("rank ", rank, " has already contributed other numbers to the ",
                                    Describe(round->first), "; the first ones stand"),
                       {rank}),
             effects);
      return false;
    }
    round->second.bytes -= before->second.bytes();
    pending_bytes_ -= before->second.bytes();
    round->second.payloads.erase(before);  // Its predecessor's, which nobody has seen yet.
  }
  Payload payload;
  payload.incarnation = member.incarnation;
  payload.declaration = declaration;
  payload.count = contribution.count;
  payload.backward_role = contribution.backward_role;
  payload.first.assign(contribution.first.begin(), contribution.first.end());
  payload.second.assign(contribution.second.begin(), contribution.second.end());
  round->second.bytes += payload.bytes();
  pending_bytes_ += payload.bytes();
  round->second.payloads.emplace(rank, std::move(payload));
  if (round->second.payloads.size() == 1) round->second.declaration = std::move(declaration);
  round->second.last_rank = rank;
  round->second.straddles = round->second.straddles || member.resuming;
  member.has_contributed = true;
  ++member.contributions;
  return true;
}

void Group::Refuse(Rank rank, const RoundKey& key, Error error, Effects& effects) const {
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = key;
  outcome->error = std::move(error);
  effects.push_back(SendResults{{members_[rank].stream}, {std::move(outcome)}});
}

// ---- A round ends ---------------------------------------------------------------------------------------------------

std::vector<Rank> Group::MissingRanks(const RoundKey& key, const PendingRound& round) const {
  std::vector<Rank> missing;
  missing.reserve(round.needed - std::min(round.needed, round.payloads.size()));
  // Whoever has contributed is among those that are asked about, and both are ascending.
  auto contributed = round.payloads.begin();
  const auto ask = [&](Rank rank) {
    if (contributed != round.payloads.end() && contributed->first == rank) {
      ++contributed;
    } else {
      missing.push_back(rank);
    }
  };
  if (key.phase == Phase::kBackward) {
    for (const Rank rank : round.expected) ask(rank);
  } else {
    for (Rank rank = 0; rank < world_size_; ++rank) ask(rank);
  }
  return missing;
}

size_t Group::LeastWorkers(const PendingRound& round) const {
  if (config_.missing_policy != MissingPolicy::kProceed) return 0;
  // Who announced BACKWARD_ROLE_NONE is not missing from a backward round.
  return std::min<size_t>(config_.min_workers, round.needed);
}

void Group::Settle(PendingRounds::iterator round, absl::Time now, Effects& effects) {
  const size_t contributed = round->second.payloads.size();
  const bool proceed = proceeds();
  const size_t least = LeastWorkers(round->second);
  // Someone may still come, and enough of them.
  const size_t gone = left_ + (proceed ? given_up_ : 0);
  const bool nobody_is_to_blame = proceed || (given_up_ == 0 && refused_.empty());
  if (nobody_is_to_blame && contributed + gone < round->second.needed && least + gone <= round->second.needed) return;
  Spend(RanksCost());
  std::vector<Rank> lost;
  size_t awaited = 0;
  for (const Rank rank : MissingRanks(round->first, round->second)) {
    if (members_[rank].state == MemberState::kLeft) continue;
    if (const auto refused = refused_.find(rank); refused != refused_.end() && !proceed) {
      return Fail(round, refused->second, now, effects);
    }
    if (members_[rank].given_up) {
      lost.push_back(rank);
    } else {
      ++awaited;
    }
  }
  if (!lost.empty() && !proceed) {
    Fail(round,
         MakeError(absl::StatusCode::kUnavailable, kWorkerLost,
                   absl::StrCat(RankList(lost), lost.size() == 1 ? " was" : " were",
                                " lost before contributing to the ", Describe(round->first)),
                   lost),
         now, effects);
    return;
  }
  if (proceed && contributed + awaited < least) {
    Fail(round,
         MakeError(
             absl::StatusCode::kFailedPrecondition, kTooFewWorkers,
             absl::StrCat("at most ", contributed + awaited, " workers can contribute to the ", Describe(round->first),
                          ", and at least ", least, " must (min_workers is ", config_.min_workers, ")"),
             lost),
         now, effects);
    return;
  }
  if (awaited == 0) Complete(round, now, effects);
}

void Group::SettleAll(absl::Time now, Effects& effects) {
  unsettled_.emplace(RoundKey(), now);
  SettleOn(now, effects);
}

void Group::SettleOn(absl::Time now, Effects& effects) {
  if (!unsettled_.has_value()) return;
  for (auto round = pending_.lower_bound(unsettled_->first); round != pending_.end();) {
    if (turn_ == 0 || Held()) {
      unsettled_->first = round->first;
      return;
    }
    const auto next = std::next(round);
    Settle(round, now, effects);
    round = next;
  }
  unsettled_.reset();
}

std::string Group::StillDeclaring(PendingRounds::const_iterator round, const std::vector<Rank>& missing) const {
  const Declarations& declarations = layers_.at(round->first.layer)->declarations();
  for (const Rank rank : missing) {
    const DeclarationPtr declared = declarations.Of(rank);
    if (declared == nullptr || declared == round->second.declaration) continue;
    const std::string difference = Difference(declared->spec, round->second.declaration->spec);
    if (!difference.empty()) return absl::StrCat("; to rank ", rank, " the layer has ", difference);
  }
  return "";
}

void Group::TellLate(PendingRounds::iterator round, absl::Time now, Effects& effects) {
  PendingRound& pending = round->second;
  alarms_.erase({pending.alarm, round->first});
  pending.alarm = pending.deadline;
  alarms_.insert({pending.alarm, round->first});
  LateRound late;
  late.key = round->first;
  late.age = now - pending.begun;
  late.missing_ranks = AwaitedRanks(round->first, pending);
  late.missing = static_cast<uint32_t>(late.missing_ranks.size());
  late.missing_ranks.resize(std::min(late.missing_ranks.size(), kMostNamedRanks));
  Spend(RanksCost());
  std::vector<StreamId> streams;
  for (const auto& [rank, payload] : pending.payloads) {
    if (members_[rank].state == MemberState::kPresent) streams.push_back(members_[rank].stream);
  }
  effects.push_back(SendLateRounds{id_, std::move(streams), {std::move(late)}});
}

std::vector<Rank> Group::AwaitedRanks(const RoundKey& key, const PendingRound& round) const {
  std::vector<Rank> awaited = MissingRanks(key, round);
  awaited.erase(std::remove_if(awaited.begin(), awaited.end(),
                               [this](Rank rank) { return members_[rank].state == MemberState::kLeft; }),
                awaited.end());
  return awaited;
}

void Group::Expire(PendingRounds::iterator round, absl::Time now, Effects& effects) {
  EndWithout(round,
             absl::StrCat(" within ", absl::FormatDuration(*config_.round_timeout), " of its first contribution"), now,
             effects);
}

void Group::EndWithout(PendingRounds::iterator round, absl::string_view when, absl::Time now, Effects& effects) {
  std::vector<Rank> missing = AwaitedRanks(round->first, round->second);
  Spend(RanksCost());
  const size_t contributed = round->second.payloads.size();
  if (config_.missing_policy != MissingPolicy::kProceed) {
    std::string text = absl::StrCat(RankList(missing), " did not contribute to the ", Describe(round->first), when,
                                    StillDeclaring(round, missing));
    Fail(round, MakeError(absl::StatusCode::kDeadlineExceeded, kRoundTimeout, std::move(text), std::move(missing)), now,
         effects);
  } else if (contributed < LeastWorkers(round->second)) {
    std::string text = absl::StrCat("only ", contributed, " workers contributed to the ", Describe(round->first), when,
                                    ", and min_workers is ", config_.min_workers);
    Fail(round, MakeError(absl::StatusCode::kFailedPrecondition, kTooFewWorkers, std::move(text), std::move(missing)),
         now, effects);
  } else {
    Complete(round, now, effects);
  }
}

void Group::Complete(PendingRounds::iterator round, absl::Time now, Effects& effects) {
  const RoundKey& key = round->first;
  const LayerSpec& spec = round->second.declaration->spec;
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = key;
  outcome->missing_ranks = MissingRanks(key, round->second);
  if (key.phase == Phase::kForward) {
    MergeForward(round->second.payloads, spec.channels, *outcome);
  } else {
    MergeSums(round->second.payloads, spec.channels, *outcome);
  }
  if (auto error = CheckMerged(*outcome, spec)) {
    Fail(round, std::move(*error), now, effects);
    return;
  }
  if (key.phase == Phase::kBackward) outcome->count = round->second.count;
  Finish(round, std::move(outcome), now, effects);
}

void Group::Fail(PendingRounds::iterator round, Error error, absl::Time now, Effects& effects) {
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = round->first;
  outcome->error = std::move(error);
  Finish(round, std::move(outcome), now, effects);
}

void Group::Finish(PendingRounds::iterator round, std::shared_ptr<const RoundOutcome> outcome, absl::Time now,
                   Effects& effects) {
  const PendingRound& pending = round->second;
  const bool failed = outcome->error.has_value();
  Spend((outcome->first.size() + outcome->second.size()) * sizeof(double) + pending.bytes / 2);
  EndedRound ended;
  ended.outcome = outcome;
  ended.failed = failed;
  ended.alone = pending.payloads.size() == 1 && present_ > 1;
  ended.backward_required = outcome->backward_required;
  ended.count = outcome->count;
  ended.declaration = pending.declaration;
  ended.roster = RosterOf(round->first.phase, pending.payloads);
  ended.digests.reserve(pending.payloads.size());
  std::vector<StreamId> streams;
  streams.reserve(pending.payloads.size());
  for (const auto& [rank, payload] : pending.payloads) {
    ended.digests.push_back(Digest(payload));
    if (members_[rank].state != MemberState::kPresent) continue;
    streams.push_back(members_[rank].stream);
    members_[rank].resuming = false;
    const std::vector<RoundKey>& blocked_on = members_[rank].blocked_on;
    if (std::binary_search(blocked_on.begin(), blocked_on.end(), round->first)) Unblock(rank);
  }
  ++(failed ? failed_ : completed_);
  if (!failed) ++members_[pending.last_rank].last_arrivals;
  effects.push_back(
      RoundEnded{id_, outcome, now - pending.begun, static_cast<uint32_t>(pending.payloads.size()), pending.last_rank});
  layers_.at(round->first.layer)->Record(round->first, std::move(ended));
  pending_bytes_ -= pending.bytes;
  alarms_.erase({pending.alarm, round->first});
  pending_.erase(round);
  if (!streams.empty()) effects.push_back(SendResults{std::move(streams), {std::move(outcome)}});
}

std::shared_ptr<const Roster> Group::RosterOf(Phase phase, const Payloads& payloads) {
  Roster roster;
  roster.reserve(payloads.size());
  for (const auto& [rank, payload] : payloads) {
    roster.push_back({rank, payload.backward_role, Contributor::LowBits(payload.incarnation)});
  }
  std::shared_ptr<const Roster>& newest = newest_rosters_[static_cast<size_t>(phase) - 1];
  if (newest == nullptr || *newest != roster) newest = std::make_shared<const Roster>(std::move(roster));
  return newest;
}

// ---- Deadlock -------------------------------------------------------------------------------------------------------

void Group::Block(Rank rank, const std::vector<RoundKey>& keys) {
  if (keys.empty() || members_[rank].state != MemberState::kPresent) return;
  if (keys.size() > pending_.size()) return;  // They cannot all be in flight.
  for (const RoundKey& key : keys) {
    const auto round = pending_.find(key);
    if (round == pending_.end() || !round->second.payloads.contains(rank)) return;
  }
  std::vector<RoundKey>& blocked_on = members_[rank].blocked_on;
  blocked_on = keys;
  std::sort(blocked_on.begin(), blocked_on.end());
  blocked_on.erase(std::unique(blocked_on.begin(), blocked_on.end()), blocked_on.end());
  blocked_on.shrink_to_fit();
  ++blocked_;
}

void Group::Unblock(Rank rank) {
  if (members_[rank].blocked_on.empty()) return;
  members_[rank].blocked_on.clear();
  --blocked_;
}

void Group::FindDeadlock(absl::Time now, Effects& effects) {
  // Whoever is absent or lost may still come and contribute; whoever has left is waited for by nobody.
  if (blocked_ == 0 || blocked_ != present_ || present_ + left_ != world_size_) return;
  std::vector<RoundKey> keys;
  for (const MemberRecord& member : members_) {
    keys.insert(keys.end(), member.blocked_on.begin(), member.blocked_on.end());
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  // Where an earlier master has told some members an outcome and others not, these wait for those, who have gone on.
  const bool split =
      std::any_of(keys.begin(), keys.end(), [this](const RoundKey& key) { return pending_.at(key).straddles; });
  const std::string text = DescribeWaiters();
  for (const RoundKey& key : keys) {
    const auto round = pending_.find(key);
    if (split) {
      EndWithout(
          round,
          " before every worker had come to wait; the master has restarted, and an outcome that some of them had "
          "before is lost",
          now, effects);
      continue;
    }
    std::vector<Rank> missing = MissingRanks(key, round->second);
    Fail(round, MakeError(absl::StatusCode::kAborted, kDeadlock, text, std::move(missing)), now, effects);
  }
}

std::string Group::DescribeWaiters() const {
  constexpr size_t kShown = 8;
  std::string text = "every worker waits, and on different rounds: ";
  size_t shown = 0;
  for (Rank rank = 0; rank < world_size_; ++rank) {
    const std::vector<RoundKey>& blocked_on = members_[rank].blocked_on;
    if (blocked_on.empty()) continue;
    if (shown++ >= kShown) continue;
    absl::StrAppend(&text, shown == 1 ? "" : "; ", "rank ", rank, " on the ", Describe(blocked_on.front()));
    if (blocked_on.size() > 1) absl::StrAppend(&text, " and ", blocked_on.size() - 1, " more");
  }
  if (shown > kShown) absl::StrAppend(&text, "; and ", shown - kShown, " more workers");
  return text;
}

}  // namespace syncbn::core
