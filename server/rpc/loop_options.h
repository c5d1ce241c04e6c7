// The settings that a program gives to a master's loop.

#ifndef SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
#define SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "server/core/limits.h"

namespace syncbn::rpc {

// As in MasterServer::Options.
struct LoopOptions {
  core::Limits limits;
  size_t max_unread_bytes = 0;
  absl::Duration join_timeout;
  size_t max_watchers = 0;
  std::string description;
  uint64_t instance = 0;  // As core::Coordinator's.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LOOP_OPTIONS_H_
