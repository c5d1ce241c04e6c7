// The rounds that began under an earlier master: what workers report of them, and who may still repeat a contribution.

#include <algorithm>
#include <iterator>
#include <utility>

#include "tests/simulation/model.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;

}  // namespace

bool Model::TakeReport(Rank rank, const core::EndedReport& report) {
  if (!members_[rank].catching_up) return true;
  if (const EndedRound* const ended = history_.FindEnded(report.key)) {
    const core::RoundOutcome& outcome = *ended->outcome;
    if (outcome.error.has_value() || report.error.has_value()) {
      return outcome.error.has_value() == report.error.has_value();
    }
    return outcome.digest == report.digest;
  }
  if (const RestoredRound* const known = history_.FindRestored(report.key)) {
    return !report.error.has_value() && known->report.digest == report.digest;
  }
  const auto pending = pending_.find(report.key);
  if (report.error.has_value()) {
    if (pending != pending_.end()) return true;  // It fails with this error, and is said to end.
    auto outcome = std::make_shared<core::RoundOutcome>();
    outcome->key = report.key;
    outcome->error = report.error;
    history_.End(report.key, {std::move(outcome), {}});
    return true;
  }
  const std::vector<Rank> roster = history_.RosterOf(report);
  if (roster.empty()) {
    history_.NoteForgotten(rank, report.key);
    return true;
  }
  history_.Restore(rank, report, roster);
  completed_.insert(report.key.layer);
  if (pending == pending_.end()) return true;
  Pending& round = pending->second;
  round.restored = true;
  round.expected = roster;
  settled_now_.insert(report.key);
  for (auto part = round.parts.begin(); part != round.parts.end();) {
    if (std::count(roster.begin(), roster.end(), part->first)) {
      ++part;
      continue;
    }
    round.latecomers.insert(part->first);
    part = round.parts.erase(part);
  }
  return true;
}

void Model::TakeRepeat(Rank rank, const Part& part, absl::Time now) {
  const RestoredRound* const restored = history_.FindRestored(part.key);
  if (!members_[rank].catching_up || restored == nullptr) return;
  if (!std::count(restored->roster.begin(), restored->roster.end(), rank)) return;
  if (HasBadNumbers(part.key, *part.numbers)) return;  // The round completed, so it was not with these.
  Pending& round = PendingRestored(part.key, now);
  if (!round.parts.emplace(rank, Hold(rank, part)).second) return;
  round.repeats.insert(rank);
}

Model::Pending& Model::PendingRestored(const RoundKey& key, absl::Time now) {
  const auto [round, begins] = pending_.emplace(key, Pending());
  if (!begins) return round->second;
  round->second.begun = now;
  round->second.restored = true;
  if (key.phase == core::Phase::kBackward) {
    if (const auto forward = history_.FindForward(key)) round->second.forward_count = forward->count;
  }
  round->second.expected = history_.FindRestored(key)->roster;
  return round->second;
}

const Part* Model::RepeatBehind(const core::RoundEnded& ended, const Pending& round, absl::Time now) const {
  const RoundKey& key = ended.outcome->key;
  if (!round.restored || !ended.outcome->error.has_value() || frame_ == nullptr || !sender_.seated) return nullptr;
  const auto repeat = std::find_if(frame_->parts.begin(), frame_->parts.end(), [&key](const Part& part) {
    return part.key == key && part.report != nullptr && !part.report->error.has_value();
  });
  if (repeat == frame_->parts.end() || HasBadNumbers(key, *repeat->numbers)) return nullptr;
  const Rank rank = sender_.rank;
  if (round.repeats.count(rank) != 0) return ended.contributors < round.parts.size() ? &*repeat : nullptr;
  // The sender had asked for the outcome before, perhaps with other numbers: then the report has ended the round if a
  // part was missing that could not come any more.
  const std::vector<Rank> missing = Missing(round);
  const bool by_report = settled_now_.count(key) != 0 && round.parts.count(rank) != 0 &&
                         std::any_of(missing.begin(), missing.end(), [&](Rank r) { return !MayRepeat(r, now); });
  return by_report ? &*repeat : nullptr;
}

void Model::TakeRestored(Rank rank, const Part& part, absl::Time now) {
  if (part.key.phase == core::Phase::kBackward) {
    const auto forward = history_.FindForward(part.key);
    const bool contributes =
        !forward.has_value() || std::count(forward->contributors.begin(), forward->contributors.end(), rank) != 0;
    if (!contributes) return must_answer_.push_back(part.key);
  }
  const RestoredRound& restored = *history_.FindRestored(part.key);
  const bool counts = std::count(restored.roster.begin(), restored.roster.end(), rank) != 0;
  // The round has completed, so these are not the numbers that it completed with.
  if (counts && HasBadNumbers(part.key, *part.numbers)) return must_answer_.push_back(part.key);
  Pending& round = PendingRestored(part.key, now);
  const auto before = round.parts.find(rank);
  const bool repeated = counts && before != round.parts.end();
  // Other numbers than those that it has repeated are refused, and the round waits for nobody.
  if (repeated && !SameNumbers(*before->second.numbers, *part.numbers)) return must_answer_.push_back(part.key);
  if (round.idle()) round.begun = now;
  if (!counts) {
    round.latecomers.insert(rank);
  } else if (repeated) {
    round.repeats.erase(rank);
  } else {
    added_[part.key] = {std::nullopt, round.straddles, round.left};
    round.parts[rank] = Hold(rank, part);
  }
}

void Model::NoteStraddling(Rank rank, Pending* round) const {
  if (!members_.at(rank).catching_up) return;
  round->straddles = true;
  round->left.insert(frame_->left_ranks.begin(), frame_->left_ranks.end());
}

std::vector<Rank> Model::TakenAlong(const Pending& round) const {
  std::vector<Rank> ranks;
  if (!round.straddles) return ranks;
  for (const Rank rank : Missing(round)) {
    const auto member = members_.find(rank);
    if (member == members_.end() || !member->second.left_before) continue;
    if (round.left.count(rank) == 0) ranks.push_back(rank);
  }
  return ranks;
}

bool Model::MayRepeat(Rank rank, absl::Time now) const {
  const bool joins_anew = frame_ != nullptr && frame_->join.has_value() && frame_->join->rank == rank &&
                          AsNew(*frame_->join).incarnation == 0 && WhyRefused(*frame_->join).empty();
  if (joins_anew) return waits();
  const auto member = members_.find(rank);
  if (member == members_.end() || (member->second.incarnation == 0 && !member->second.left)) return true;
  if (member->second.left || Left(rank)) return member->second.left_before && LeaversMayReturn(now);
  // By the policy WAIT it may have taken a predecessor's place, and be at an earlier step.
  return (member->second.catching_up || waits()) && !GivenUp(rank, now);
}

bool Model::LeaversMayReturn(absl::Time now) const {
  return leavers_until_.has_value() && now < *leavers_until_ &&
         std::any_of(members_.begin(), members_.end(), [](const auto& entry) { return entry.second.left_before; });
}

bool Model::EveryoneHasCaughtUp() const {
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    const auto member = members_.find(rank);
    if (member == members_.end()) return false;
    if (member->second.left) continue;
    if (member->second.stream == 0 || member->second.catching_up) return false;
  }
  return true;
}

void Model::DropIdle(std::optional<absl::Time> now) {
  for (auto round = pending_.begin(); round != pending_.end();) {
    const bool due = !now.has_value() || *now >= round->second.begun + *settings_.config.round_timeout;
    round = round->second.idle() && due ? pending_.erase(round) : std::next(round);
  }
}

}  // namespace syncbn::simulation
