#include "tests/simulation/history.h"

#include <algorithm>
#include <utility>

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;

bool Has(const std::vector<Rank>& ranks, Rank rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

}  // namespace

EndedRound* History::FindEnded(const RoundKey& key) {
  const auto found = ended_.find(key);
  return found == ended_.end() ? nullptr : &found->second;
}

const EndedRound* History::FindEnded(const RoundKey& key) const {
  const auto found = ended_.find(key);
  return found == ended_.end() ? nullptr : &found->second;
}

const RestoredRound* History::FindRestored(const RoundKey& key) const {
  const auto found = restored_.find(key);
  return found == restored_.end() ? nullptr : &found->second;
}

std::optional<ForwardRound> History::FindForward(const RoundKey& key) const {
  const RoundKey forward{key.layer, key.sequence, core::Phase::kForward};
  ForwardRound found;
  if (const RestoredRound* const restored = FindRestored(forward)) {
    for (const Rank rank : restored->roster) {
      if (!Has(restored->report.abstaining_ranks, rank)) found.contributors.push_back(rank);
    }
    found.count = restored->report.count;
    found.backward_required = restored->report.backward_required;
    return found;
  }
  const EndedRound* const ended = FindEnded(forward);
  if (ended == nullptr || ended->outcome->error.has_value()) return std::nullopt;
  for (const auto& [rank, held] : ended->parts) {
    if (held.numbers->role != core::BackwardRole::kNone) found.contributors.push_back(rank);
  }
  found.count = ended->outcome->count;
  found.backward_required = ended->outcome->backward_required;
  return found;
}

std::vector<Rank> History::RosterOf(const core::EndedReport& report) const {
  std::vector<Rank> expected;
  if (report.key.phase == core::Phase::kBackward) {
    const auto forward = FindForward(report.key);
    if (!forward.has_value()) return {};
    expected = forward->contributors;
  } else {
    for (Rank rank = 0; rank < world_size_; ++rank) expected.push_back(rank);
  }
  std::vector<Rank> roster;
  for (const Rank rank : expected) {
    if (!Has(report.missing_ranks, rank)) roster.push_back(rank);
  }
  return roster;
}

std::vector<RoundKey> History::NewestRounds() const {
  std::map<std::pair<std::string, core::Phase>, uint64_t> newest;
  const auto note = [&newest](const RoundKey& key) {
    uint64_t& sequence = newest.emplace(std::make_pair(key.layer, key.phase), key.sequence).first->second;
    sequence = std::max(sequence, key.sequence);
  };
  for (const auto& [key, ended] : ended_) {
    if (!ended.outcome->error.has_value()) note(key);
  }
  for (const auto& [key, restored] : restored_) note(key);
  std::vector<RoundKey> rounds;
  for (const auto& [of, sequence] : newest) rounds.push_back({of.first, sequence, of.second});
  return rounds;
}

void History::End(const RoundKey& key, EndedRound round) {
  ended_[key] = std::move(round);
  restored_.erase(key);
}

void History::Restore(Rank rank, const core::EndedReport& report, std::vector<Rank> roster) {
  restored_[report.key] = {report, std::move(roster)};
  if (report.key.phase == core::Phase::kForward) holders_[report.key].insert(rank);
}

void History::NoteHolder(Rank rank, const RoundKey& key) {
  const auto holders = holders_.find(key);
  if (holders != holders_.end()) holders->second.insert(rank);
}

void History::NoteForgotten(Rank rank, const RoundKey& key) {
  uint64_t& greatest = forgotten_[{key.layer, key.phase}][rank];
  greatest = std::max(greatest, key.sequence);
}

bool History::MayHaveForgotten(Rank rank, const RoundKey& key) const {
  const auto forgotten = forgotten_.find({key.layer, key.phase});
  if (forgotten == forgotten_.end()) return false;
  const auto greatest = forgotten->second.find(rank);
  if (greatest == forgotten->second.end() || key.sequence > greatest->second) return false;
  if (key.phase != core::Phase::kBackward) return true;
  const auto holders = holders_.find({key.layer, key.sequence, core::Phase::kForward});
  if (holders == holders_.end() || holders->second.count(rank) != 0) return false;
  const auto forward = FindForward(key);
  return forward.has_value() && Has(forward->contributors, rank);
}

bool History::MayBeForgotten(const RoundKey& key) const {
  for (Rank rank = 0; rank < world_size_; ++rank) {
    if (MayHaveForgotten(rank, key)) return true;
  }
  return false;
}

}  // namespace syncbn::simulation
