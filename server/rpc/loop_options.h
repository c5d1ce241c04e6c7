// The settings that a program gives to a master's loop.

#ifndef SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
#define SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "plumbing/shared_file.h"
#include "server/core/limits.h"
#include "server/core/state.h"
#include "server/core/types.h"
#include "server/rpc/identity.h"
#include "server/state/writer.h"

namespace syncbn::rpc {

class Connections;

// As in MasterServer::Options.
struct LoopOptions {
  core::Limits limits;
  // Must outlive the loop.
  Connections* connections = nullptr;
  size_t max_unread_bytes = 0;
  size_t max_frame_bytes = 0;
  // With whom memory is shared, and where the segments are that workers offer.
  MemorySharing memory_sharing = MemorySharing::kOff;
  std::vector<std::string> memory_directories;
  absl::Duration join_timeout;
  size_t max_watchers = 0;
  std::string description;
  std::string revision;
  // Present: the token that every join must have.
  core::Secret token;
  // Names that a worker's certificate must have; one that fits is enough.
  std::vector<IdentityTemplate> identity;
  bool inspection = true;
  // Present: the token that callers of InspectionService must bear.
  core::Secret inspection_token;
  // Callers of InspectionService that bear it may call, whatever the two options before say.
  core::Secret own_token;
  uint64_t instance = 0;  // As core::Coordinator's.
  // Stores the master's state, and must outlive the loop; null if nothing is stored.
  state::Writer* state_writer = nullptr;
  std::vector<core::GroupState> restored;  // The states that were stored before.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
