// Plain values: the state of its groups that a master stores for the master after it.

#ifndef SYNCBN_SERVER_CORE_STATE_H_
#define SYNCBN_SERVER_CORE_STATE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "server/core/types.h"

namespace syncbn::core {

// Completed forward rounds of a layer that are remembered by their sequences. It must be greater than the number of
// rounds that workers give again to a master that they do not know.
inline constexpr size_t kRecentRounds = 64;

// Forward rounds that running statistics may lack, if there were any: those with sequences between these two.
struct MissingRounds {
  std::optional<uint64_t> after;  // None: all before the other.
  uint64_t before = 0;

  friend bool operator==(const MissingRounds& a, const MissingRounds& b) {
    return a.after == b.after && a.before == b.before;
  }
};

// A layer's running statistics, and the rounds that they include.
struct LayerState {
  LayerSpec spec;  // The newest round's in them.
  uint64_t updates = 0;
  std::vector<double> mean;  // spec.channels elements, as `var`.
  std::vector<double> var;
  uint64_t newest_sequence = 0;
  std::vector<uint64_t> recent;  // Sequences, in the order in which the rounds ended; at most kRecentRounds.
  std::optional<MissingRounds> missing;

  size_t bytes() const { return (mean.size() + var.size()) * sizeof(double) + recent.size() * sizeof(uint64_t); }
};

struct GroupState {
  GroupId id;
  uint64_t generation = 0;
  uint64_t run_id = 0;
  uint32_t world_size = 0;
  GroupConfig config;  // With every default filled in.
  std::vector<LayerState> layers;
};

// Changes since an earlier moment. `ended` comes first: a group may have ended and begun again.
struct StateChanges {
  std::vector<GroupId> ended;
  std::vector<GroupState> groups;  // Each with those layers that have changed.

  bool empty() const { return ended.empty() && groups.empty(); }
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_STATE_H_
