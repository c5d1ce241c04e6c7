// The end of rounds, those who are told, and the contributions that are refused.

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/simulation/model.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;
using core::StreamId;

// Reasons that are told to the sender alone.
bool IsRefusal(const std::string& reason) {
  return reason == "ROUND_EXPIRED" || reason == "FORWARD_ROUND_UNKNOWN" || reason == "NOT_A_CONTRIBUTOR" ||
         reason == "PAYLOAD_CHANGED" || reason == "LIMIT_EXCEEDED";
}

}  // namespace

void Model::Check(const core::SendLateRounds& late, absl::Time now) {
  for (const core::LateRound& told : late.rounds) {
    const auto found = pending_.find(told.key);
    if (found == pending_.end() || found->second.told_late) {
      return Violate(absl::StrCat(Name(told.key), " is late, and has ended, or has been told"));
    }
    Pending& round = found->second;
    round.told_late = true;
    ++tally_.late;
    std::vector<Rank> missing = Missing(round);
    missing.erase(std::remove_if(missing.begin(), missing.end(), [this](Rank rank) { return Left(rank); }),
                  missing.end());
    std::vector<StreamId> streams;
    for (const auto& [rank, held] : round.parts) {
      if (Present(rank) && round.repeats.count(rank) == 0) streams.push_back(members_[rank].stream);
    }
    for (const Rank rank : round.latecomers) {
      if (Present(rank)) streams.push_back(members_[rank].stream);
    }
    if (told.age != now - round.begun || told.age < SimulatedLimits().late_round_after) {
      Violate(absl::StrCat(Name(told.key), " has waited for ", absl::FormatDuration(now - round.begun), ", not ",
                           absl::FormatDuration(told.age)));
    }
    if (told.missing_ranks != missing || told.missing != missing.size()) {
      Violate(absl::StrCat(Name(told.key), " waits for ranks ", absl::StrJoin(missing, ","), ", not ",
                           absl::StrJoin(told.missing_ranks, ",")));
    }
    // Latecomers are told in the order in which they came, which the model does not keep.
    if (!std::is_permutation(late.streams.begin(), late.streams.end(), streams.begin(), streams.end())) {
      Violate(absl::StrCat(Name(told.key), " is late for streams ", absl::StrJoin(streams, ","), ", not ",
                           absl::StrJoin(late.streams, ",")));
    }
  }
}

void Model::Check(const core::SendResults& results, absl::Time) {
  for (const StreamId stream : results.streams) {
    if (!Open(stream) || !SeatOf(stream).has_value()) {
      return Violate(absl::StrCat("results go to stream ", stream, ", which is closed"));
    }
    readings_[stream].told += results.outcomes.size();
  }
  for (const auto& outcome : results.outcomes) {
    if (outcome->refused && (history_.FindRestored(outcome->key) == nullptr || IsRefusal(outcome->error->reason))) {
      if (results.streams.size() != 1) Violate("a refusal goes to several workers");
      CheckRefusal(results.streams[0], *outcome);
    } else {
      outcomes_.push_back({&results, outcome.get()});
    }
  }
}

// Results that go to the same streams share a frame, so one may come before the news that its round has ended.
void Model::CheckOutcomes() {
  for (const auto& [results, outcome] : outcomes_) {
    if (const auto lost = lost_now_.find(outcome->key); lost != lost_now_.end()) {
      if (!testing::SameOutcome(*lost->second, *outcome)) Violate("a lost outcome is told in another way");
      for (const StreamId stream : results->streams) told_.insert({stream, outcome->key});
      continue;
    }
    const EndedRound* const ended = history_.FindEnded(outcome->key);
    if (ended == nullptr || !testing::SameOutcome(*ended->outcome, *outcome)) {
      return Violate(absl::StrCat("an outcome of ", Name(outcome->key), " that is not the one it ended with"));
    }
    if (ended_now_.count(outcome->key) == 0) {
      ++tally_.replayed;
      const auto forward = history_.FindForward(outcome->key);
      const bool takes_part = outcome->key.phase != core::Phase::kBackward || !forward.has_value() ||
                              std::count(forward->contributors.begin(), forward->contributors.end(), sender_.rank) != 0;
      if (!takes_part) {
        return Violate(
            absl::StrCat(Name(outcome->key), " is told to rank ", sender_.rank, ", which takes no part in it"));
      }
    }
    for (const StreamId stream : results->streams) told_.insert({stream, outcome->key});
  }
}

