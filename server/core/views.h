// Views of the round engine for inspection: the messages of inspection.proto as plain values.

#ifndef SYNCBN_SERVER_CORE_VIEWS_H_
#define SYNCBN_SERVER_CORE_VIEWS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/core/round_statistics.h"
#include "server/core/state.h"
#include "server/core/types.h"

namespace syncbn::core {

struct GroupSummary {
  GroupId id;
  uint64_t generation = 0;
  uint64_t run_id = 0;
  uint32_t world_size = 0;
  uint32_t present = 0;
  size_t layers = 0;
  size_t rounds_in_flight = 0;
  uint64_t rounds_completed = 0;
  uint64_t rounds_failed = 0;
  std::optional<absl::Time> oldest_round;  // When the oldest round in flight began.
};

// The most entries that a view shows of a list that may be long.
inline constexpr size_t kMostShownRounds = 100;
inline constexpr size_t kMostShownKeys = 8;

// A contribution that was accepted.
struct LastContribution {
  RoundKey key;
  absl::Time at;
};

struct MemberView {
  Rank rank = 0;
  MemberState state = MemberState::kAbsent;
  uint64_t incarnation = 0;
  std::string description;
  uint64_t contributions = 0;
  uint64_t last_arrivals = 0;
  absl::Time joined_at;
  std::vector<RoundKey> blocked_on;  // The first kMostShownKeys.
  size_t blocked_on_count = 0;       // All of them.
  std::optional<LastContribution> last_contribution;
  DurationHistogram lateness;  // Behind the first contribution to each completed round.
};

struct PendingRoundView {
  RoundKey key;
  std::vector<Rank> arrived_ranks;  // The first kMostNamedRanks.
  size_t arrived = 0;               // All of them.
  std::vector<Rank> missing_ranks;  // The first kMostNamedRanks.
  size_t missing = 0;               // All of them.
  absl::Duration age;
  absl::Duration time_left;
};

// Time from a round's first contribution to a rank's.
struct Arrival {
  Rank rank = 0;
  absl::Duration after;
};

// A round that has ended.
struct RecordedRound {
  RoundKey key;
  const char* reason = "";  // Its failure's; "" if it completed.
  absl::Time begun;         // When its first contribution came.
  absl::Duration duration;
  std::vector<Arrival> arrivals;  // The latest kMostNamedRanks, latest first.
  size_t arrived = 0;             // All of them.
  std::optional<Error> error;     // Only in the list of failures.
};

// The parts of a GroupView that take long to make in a large group.
struct GroupParts {
  bool members = true;
  bool pending = true;
  bool recent = true;
};

struct GroupView {
  GroupSummary summary;
  GroupConfig config;
  RoundStatistics statistics;
  uint64_t joins = 0;
  ReasonCounts refused_joins;
  uint32_t lost = 0;
  uint32_t left = 0;
  size_t pending_bytes = 0;               // Contributions to rounds in flight.
  size_t retained_bytes = 0;              // Outcomes that are kept for replays.
  std::vector<RecordedRound> recent;      // Newest first.
  std::vector<RecordedRound> failures;    // Newest first.
  std::vector<MemberView> members;        // By rank.
  std::vector<PendingRoundView> pending;  // The oldest kMostShownRounds, oldest first.
};

// Summary of a layer's channels, from the newest batch statistics, or the running ones once those are forgotten.
struct ChannelSummary {
  // A channel is constant if its variance is at most 1e-10 of max(1, mean^2): nothing distinguishes its values. It
  // explodes if a number is not finite, or beyond 1e4 in magnitude, near the end of float16's range, or its square.
  uint32_t constant = 0;
  uint32_t exploding = 0;
  std::vector<uint32_t> constant_channels;   // The first kMostShownKeys.
  std::vector<uint32_t> exploding_channels;  // The first kMostShownKeys.
  double least_var = 0.0;
  double greatest_var = 0.0;
  double greatest_mean = 0.0;  // In magnitude.
};

struct LayerSummary {
  LayerSpec spec;
  std::optional<uint64_t> newest_sequence;
  uint64_t rounds_completed = 0;
  uint64_t rounds_failed = 0;
  std::optional<Error> conflict;
  std::optional<ChannelSummary> channels;  // Absent for sums, and while no result is known.
};

struct RunningStatisticsView {
  std::vector<double> mean;
  std::vector<double> var;
  uint64_t updates = 0;
  std::optional<MissingRounds> missing;  // Rounds that they may lack since a restart of the master.
};

struct LayerView {
  LayerSummary summary;
  std::shared_ptr<const RoundOutcome> batch;  // The newest completed forward round; null before it, and once forgotten.
  RunningStatisticsView running;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_VIEWS_H_
