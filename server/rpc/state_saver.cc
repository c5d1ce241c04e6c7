#include "server/rpc/state_saver.h"

#include <algorithm>
#include <limits>

namespace syncbn::rpc {

void StateSaver::HandOver(absl::Time now) {
  const core::StateJournal& journal = coordinator_->journal();
  unsaved_since_ = std::min(unsaved_since_, now);
  const absl::Time due = unsaved_since_ + kLongestDelay;
  if (now < due && journal.most_rounds() < kMostUnsavedRounds && !journal.has_ended()) {
    next_turn_ = due;
    return;
  }
  if (!writer_->idle()) {
    next_turn_ = now + kPause;
    return;
  }
  core::StateChanges changes = coordinator_->TakeChanges(max_turn_bytes_);
  if (!changes.empty()) writer_->Write(std::move(changes));
  unsaved_since_ = journal.has_changes() ? unsaved_since_ : absl::InfiniteFuture();
  next_turn_ = journal.has_changes() ? now + kPause : absl::InfiniteFuture();
}

void StateSaver::Finish() {
  if (writer_ == nullptr) return;
  core::StateChanges changes = coordinator_->TakeChanges(std::numeric_limits<size_t>::max());
  if (!changes.empty()) writer_->Write(std::move(changes));
  next_turn_ = absl::InfiniteFuture();
}

}  // namespace syncbn::rpc