void Model::CheckRefusal(StreamId stream, const core::RoundOutcome& outcome) {
  const std::string reason = outcome.error->reason;
  ++tally_.refused[reason];
  const Part* sent = nullptr;
  if (frame_ != nullptr && stream == sender_.stream) {
    for (const Part& part : frame_->parts) {
      if (part.key == outcome.key) sent = &part;
    }
  }
  if (sent == nullptr) return Violate(absl::StrCat(reason, " of ", Name(outcome.key), " for one who has not sent it"));
  if (const auto added = added_.find(outcome.key); added != added_.end()) {
    const auto round = pending_.find(outcome.key);
    if (round == pending_.end()) {
      // The frame's declarations had ended the round before its contribution came.
      const std::optional<Held>& replaced = added->second.replaced;
      EndedRound* const ended = history_.FindEnded(outcome.key);
      if (!replaced.has_value() || ended == nullptr) {
        return Violate(absl::StrCat(reason, " of ", Name(outcome.key), " after its end"));
      }
      ended->parts[sender_.rank] = *replaced;
    } else {
      round->second.parts.erase(sender_.rank);
      round->second.straddles = added->second.straddled;
      round->second.left = std::move(added->second.left);
      if (round->second.parts.empty()) pending_.erase(round);
    }
    added_.erase(added);
  }
  told_.insert({stream, outcome.key});
  if (!RefusalIsDue(sender_.rank, *sent, reason)) {
    Violate(absl::StrCat(reason, " of ", Name(outcome.key), " for rank ", sender_.rank, " is not due"));
  }
}

bool Model::RefusalIsDue(Rank rank, const Part& part, const std::string& reason) const {
  if (reason == "OUTCOME_LOST") return history_.MayBeForgotten(part.key);
  if (reason == "PAYLOAD_CHANGED") {
    if (history_.FindRestored(part.key) != nullptr && HasBadNumbers(part.key, *part.numbers)) return true;
    const EndedRound* const ended = history_.FindEnded(part.key);
    const auto round = pending_.find(part.key);
    if (ended == nullptr && round == pending_.end()) return false;
    const HeldParts& parts = ended != nullptr ? ended->parts : round->second.parts;
    const auto before = parts.find(rank);
    return before != parts.end() && !SameNumbers(*before->second.numbers, *part.numbers);
  }
  if (part.key.phase != core::Phase::kBackward) return false;
  const auto forward = history_.FindForward(part.key);
  if (reason == "FORWARD_ROUND_UNKNOWN") return !forward.has_value();
  if (reason != "NOT_A_CONTRIBUTOR" || !forward.has_value()) return false;
  return !std::count(forward->contributors.begin(), forward->contributors.end(), rank) || !forward->backward_required;
}

void Model::Check(const core::RoundEnded& ended, absl::Time now) {
  const core::RoundOutcome& outcome = *ended.outcome;
  const auto found = pending_.find(outcome.key);
  if (found == pending_.end()) {
    return Violate(
        absl::StrCat(Name(outcome.key), history_.FindEnded(outcome.key) != nullptr ? " ends twice" : " has not begun"));
  }
  Pending& round = found->second;
  // A frame's declarations count before its contributions, which then come to a round that they have ended.
  const bool disputed = outcome.error.has_value() && outcome.error->reason == std::string("LAYER_SPEC_MISMATCH");
  if (disputed && ended.contributors + 1 == round.parts.size() && added_.erase(outcome.key) != 0) {
    round.parts.erase(sender_.rank);
    must_answer_.push_back(outcome.key);
  }
  if (ended.contributors != round.parts.size() && !round.restored)
    Violate(absl::StrCat(Name(outcome.key), " miscounts contributors"));
  const bool miscounted = ended.duration != now - round.begun && !round.restored;
  if (miscounted || ended.duration > *settings_.config.round_timeout) {
    Violate(absl::StrCat(Name(outcome.key), " lasted ", absl::FormatDuration(now - round.begun)));
  }
  if (outcome.error.has_value()) {
    ++tally_.failed[outcome.error->reason];
    CheckFailure(outcome, round, now);
  } else {
    ++tally_.completed;
    ++completions_;
    used_beyond_ = std::max(used_beyond_, outcome.key.sequence + 1);
    if (round.restored && !round.idle()) ++tally_.restored;
    completed_.insert(outcome.key.layer);
    if (outcome.key.sequence >= settings_.redeclared_at.value_or(UINT64_MAX)) ++tally_.redeclared;
    CheckCompletion(outcome, round, now);
  }
  for (const auto& [rank, held] : round.parts) {
    if (Present(rank) && round.repeats.count(rank) == 0) to_tell_.push_back({members_[rank].stream, outcome.key});
  }
  for (const Rank rank : round.latecomers) {
    if (Present(rank)) to_tell_.push_back({members_[rank].stream, outcome.key});
  }
  if (round.restored && outcome.error.has_value()) {
    lost_now_[outcome.key] = ended.outcome.get();
    if (!outcome.refused) Violate(absl::StrCat(Name(outcome.key), " ends again in another way"));
  } else {
    ended_now_.insert(outcome.key);
    history_.End(outcome.key, {ended.outcome, round.parts});
  }
  const Part* const repeat = RepeatBehind(ended, round, now);
  pending_.erase(found);
  if (repeat == nullptr) return;
  Pending& again = PendingRestored(outcome.key, now);
  again.parts.emplace(sender_.rank, Hold(sender_.rank, *repeat));
  again.repeats.insert(sender_.rank);
}

