// Contributions: which are rejected, which are replays, and which a round accepts.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "server/core/rounds.h"

namespace syncbn::core {

std::optional<Error> Rounds::CheckKeys(const FrameReceived& frame) const {
  const size_t rounds =
      std::max({frame.contributions.size(), frame.blocked_on.size(), frame.ended.size(), frame.forgotten.size()});
  if (rounds > limits_.max_rounds_in_frame) {
    return LimitError(rounds, "rounds in one frame", "max_rounds_in_frame", limits_.max_rounds_in_frame);
  }
  const auto malformed = [this](const RoundKey& key) -> std::optional<Error> {
    if (!key.layer.empty() && key.layer.size() <= limits_.max_name_bytes) return std::nullopt;
    return MalformedError(
        absl::StrCat("a key names a layer by ", key.layer.size(), " bytes; a name has 1 to ", limits_.max_name_bytes));
  };
  for (const Contribution& contribution : frame.contributions) {
    if (auto error = malformed(contribution.key)) return error;
  }
  for (const std::vector<RoundKey>* keys : {&frame.blocked_on, &frame.forgotten}) {
    for (const RoundKey& key : *keys) {
      if (auto error = malformed(key)) return error;
    }
  }
  for (const EndedReport& report : frame.ended) {
    if (auto error = malformed(report.key)) return error;
  }
  return std::nullopt;
}

void Rounds::OnContribution(Rank rank, const Contribution& contribution, const std::vector<Rank>& left_ranks,
                            absl::Time now, Effects& effects) {
  const RoundKey& key = contribution.key;
  Layer* const layer = layers_.Find(key.layer);
  EndedRound* const ended = layer == nullptr ? nullptr : layer->Find(key.phase, key.sequence);
  if (ended != nullptr) NoteHolder(rank, ended);
  if (contribution.repeats && IsNeedless(rank, contribution, ended)) return;
  if (layer == nullptr) return Reject(rank, key, UndeclaredLayerError(rank, key), effects);
  if (Replay(rank, contribution, ended, effects)) return;
  auto round = pending_.find(key);
  const DeclarationPtr declaration = DeclarationFor(rank, key, *layer, round);
  if ((declaration->spec.kind == LayerKind::kSum) != (key.phase == Phase::kSum)) {
    return Reject(rank, key, LayerKindError(rank, key), effects);
  }
  if (auto error = CheckArrival(rank, contribution, *layer, round))
    return Reject(rank, key, *std::move(error), effects);
  if (Contradicts(rank, contribution, ended, round)) {
    if (contribution.repeats) return;
    return Reject(rank, key, ChangedReplayError(rank, key, /*restarted=*/false), effects);
  }
  if (round == pending_.end()) round = Begin(key, *layer, now);
  const bool was_idle = round->second.Idle();
  if (!Accept(rank, contribution, declaration, round, now, effects)) return;
  if (was_idle && !round->second.Idle()) NoteWaiter(round, now);
  if (members_[rank].catching_up) NoteStraddling(left_ranks, &round->second);
  auto error = round->second.restored ? std::nullopt : CheckAccepted(rank, contribution, *layer, round);
  if (error.has_value()) {
    Fail(round, *std::move(error), now, effects);
  } else {
    MaybeEnd(round, now, effects);
  }
}

void Rounds::Reject(Rank rank, const RoundKey& key, Error error, Effects& effects) {
  statistics_.rejected.Add(error.reason);
  auto outcome = std::make_shared<RoundOutcome>();
  outcome->key = key;
  outcome->error = std::move(error);
  outcome->refused = true;
  effects.push_back(SendResults{{members_[rank].stream}, {std::move(outcome)}});
}

bool Rounds::IsNeedless(Rank rank, const Contribution& contribution, const EndedRound* ended) const {
  if (!members_[rank].catching_up || ended == nullptr || !ended->restored || ended->Find(rank) == nullptr) return true;
  // A contribution that perhaps nobody needs takes no room from those that somebody waits for.
  const size_t bytes = (contribution.first.size() + contribution.second.size()) * sizeof(double);
  return pending_bytes_ + bytes > limits_.max_pending_bytes / 2 || pending_.size() >= limits_.max_rounds_in_frame;
}

bool Rounds::Replay(Rank rank, const Contribution& contribution, const EndedRound* ended, Effects& effects) {
  const RoundKey& key = contribution.key;
  if (ended == nullptr || ended->restored) return false;
  const Contributor* const before = ended->Find(rank);
  // An outcome that others than contributors know could be taken along by one that leaves, unnoticed.
  const EndedRound* const forward = before == nullptr && key.phase == Phase::kBackward
                                        ? layers_.Get(key.layer).Find(Phase::kForward, key.sequence)
                                        : nullptr;
  // A forward round that has failed here had completed under an earlier master.
  auto stranger = forward != nullptr && !forward->failed ? CheckContributor(rank, key, *forward) : std::nullopt;
  if (stranger.has_value()) {
    Reject(rank, key, *std::move(stranger), effects);
  } else if (before != nullptr && ended->DigestOf(before) != Digest(contribution)) {
    const bool restarted = before->incarnation != Contributor::LowBits(members_[rank].incarnation);
    Reject(rank, key, ChangedReplayError(rank, key, restarted), effects);
  } else if (ended->outcome == nullptr) {
    Reject(rank, key, OutcomeForgotten(key), effects);
  } else {
    ++statistics_.replayed;
    effects.push_back(SendResults{{members_[rank].stream}, {ended->outcome}});
  }
  return true;
}

Error Rounds::OutcomeForgotten(const RoundKey& key) const {
  if (layers_.forgot_for_others()) {
    return OutcomeForgottenError(key, "max_retained_bytes_of_all", limits_.max_retained_bytes_of_all);
  }
  const char* const limit = waits() ? "max_retained_bytes_waiting" : "max_retained_bytes";
  return OutcomeForgottenError(key, limit, layers_.max_retained_bytes());
}

DeclarationPtr Rounds::DeclarationFor(Rank rank, const RoundKey& key, const Layer& layer,
                                      Pending::const_iterator round) const {
  // A backward round has its forward round's size, whatever the layer has become since.
  if (key.phase == Phase::kBackward) {
    if (round != pending_.end()) return round->second.declaration;
    if (const EndedRound* const forward = layer.Find(Phase::kForward, key.sequence)) return forward->declaration;
  }
  if (DeclarationPtr declared = layer.declarations().Of(rank)) return declared;
  return round != pending_.end() ? round->second.declaration : layer.declarations().current();
}

std::optional<Error> Rounds::CheckArrival(Rank rank, const Contribution& contribution, const Layer& layer,
                                          Pending::const_iterator round) const {
  const RoundKey& key = contribution.key;
  const bool known = round != pending_.end() || layer.Find(key.phase, key.sequence) != nullptr;
  if (!known && layer.Expired(key.phase, key.sequence)) {
    if (key.phase == Phase::kBackward && layer.LostAwaited(key.sequence)) {
      return ForwardForgottenError(key, limits_.max_awaited_bytes);
    }
    return RoundTooOldError(key, limits_.retained_rounds);
  }
  if (!known) {
    if (const std::optional<Rank> forgetful = layer.ForgottenBy(key.phase, key.sequence)) {
      return OutcomeUnknownError(key, *forgetful);
    }
  }
  if (key.phase == Phase::kBackward) {
    if (auto error = CheckBackward(rank, key, layer, round)) return error;
  }
  return CheckRoom(rank, contribution, round);
}

std::optional<Error> Rounds::CheckBackward(Rank rank, const RoundKey& key, const Layer& layer,
                                           Pending::const_iterator round) const {
  if (round != pending_.end() && round->second.Expects(rank)) return std::nullopt;
  const EndedRound* const ended = layer.Find(Phase::kBackward, key.sequence);
  if (ended != nullptr && ended->Find(rank) != nullptr) return std::nullopt;
  const EndedRound* const forward = layer.Find(Phase::kForward, key.sequence);
  if (forward == nullptr || forward->failed) return ForwardUnknownError(key, forward != nullptr);
  return CheckContributor(rank, key, *forward);
}

std::optional<Error> Rounds::CheckContributor(Rank rank, const RoundKey& key, const EndedRound& forward) const {
  const Contributor* const contributor = forward.Find(rank);
  if (contributor == nullptr) return NotAContributorError(rank, key, "its forward contribution did not count");
  if (!forward.backward_required) return NotAContributorError(rank, key, "no worker required that round");
  if (contributor->role != BackwardRole::kNone) return std::nullopt;
  return NotAContributorError(rank, key, "it announced BACKWARD_ROLE_NONE in its forward round");
}

std::optional<Error> Rounds::CheckRoom(Rank rank, const Contribution& contribution,
                                       Pending::const_iterator round) const {
  if (round == pending_.end() && !contribution.repeats && size() >= limits_.max_rounds_in_flight) {
    return LimitError(size() + 1, "rounds in flight", "max_rounds_in_flight", limits_.max_rounds_in_flight);
  }
  size_t bytes = pending_bytes_ + (contribution.first.size() + contribution.second.size()) * sizeof(double);
  if (round != pending_.end()) {
    // A repeated or replaced payload does not count twice.
    const auto before = round->second.payloads.find(rank);
    if (before != round->second.payloads.end()) bytes -= before->second.bytes();
  }
  if (bytes <= limits_.max_pending_bytes) return std::nullopt;
  return LimitError(bytes, "bytes of contributions to rounds in flight", "max_pending_bytes",
                    limits_.max_pending_bytes);
}

Rounds::Pending::iterator Rounds::Begin(const RoundKey& key, const Layer& layer, absl::Time now) {
  PendingRound round;
  round.begun = now;
  round.deadline = now + *config_.round_timeout;
  round.alarm = std::min(round.deadline, now + limits_.late_round_after);
  round.needed = members_.world_size();
  if (const EndedRound* const ended = layer.Find(key.phase, key.sequence)) {
    BeginRestored(*ended, &round);
    ++idle_;
  } else if (key.phase == Phase::kBackward) {
    const EndedRound* const forward = layer.Find(Phase::kForward, key.sequence);
    SYNCBN_CHECK(forward != nullptr && !forward->failed, Describe(key));
    for (const Contributor& contributor : *forward->roster) {
      if (contributor.role != BackwardRole::kNone) round.expected.push_back(contributor.rank);
    }
    SYNCBN_CHECK(!round.expected.empty(), Describe(key));
    round.needed = round.expected.size();
    round.count = forward->count;
    round.declaration = forward->declaration;
  }
  alarms_.insert({round.alarm, key});
  const auto [begun, inserted] = pending_.emplace(key, std::move(round));
  SYNCBN_CHECK(inserted, Describe(key));
  return begun;
}

bool Rounds::Accept(Rank rank, const Contribution& contribution, const DeclarationPtr& declaration,
                    Pending::iterator round, absl::Time now, Effects& effects) {
  const Member& member = members_[rank];
  PendingRound& pending = round->second;
  if (pending.restored && !pending.Expects(rank)) {
    AddLatecomer(rank, &pending);
    members_.NoteContribution(rank, round->first, declaration, now, /*fresh=*/false);
    return true;
  }
  const auto before = pending.payloads.find(rank);
  if (before != pending.payloads.end()) {
    if (SameNumbers(before->second, contribution)) {
      before->second.incarnation = member.incarnation;
      before->second.repeats = before->second.repeats && contribution.repeats;
      ++statistics_.repeated;
      members_.NoteContribution(rank, round->first, declaration, now, /*fresh=*/false);
      return true;
    }
    if (pending.restored || before->second.incarnation == member.incarnation) {
      Reject(rank, round->first, ChangedPayloadError(rank, round->first), effects);
      return false;
    }
    const size_t bytes = before->second.bytes();
    SYNCBN_CHECK(bytes <= pending.bytes && pending.bytes <= pending_bytes_, bytes, " of ", pending_bytes_);
    pending.bytes -= bytes;
    pending_bytes_ -= bytes;
    pending.payloads.erase(before);
  } else if (!pending.restored) {
    members_.BeginAwaiting(rank);
  }
  if (pending.payloads.empty() && !pending.restored) pending.declaration = declaration;
  Payload payload;
  payload.incarnation = member.incarnation;
  payload.declaration = declaration;
  payload.arrived = now;
  payload.count = contribution.count;
  payload.backward_role = contribution.backward_role;
  payload.repeats = contribution.repeats;
  payload.first = spare_.Copy(contribution.first);
  payload.second = spare_.Copy(contribution.second);
  pending.bytes += payload.bytes();
  pending_bytes_ += payload.bytes();
  pending.payloads.emplace(rank, std::move(payload));
  pending.last_rank = rank;
  ++statistics_.accepted;
  members_.NoteContribution(rank, round->first, declaration, now, /*fresh=*/true);
  return true;
}

std::optional<Error> Rounds::CheckAccepted(Rank rank, const Contribution& contribution, const Layer& layer,
                                           Pending::const_iterator round) const {
  if (auto conflict = layer.declarations().conflict()) return conflict;
  const DeclarationPtr& mine = round->second.payloads.at(rank).declaration;
  const DeclarationPtr& theirs = round->second.declaration;
  if (mine != theirs) {
    const std::string difference = Difference(mine->spec, theirs->spec);
    if (!difference.empty()) return DeclarationMismatchError(rank, round->first, difference);
  }
  return CheckNumbers(contribution, theirs->spec, rank, limits_);
}

}  // namespace syncbn::core
