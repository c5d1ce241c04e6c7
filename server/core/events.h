// The events that the round engine reacts to.

#ifndef SYNCBN_SERVER_CORE_EVENTS_H_
#define SYNCBN_SERVER_CORE_EVENTS_H_

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "server/core/types.h"

namespace syncbn::core {

// A frame arrived on a stream. The first frame of a stream must have `join`.
struct FrameReceived {
  StreamId stream = 0;
  std::optional<Join> join;
  std::vector<LayerSpec> layers;
  // Rounds that ended under an earlier master. Members that have caught up report none.
  std::vector<EndedReport> ended;
  // The greatest sequence, by layer and phase, that the worker has contributed to and forgotten.
  std::vector<RoundKey> forgotten;
  std::vector<Contribution> contributions;
  // The ranks that had left before the rounds of these contributions ended, repeated ones aside, by the word of a
  // member that catches up.
  std::vector<Rank> left_ranks;
  bool caught_up = false;  // All that it had sent to earlier masters, and still holds, has been sent to this one.
  std::vector<RoundKey> blocked_on;
  std::optional<std::string> leave;  // The reason.
  uint64_t membership_read = 0;  // The version of the newest membership that the worker has read; 0 if it is not told.
};

// A stream broke or was ended by the worker. Ignored for streams that the coordinator has closed.
struct StreamClosed {
  StreamId stream = 0;
};

// The reader of a stream has fallen behind with what it was sent, or has caught up. While any reader of a group lags,
// steps that could complete many rounds at once wait.
struct ReaderLags {
  StreamId stream = 0;
  bool lags = false;
};

// The time named by NextDeadline() has come. Harmless if early.
struct TimePassed {};

// The master shuts down. Every stream is closed with SHUTTING_DOWN, and so is every stream that joins afterwards.
// Rounds in flight get no outcome: their workers resend them to the next master.
struct Shutdown {};

using Event = std::variant<FrameReceived, StreamClosed, ReaderLags, TimePassed, Shutdown>;

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_EVENTS_H_