void Model::CheckFailure(const core::RoundOutcome& outcome, const Pending& round, absl::Time now) {
  // A member has said that it had failed with this error.
  const bool reported =
      frame_ != nullptr && std::any_of(frame_->parts.begin(), frame_->parts.end(), [&](const Part& p) {
        return p.key == outcome.key && p.report != nullptr && p.report->error.has_value();
      });
  if (!reported && !round.restored) CheckResumption(outcome, round);
  if (reported || FailureIsDue(outcome, round, now)) return;
  Violate(absl::StrCat(Name(outcome.key), " fails with ", outcome.error->reason, " (ranks ",
                       absl::StrJoin(outcome.error->ranks, ","), "), which is not due"));
}

bool Model::FailureIsDue(const core::RoundOutcome& outcome, const Pending& round, absl::Time now) {
  const core::Error& error = *outcome.error;
  const std::string reason = error.reason;
  const std::vector<Rank> missing = Missing(round);
  std::vector<Rank> awaited;
  std::vector<Rank> lost;
  for (const Rank rank : missing) {
    if (Left(rank)) continue;
    awaited.push_back(rank);
    if (GivenUp(rank, now)) lost.push_back(rank);
  }
  const bool late = now >= round.begun + *settings_.config.round_timeout;
  if (reason == "OUTCOME_LOST") return LossIsDue(outcome, round, late || lost.size() == awaited.size(), now);
  if (reason == "ROUND_TIMEOUT") return !proceeds() && late && error.ranks == awaited;
  if (reason == "TOO_FEW_WORKERS") {
    const size_t possible = round.parts.size() + (late ? 0 : awaited.size() - lost.size());
    return proceeds() && possible < Least(round);
  }
  if (reason == "WORKER_LOST") {
    const bool restart = frame_ != nullptr && frame_->join.has_value();
    const std::vector<Rank> reborn = {restart ? frame_->join->rank : settings_.world_size};
    const bool replaced =
        !waits() && error.ranks == reborn && std::count(missing.begin(), missing.end(), reborn[0]) != 0;
    return !proceeds() && !error.ranks.empty() && (error.ranks == lost || replaced);
  }
  if (reason == "LAYER_SET_MISMATCH") {
    const bool refused = error.ranks.size() == 1 && refused_.count(error.ranks[0]) != 0;
    return !proceeds() && refused && std::count(awaited.begin(), awaited.end(), error.ranks[0]) != 0;
  }
  if (reason == "LAYER_SPEC_MISMATCH") return MayDisagree(outcome.key.layer);
  if (reason == "DEADLOCK") {
    deadlock_now_ = deadlock_now_ || Deadlocked();
    return deadlock_now_ && error.ranks == missing;
  }
  if (reason == "NOT_FINITE" || reason == "INVALID_CONTRIBUTION") {
    const auto part = error.ranks.size() == 1 ? round.parts.find(error.ranks[0]) : round.parts.end();
    return part != round.parts.end() && HasBadNumbers(outcome.key, *part->second.numbers);
  }
  if (reason != "GROUP_ENDED") return false;
  return std::none_of(members_.begin(), members_.end(), [](const auto& entry) { return entry.second.stream != 0; });
}

bool Model::LossIsDue(const core::RoundOutcome& outcome, const Pending& round, bool over, absl::Time now) {
  deadlock_now_ = deadlock_now_ || Deadlocked();
  const std::vector<Rank>& ranks = outcome.error->ranks;
  // Some change their numbers, or give others than their predecessors. CheckOutcome of the world knows where none does.
  if (ranks.empty()) return round.restored;
  if (ranks.size() == 1 && history_.MayHaveForgotten(ranks[0], outcome.key)) return true;
  if (!round.restored && (!over || ranks != TakenAlong(round))) return false;
  const bool late = now >= round.begun + *settings_.config.round_timeout;
  return late || deadlock_now_ ||
         std::none_of(ranks.begin(), ranks.end(), [&](Rank rank) { return MayRepeat(rank, now); });
}

