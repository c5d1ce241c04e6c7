// The number at which members go on after a round that lacked some of them.

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tests/simulation/model.h"

namespace syncbn::simulation {

using core::Rank;

void Model::NoteSent(const Frame& frame) {
  uint64_t greatest = 0;
  for (const Part& part : frame.parts) greatest = std::max(greatest, part.key.sequence + 1);
  for (const core::RoundKey& key : frame.forgotten) greatest = std::max(greatest, key.sequence + 1);
  for (const Part& part : frame.parts) {
    if (part.report == nullptr || !part.report->error.has_value()) continue;
    const std::optional<uint64_t> told = part.report->error->resume_at;
    if (!told.has_value()) continue;
    reported_.insert(*told);
    greatest = std::max(greatest, *told);
  }
  sent_beyond_ = std::max(sent_beyond_, greatest);
}

bool Model::AllResume() const {
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    // One that joins has its seat before the rounds end that its predecessor has left behind.
    const bool joins = frame_ != nullptr && frame_->join.has_value() && frame_->join->rank == rank;
    if (Left(rank) && !joins) continue;
    const auto member = members_.find(rank);
    if (!settings_.Resumes(rank) || member == members_.end() || member->second.incarnation == 0) return false;
  }
  return true;
}

Model::Shown Model::Divergence(const core::RoundOutcome& outcome) const {
  const uint64_t sequence = outcome.key.sequence;
  if (outcome.error->reason == std::string("DEADLOCK") || sequence < told_beyond_) return Shown::kSurely;
  Shown shown = !reported_.empty() && sequence < *reported_.rbegin() ? Shown::kPerhaps : Shown::kNot;
  for (const auto& [key, pending] : pending_) {
    if (pending.restored || key == outcome.key) continue;
    for (const Rank rank : outcome.error->ranks) {
      if (pending.parts.count(rank) == 0) continue;
      // A contribution of this frame may have come after this end.
      if (added_.count(key) == 0 || rank != sender_.rank) return Shown::kSurely;
      shown = Shown::kPerhaps;
    }
  }
  return shown;
}

void Model::CheckResumption(const core::RoundOutcome& outcome, const Pending& round) {
  const std::string reason = outcome.error->reason;
  const std::optional<uint64_t> told = outcome.error->resume_at;
  const bool lacks =
      reason == "DEADLOCK" || reason == "ROUND_TIMEOUT" || reason == "WORKER_LOST" || reason == "TOO_FEW_WORKERS";
  const Shown shown = lacks ? Divergence(outcome) : Shown::kNot;
  // The sender of a last frame has not left yet when its contributions are handled.
  const bool leaves = frame_ != nullptr && frame_->leave;
  const bool may = shown != Shown::kNot && (AllResume() || leaves);
  const bool must = shown == Shown::kSurely && AllResume() && !leaves;
  if (told.has_value() ? !may : must) {
    return Violate(absl::StrCat(Name(outcome.key), " fails with ", reason, ", and tells ",
                                told.has_value() ? "a number at which to go on" : "none"));
  }
  if (lacks && !told.has_value() && AllResume()) ++tally_.untold;
  if (!told.has_value()) return;
  ++tally_.resumed;
  for (const auto& [key, pending] : pending_) {
    const bool counts = !pending.parts.empty() && (added_.count(key) == 0 || key == outcome.key);
    if (counts && !pending.restored) used_beyond_ = std::max(used_beyond_, key.sequence + 1);
  }
  const bool deadlock = reason == "DEADLOCK";
  const bool again =
      !deadlock && outcome.key.sequence < *told && (*told == told_beyond_ || reported_.count(*told) != 0);
  if (!again && (*told < used_beyond_ || *told > sent_beyond_)) {
    Violate(absl::StrCat(Name(outcome.key), " tells all to go on at ", *told, ", and the greatest sequence is ",
                         used_beyond_ - 1));
  }
  if (deadlock && deadlock_number_.value_or(*told) != *told) {
    Violate(absl::StrCat(Name(outcome.key), " tells another number than a round that ends with it"));
  }
  if (deadlock) deadlock_number_ = told;
  told_beyond_ = *told;
  if (round.parts.empty()) Violate(absl::StrCat(Name(outcome.key), " tells nobody to go on"));
}

}  // namespace syncbn::simulation
