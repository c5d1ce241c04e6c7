#include "client/cc/session/round_log.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "plumbing/check.h"

namespace syncbn::session {
namespace {

// The memory of the objects around an entry's bytes.
constexpr size_t kEntryBytes = 512;

}  // namespace

RoundLog::History& RoundLog::HistoryOf(Layer& layer, const Entry& entry) {
  return layer.phases[static_cast<size_t>(entry->key().phase) - 1];
}

size_t RoundLog::BytesOf(const Entry& entry) { return entry->bytes() + kEntryBytes; }

void RoundLog::Add(const KnownLayer* layer, Entry entry, bool awaited) {
  if (spare_.empty()) spare_.emplace_back();
  const auto node = spare_.begin();
  *node = std::move(entry);
  bytes_ += BytesOf(*node);
  std::unique_ptr<Layer>& slot = layers_[layer];
  if (slot == nullptr) slot = std::make_unique<Layer>();
  // A program may have begun the same round twice, one after the other.
  if (awaited && slot->awaited.emplace((*node)->key().sequence, node).second) {
    awaited_.splice(awaited_.end(), spare_, node);
  } else {
    recent_.splice(recent_.end(), spare_, node);
    AddRecent(*slot, node);
  }
  Trim();
}

void RoundLog::AddRecent(Layer& layer, Entries::iterator entry) {
  History& history = HistoryOf(layer, *entry);
  history.recent.push_back(entry);
  if (history.recent.size() > limits_.rounds) DropOldest(history);
}

void RoundLog::EndAwaiting(const KnownLayer* layer, uint64_t sequence) {
  const auto slot = layers_.find(layer);
  if (slot == layers_.end()) return;
  const auto forward = slot->second->awaited.find(sequence);
  if (forward == slot->second->awaited.end()) return;
  const Entries::iterator entry = forward->second;
  slot->second->awaited.erase(forward);
  recent_.splice(recent_.end(), awaited_, entry);
  AddRecent(*slot->second, entry);
}

void RoundLog::Trim() {
  while (bytes_ > limits_.bytes && recent_.size() + awaited_.size() > 1) {
    if (recent_.empty()) {
      DropOldestAwaited();
      continue;
    }
    // The oldest of all is the oldest of its own layer and phase.
    Layer& layer = *layers_.at(recent_.front()->layer());
    DropOldest(HistoryOf(layer, recent_.front()));
  }
}

void RoundLog::DropOldest(History& history) {
  const Entries::iterator entry = history.recent.front();
  history.recent.erase(history.recent.begin());
  Drop(history, recent_, entry);
}

void RoundLog::DropOldestAwaited() {
  const Entries::iterator entry = awaited_.begin();
  Layer& layer = *layers_.at((*entry)->layer());
  layer.awaited.erase((*entry)->key().sequence);
  Drop(HistoryOf(layer, *entry), awaited_, entry);
}

void RoundLog::Drop(History& history, Entries& from, Entries::iterator entry) {
  const RoundKey& key = (*entry)->key();
  if (!history.forgotten.has_value()) {
    history.forgotten = key;
  } else {
    history.forgotten->sequence = std::max(history.forgotten->sequence, key.sequence);
  }
  SYNCBN_CHECK(bytes_ >= BytesOf(*entry), bytes_);
  bytes_ -= BytesOf(*entry);
  entry->reset();
  spare_.splice(spare_.end(), from, entry);
}

void RoundLog::Clear() {
  layers_.clear();
  recent_.clear();
  awaited_.clear();
  spare_.clear();
  bytes_ = 0;
}

std::vector<RoundKey> RoundLog::Forgotten() const {
  std::vector<RoundKey> forgotten;
  for (const auto& [layer, slot] : layers_) {
    for (const History& history : slot->phases) {
      if (history.forgotten.has_value()) forgotten.push_back(*history.forgotten);
    }
  }
  std::sort(forgotten.begin(), forgotten.end());
  return forgotten;
}

}  // namespace syncbn::session
