// The rows of the state's tables: groups and layers as columns, each with a checksum.

#ifndef SYNCBN_SERVER_STATE_ROWS_H_
#define SYNCBN_SERVER_STATE_ROWS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/core/state.h"

namespace syncbn::state {

// Names are texts, numbers are SQLite's integers (of 64 bits, which hold unsigned ones), the rest are blobs: messages
// of syncbn.v1, little-endian binary64, and sequences as differences.
struct GroupRow {
  std::string job;
  std::string name;
  uint64_t generation = 0;
  uint64_t run_id = 0;
  uint64_t world_size = 0;
  std::string config;
  uint64_t checksum = 0;
};

struct LayerRow {
  std::string job;
  std::string group;
  std::string name;
  std::string spec;
  uint64_t updates = 0;
  uint64_t newest_sequence = 0;
  std::string recent;
  std::optional<uint64_t> missing_after;
  std::optional<uint64_t> missing_before;
  std::string mean;
  std::string var;
  uint64_t checksum = 0;
};

// Return the checksum of the row's other columns.
uint64_t ChecksumOf(const GroupRow& row);
uint64_t ChecksumOf(const LayerRow& row);

// Return the row, with its checksum.
GroupRow ToRow(const core::GroupState& group);
LayerRow ToRow(const core::GroupId& id, const core::LayerState& layer);

// Return what the row says, without layers.
// Errors: DATA_LOSS, naming the group or layer, if it cannot have been stored so.
absl::StatusOr<core::GroupState> FromRow(const GroupRow& row);
absl::StatusOr<core::LayerState> FromRow(const LayerRow& row);

}  // namespace syncbn::state

#endif  // SYNCBN_SERVER_STATE_ROWS_H_
