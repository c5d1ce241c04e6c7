// The effects of an event: what the caller of the round engine is to do, in the order given.

#ifndef SYNCBN_SERVER_CORE_EFFECTS_H_
#define SYNCBN_SERVER_CORE_EFFECTS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "server/core/types.h"

namespace syncbn::core {

// Answers a join. Sent again to every member if the group takes the run of a worker that comes back.
struct SendJoined {
  StreamId stream = 0;
  uint32_t protocol_version = 0;
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  GroupConfig config;  // With every default filled in.
  Membership membership;
  uint64_t memory = 0;                  // Names the memory in which this group is kept.
  std::vector<RoundKey> newest_rounds;  // For a worker that is new: where its group stands.
};

// One frame, the same for all these streams. Outcomes are in the order in which their rounds ended.
struct SendResults {
  std::vector<StreamId> streams;
  std::vector<std::shared_ptr<const RoundOutcome>> outcomes;
};

struct SendLayerError {
  std::vector<StreamId> streams;
  std::string layer;
  Error error;
};

// Sent when the group becomes complete, and at every loss and leave.
struct SendMembership {
  std::vector<StreamId> streams;
  Membership membership;
};

// A round in flight that has waited for Limits::late_round_after. Sent once for each round, to all that have
// contributed by then.
struct LateRound {
  RoundKey key;
  absl::Duration age;  // Since its first contribution.
  // The ranks that it waits for: the first kMostNamedRanks of them, ascending, and their number.
  std::vector<Rank> missing_ranks;
  uint32_t missing = 0;
};

struct SendLateRounds {
  GroupId group;
  std::vector<StreamId> streams;  // Empty if no contributor is connected any more.
  std::vector<LateRound> rounds;
};

// Closes the stream after everything that was sent to it before, with a status if there is an error. The engine sends
// nothing to the stream afterwards and ignores what it still receives from it.
struct CloseStream {
  StreamId stream = 0;
  std::optional<Error> error;
};

// A round has ended. For watchers and metrics; not sent to workers.
struct RoundEnded {
  GroupId group;
  std::shared_ptr<const RoundOutcome> outcome;
  absl::Duration duration;  // Since its first contribution.
  uint32_t contributors = 0;
  Rank last_rank = 0;
};

// The state of a member has changed. For the log; not sent to workers.
struct MemberChanged {
  GroupId group;
  Rank rank = 0;
  StreamId stream = 0;  // By which the member is, or was, connected.
  MemberState state = MemberState::kAbsent;
  bool returned = false;  // It is present, and is the incarnation that the group knows: its stream had broken.
  uint64_t incarnation = 0;
  std::string description;
  uint32_t present = 0;
  uint32_t world_size = 0;
};

// A worker may not join. Its stream's CloseStream follows.
struct JoinRefused {
  GroupId group;
  Rank rank = 0;
  StreamId stream = 0;
  Error error;
};

// A group is gone. Its watchers' calls end.
struct GroupEnded {
  GroupId group;
};

using Effect = std::variant<SendJoined, SendResults, SendLayerError, SendMembership, SendLateRounds, CloseStream,
                            RoundEnded, MemberChanged, JoinRefused, GroupEnded>;
using Effects = std::vector<Effect>;

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_EFFECTS_H_
