#include "server/core/state_journal.h"

#include <algorithm>
#include <variant>

#include "plumbing/check.h"
#include "server/core/error.h"

namespace syncbn::core {

// ---- Unclaimed groups -----------------------------------------------------------------------------------------------

void StateJournal::Begin(const std::vector<GroupState>& groups, absl::Time now) {
  SYNCBN_CHECK(!begun_);
  begun_ = true;
  unclaimed_until_ = now + limits_.group_linger;
  for (const GroupState& state : groups) {
    Join join;
    join.id = state.id;
    join.world_size = state.world_size;
    join.generation = state.generation;
    auto group = std::make_unique<Group>(join, state.config, state.run_id, /*memory=*/0, limits_, now);
    group->Resume(state.layers);
    const bool added = unclaimed_.emplace(state.id, std::move(group)).second;
    SYNCBN_CHECK(added, "group \"", state.id.group, "\" is stored twice");
  }
}

std::optional<Error> StateJournal::CheckGeneration(const Join& join) {
  const auto stored = unclaimed_.find(join.id);
  if (stored == unclaimed_.end() || join.generation == stored->second->generation()) return std::nullopt;
  if (join.generation < stored->second->generation()) {
    return OutdatedGenerationError(join, stored->second->generation());
  }
  Drop(stored);
  return std::nullopt;
}

std::vector<LayerState> StateJournal::Claim(const GroupId& id, uint64_t run_id) {
  std::vector<LayerState> layers;
  const auto stored = unclaimed_.find(id);
  if (stored == unclaimed_.end() || stored->second->run_id() != run_id) return layers;
  for (const LayerSummary& summary : stored->second->LayerSummaries()) {
    layers.push_back(*stored->second->FindLayer(summary.spec.name)->State());
  }
  unclaimed_.erase(stored);
  return layers;
}

void StateJournal::OnTimePassed(absl::Time now) {
  if (unclaimed_until_ > now) return;
  while (!unclaimed_.empty()) Drop(unclaimed_.begin());
}

void StateJournal::Drop(Unclaimed::iterator group) {
  ended_.push_back(group->first);
  unclaimed_.erase(group);
}

// ---- Changes --------------------------------------------------------------------------------------------------------

void StateJournal::Note(const Effects& effects) {
  for (const Effect& effect : effects) {
    if (const auto* round = std::get_if<RoundEnded>(&effect)) {
      if (round->outcome->error.has_value()) continue;
      // The rest of a stored run would have claimed it by now.
      if (const auto stored = unclaimed_.find(round->group); stored != unclaimed_.end()) Drop(stored);
      if (round->outcome->key.phase == Phase::kForward) NoteRound(round->group, round->outcome->key.layer);
    } else if (const auto* ended = std::get_if<GroupEnded>(&effect)) {
      // The store holds the unclaimed group under this name, and not the one that has ended.
      if (!unclaimed_.contains(ended->group)) ended_.push_back(ended->group);
    }
  }
}

void StateJournal::NoteRound(const GroupId& group, const std::string& layer) {
  uint64_t& rounds = changed_[group][layer];
  if (rounds == 0) order_.emplace_back(group, layer);
  most_rounds_ = std::max(most_rounds_, ++rounds);
}

StateChanges StateJournal::Take(size_t max_bytes, const std::function<const Group*(const GroupId&)>& find) {
  StateChanges changes;
  changes.ended = std::exchange(ended_, {});
  absl::flat_hash_map<GroupId, size_t> taken;  // Groups in `changes`, by their index.
  for (size_t bytes = 0; !order_.empty() && bytes < max_bytes;) {
    const auto [id, name] = std::move(order_.front());
    order_.pop_front();
    const auto changed = changed_.find(id);
    changed->second.erase(name);
    if (changed->second.empty()) changed_.erase(changed);
    // The group may have ended since, and another may have its name.
    const Group* const group = find(id);
    const Layer* const layer = group == nullptr ? nullptr : group->FindLayer(name);
    std::optional<LayerState> state = layer == nullptr ? std::nullopt : layer->State();
    if (!state.has_value()) continue;
    bytes += state->bytes();
    const auto [index, added] = taken.emplace(id, changes.groups.size());
    if (added) changes.groups.push_back(group->State());
    changes.groups[index->second].layers.push_back(*std::move(state));
  }
  most_rounds_ = 0;
  for (const auto& [id, layers] : changed_) {
    for (const auto& [name, rounds] : layers) most_rounds_ = std::max(most_rounds_, rounds);
  }
  return changes;
}

}  // namespace syncbn::core