void Model::CheckCompletion(const core::RoundOutcome& outcome, const Pending& round, absl::Time now) {
  const std::vector<Rank> missing = Missing(round);
  if (round.restored) {
    const core::EndedReport& report = history_.FindRestored(outcome.key)->report;
    if (outcome.digest != report.digest || outcome.missing_ranks != report.missing_ranks) {
      Violate(absl::StrCat(Name(outcome.key), " completes otherwise than under the master before"));
    }
    if (!missing.empty()) return;  // The books do not have what was dropped.
  } else if (outcome.missing_ranks != missing) {
    Violate(absl::StrCat(Name(outcome.key), " names the wrong missing ranks"));
  }
  const bool late = now >= round.begun + *settings_.config.round_timeout;
  for (const Rank rank : missing) {
    if (Left(rank) || (proceeds() && (late || GivenUp(rank, now)))) continue;
    Violate(absl::StrCat(Name(outcome.key), " completes without rank ", rank));
  }
  for (const Rank rank : missing) {
    if (round.restored || !history_.MayHaveForgotten(rank, outcome.key)) continue;
    Violate(absl::StrCat(Name(outcome.key), " completes without rank ", rank, ", which may have forgotten its end"));
  }
  if (!round.restored && !TakenAlong(round).empty()) {
    Violate(absl::StrCat(Name(outcome.key), " completes without ranks that may have contributed before"));
  }
  if (proceeds() && !round.restored && round.parts.size() < Least(round))
    Violate(absl::StrCat(Name(outcome.key), " has too few workers"));
  if (!missing.empty()) ++tally_.partial;
  if (round.straddles && !round.restored &&
      std::any_of(missing.begin(), missing.end(), [this](Rank rank) { return members_[rank].left_before; })) {
    ++tally_.outlived;
  }
  bool required = false;
  for (const auto& [rank, held] : round.parts) {
    if (HasBadNumbers(outcome.key, *held.numbers)) {
      return Violate(absl::StrCat(Name(outcome.key), " completes with bad numbers"));
    }
    required = required || held.numbers->role == core::BackwardRole::kRequired;
  }
  if (outcome.key.phase == core::Phase::kForward && outcome.backward_required != required) {
    Violate(absl::StrCat(Name(outcome.key), " is wrong about its backward round"));
  }
  const core::LayerSpec& spec = settings_.LayerOf(outcome.key);
  const Merged merged = Merge(outcome.key, spec.channels, round.parts, round.forward_count);
  if (const std::string wrong = CompareNumbers(outcome, merged); !wrong.empty()) Violate(wrong);
  if (outcome.key.phase != core::Phase::kForward) return;
  const bool later = outcome.key.sequence >= settings_.redeclared_at.value_or(UINT64_MAX);
  running_[outcome.key.layer].Add(merged, spec, later);
}

size_t Model::InFlight() const {
  return static_cast<size_t>(
      std::count_if(pending_.begin(), pending_.end(), [](const auto& round) { return !round.second.idle(); }));
}

bool Model::Blocked(Rank rank) const {
  const std::vector<RoundKey>& keys = members_.at(rank).blocked_on;
  return !keys.empty() && std::all_of(keys.begin(), keys.end(), [&](const RoundKey& key) {
    const auto round = pending_.find(key);
    if (round == pending_.end()) return false;
    const bool awaits = round->second.parts.count(rank) != 0 && round->second.repeats.count(rank) == 0;
    return awaits || round->second.latecomers.count(rank) != 0;
  });
}

bool Model::Deadlocked() const {
  if (LeaversMayReturn(now_)) return false;
  size_t blocked = 0;
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    if (Left(rank)) continue;
    if (!Present(rank) || !Blocked(rank) || members_.at(rank).catching_up) return false;
    ++blocked;
  }
  return blocked != 0;
}

size_t Model::Least(const Pending& round) const {
  return proceeds() ? std::min<size_t>(settings_.config.min_workers, round.expected.size()) : 0;
}

std::vector<Rank> Model::Missing(const Pending& round) const {
  std::vector<Rank> missing;
  missing.reserve(round.expected.size() - std::min(round.expected.size(), round.parts.size()));
  for (const Rank rank : round.expected) {
    if (round.parts.count(rank) == 0) missing.push_back(rank);
  }
  return missing;
}

}  // namespace syncbn::simulation
