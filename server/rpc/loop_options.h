// The settings that a program gives to a master's loop.

#ifndef SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
#define SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/core/limits.h"
#include "server/core/state.h"
#include "server/state/writer.h"

namespace syncbn::rpc {

// As in MasterServer::Options.
struct LoopOptions {
  core::Limits limits;
  size_t max_unread_bytes = 0;
  absl::Duration join_timeout;
  size_t max_watchers = 0;
  std::string description;
  // Stores the master's state, and must outlive the loop; null if nothing is stored.
  state::Writer* state_writer = nullptr;
  std::vector<core::GroupState> restored;  // What was stored before.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
