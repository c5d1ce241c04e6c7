#include "server/core/flight_recorder.h"

#include <algorithm>
#include <utility>

#include "plumbing/check.h"
#include "server/core/error.h"

namespace syncbn::core {
namespace {

constexpr uint32_t kNotArrived = UINT32_MAX;

uint32_t ToMicroseconds(absl::Duration duration) {
  return static_cast<uint32_t>(std::clamp<int64_t>(absl::ToInt64Microseconds(duration), 0, kNotArrived - 1));
}

}  // namespace

FlightRecorder::FlightRecorder(uint32_t world_size)
    : world_size_(world_size),
      capacity_(std::clamp<size_t>(kMostBytes / (sizeof(Entry) + sizeof(uint32_t) * world_size), 1, kMostRounds)) {}

void FlightRecorder::Record(const DeclarationPtr& declaration, const Payloads& payloads, absl::Time begun,
                            absl::Time now, const std::shared_ptr<const RoundOutcome>& outcome) {
  SYNCBN_CHECK(declaration != nullptr && outcome != nullptr);
  const size_t slot = next_;
  next_ = (next_ + 1) % capacity_;
  if (slot == entries_.size()) {
    entries_.emplace_back();
    arrivals_.resize(arrivals_.size() + world_size_);
  }
  Entry& entry = entries_[slot];
  if (entry.declaration != declaration) entry.declaration = declaration;
  entry.sequence = outcome->key.sequence;
  entry.phase = outcome->key.phase;
  entry.reason = outcome->error.has_value() ? outcome->error->reason : "";
  entry.begun = begun;
  entry.duration = now - begun;
  const auto first = arrivals_.begin() + static_cast<ptrdiff_t>(slot * world_size_);
  std::fill(first, first + world_size_, kNotArrived);
  for (const auto& [rank, payload] : payloads) first[rank] = ToMicroseconds(payload.arrived - begun);
  if (!outcome->error.has_value()) return;
  if (failures_.size() == kMostFailures) failures_.pop_back();
  // The payloads are as many as have come, of a group that may have thousands of ranks.
  std::vector<Arrival> arrivals;
  arrivals.reserve(payloads.size());
  for (const auto& [rank, payload] : payloads) arrivals.push_back({rank, absl::Microseconds(first[rank])});
  failures_.push_front(WithoutArrivals(entry));
  SetArrivals(std::move(arrivals), &failures_.front());
  failures_.front().error = outcome->error;
}

RecordedRound FlightRecorder::WithoutArrivals(const Entry& entry) {
  RecordedRound round;
  round.key = {entry.declaration->spec.name, entry.sequence, entry.phase};
  round.reason = entry.reason;
  round.begun = entry.begun;
  round.duration = entry.duration;
  return round;
}

void FlightRecorder::SetArrivals(std::vector<Arrival> arrivals, RecordedRound* round) {
  round->arrived = arrivals.size();
  // The latest first: they are the ones that the others have waited for.
  const size_t shown = std::min(arrivals.size(), kMostNamedRanks);
  std::partial_sort(
      arrivals.begin(), arrivals.begin() + static_cast<ptrdiff_t>(shown), arrivals.end(),
      [](const Arrival& a, const Arrival& b) { return a.after > b.after || (a.after == b.after && a.rank < b.rank); });
  arrivals.resize(shown);
  round->arrivals = std::move(arrivals);
}

RecordedRound FlightRecorder::View(size_t slot) const {
  RecordedRound round = WithoutArrivals(entries_[slot]);
  std::vector<Arrival> arrivals;
  const uint32_t* const after = &arrivals_[slot * world_size_];
  for (Rank rank = 0; rank < world_size_; ++rank) {
    if (after[rank] != kNotArrived) arrivals.push_back({rank, absl::Microseconds(after[rank])});
  }
  SetArrivals(std::move(arrivals), &round);
  return round;
}

std::vector<RecordedRound> FlightRecorder::Rounds() const {
  std::vector<RecordedRound> rounds;
  rounds.reserve(entries_.size());
  for (size_t i = 1; i <= entries_.size(); ++i) {
    rounds.push_back(View((next_ + entries_.size() - i) % entries_.size()));
  }
  return rounds;
}

}  // namespace syncbn::core
