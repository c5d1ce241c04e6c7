// The newest rounds of a group, for those who ask afterwards what happened.

#ifndef SYNCBN_SERVER_CORE_FLIGHT_RECORDER_H_
#define SYNCBN_SERVER_CORE_FLIGHT_RECORDER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "server/core/merge.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// Keeps the newest rounds, and the newest that failed beside them, so that a failure outlasts the rounds that follow.
// The memory is bounded by the number of rounds and by bytes; once it is full, recording allocates nothing.
//
// Thread safety: none.
class FlightRecorder {
 public:
  static constexpr size_t kMostRounds = 256;
  static constexpr size_t kMostFailures = 16;
  static constexpr size_t kMostBytes = size_t{64} << 10;

  explicit FlightRecorder(uint32_t world_size);

  // Records a round that ends now. `declaration` is the one that its contributions were made under.
  void Record(const DeclarationPtr& declaration, const Payloads& payloads, absl::Time begun, absl::Time now,
              const std::shared_ptr<const RoundOutcome>& outcome);

  // Returns the rounds, newest first.
  std::vector<RecordedRound> Rounds() const;
  // Returns the rounds that failed, newest first.
  const std::deque<RecordedRound>& failures() const { return failures_; }

  // The rounds that fit.
  size_t capacity() const { return capacity_; }

 private:
  struct Entry {
    DeclarationPtr declaration;  // Has the layer's name.
    uint64_t sequence = 0;
    Phase phase = Phase::kForward;
    const char* reason = "";
    absl::Time begun;
    absl::Duration duration;
  };

  // Returns the round without its arrivals.
  static RecordedRound WithoutArrivals(const Entry& entry);
  // Adds the arrivals, of which the latest are kept.
  static void SetArrivals(std::vector<Arrival> arrivals, RecordedRound* round);
  RecordedRound View(size_t slot) const;

  const uint32_t world_size_;
  const size_t capacity_;
  std::vector<Entry> entries_;      // A ring, once it is full.
  std::vector<uint32_t> arrivals_;  // Microseconds after `begun`: world_size_ for each entry, by rank.
  size_t next_ = 0;
  std::deque<RecordedRound> failures_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_FLIGHT_RECORDER_H_
