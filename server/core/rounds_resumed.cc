// The number at which members go on after a round that lacked some of them: they may have begun unequally many rounds.

#include <algorithm>

#include "absl/strings/string_view.h"
#include "server/core/error.h"
#include "server/core/rounds.h"

namespace syncbn::core {

void Rounds::NoteTold(Rank rank, uint64_t sequence, const Error& error) {
  // A member whose sequences are far beyond the others' is told a lesser number, which is nobody's news.
  if (!error.resume_at.has_value() || *error.resume_at <= sequence) return;
  members_.NoteUsed(rank, *error.resume_at - 1);
  resume_at_ = std::max(resume_at_, *error.resume_at);
}

std::optional<uint64_t> Rounds::ResumeAfter(uint64_t sequence) {
  const std::optional<uint64_t> beyond = members_.BeyondUsed(limits_.max_sequence_jump);
  if (!beyond.has_value()) return std::nullopt;
  // Others may wait at the newest number already, for this round's contributors. A greater one would lead those past
  // them, and them past those, deadline by deadline.
  const bool behind = sequence < resume_at_ && resume_at_ <= *beyond;
  if (!behind) resume_at_ = *beyond;
  return resume_at_;
}

bool Rounds::ShowsDivergence(const Error& error, uint64_t sequence) const {
  const absl::string_view reason = error.reason;
  if (reason != kRoundTimeout && reason != kWorkerLost && reason != kTooFewWorkers) return false;
  if (sequence < resume_at_) return true;
  return std::any_of(error.ranks.begin(), error.ranks.end(), [this](Rank rank) { return members_[rank].awaited != 0; });
}

Error Rounds::WithResumption(Error error, uint64_t sequence) {
  if (ShowsDivergence(error, sequence)) error.resume_at = ResumeAfter(sequence);
  return error;
}

}  // namespace syncbn::core
