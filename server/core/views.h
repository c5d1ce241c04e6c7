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
};

// The most entries that a view shows of a list that may be long.
inline constexpr size_t kMostShownRounds = 100;
inline constexpr size_t kMostShownKeys = 8;

struct MemberView {
  Rank rank = 0;
  MemberState state = MemberState::kAbsent;
  uint64_t incarnation = 0;
  std::string description;
  uint64_t contributions = 0;
  uint64_t last_arrivals = 0;
  absl::Time joined_at;
  std::vector<RoundKey> blocked_on;  // The first kMostShownKeys.
  size_t blocked_on_count = 0;       // Of all.
};

struct PendingRoundView {
  RoundKey key;
  std::vector<Rank> arrived_ranks;  // The first kMostNamedRanks.
  size_t arrived = 0;               // Of all.
  std::vector<Rank> missing_ranks;  // The first kMostNamedRanks.
  size_t missing = 0;               // Of all.
  absl::Duration age;
  absl::Duration time_left;
};

struct GroupView {
  GroupSummary summary;
  GroupConfig config;
  std::vector<MemberView> members;        // By rank.
  std::vector<PendingRoundView> pending;  // The oldest kMostShownRounds, oldest first.
};

struct LayerSummary {
  LayerSpec spec;
  std::optional<uint64_t> newest_sequence;
  uint64_t rounds_completed = 0;
  uint64_t rounds_failed = 0;
  std::optional<Error> conflict;
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
