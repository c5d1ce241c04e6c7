// The round engine: everything that a master decides, as a function of what has happened.

#ifndef SYNCBN_SERVER_CORE_COORDINATOR_H_
#define SYNCBN_SERVER_CORE_COORDINATOR_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/limits.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// ---- What happens ---------------------------------------------------------------------------------------------------

// A frame arrived on a stream. The first frame of a stream must have `join`.
struct FrameReceived {
  StreamId stream = 0;
  std::optional<Join> join;
  std::vector<LayerSpec> layers;
  std::vector<Contribution> contributions;
  std::vector<RoundKey> blocked_on;
  std::optional<std::string> leave;  // The reason.
};

// A stream ended from the worker's side, or broke. Ignored for streams that the coordinator has closed.
struct StreamClosed {
  StreamId stream = 0;
};

// A reader has fallen behind with what it was sent, or has caught up. While one of a group has, what would bring forth
// many results at once waits.
struct ReaderLags {
  StreamId stream = 0;
  bool lags = false;
};

// The time that NextDeadline() named has come. Harmless when early.
struct TimePassed {};

// The master is going away: every stream is closed with SHUTTING_DOWN, and so is every one that joins afterwards.
// Rounds in flight get no outcome: their workers resend them to the master that comes next.
struct Shutdown {};

using Event = std::variant<FrameReceived, StreamClosed, ReaderLags, TimePassed, Shutdown>;

// ---- What is to be done about it, in this order ---------------------------------------------------------------------

struct SendJoined {
  StreamId stream = 0;
  uint32_t protocol_version = 0;
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  GroupConfig config;  // With every default filled in.
  Membership membership;
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

// A round that has waited for Limits::late_round_after. Told once for each round, to all that have contributed by then.
struct LateRound {
  RoundKey key;
  absl::Duration age;  // Since its first contribution.
  // Whom it waits for: the first kMostNamedRanks of them, ascending, and how many they are.
  std::vector<Rank> missing_ranks;
  uint32_t missing = 0;
};

struct SendLateRounds {
  GroupId group;
  std::vector<StreamId> streams;  // May be empty: all contributors have gone meanwhile.
  std::vector<LateRound> rounds;
};

// The stream is to be closed, with a status if there is an error, after what was sent to it before. Nothing is sent to
// it afterwards, and what it still says is ignored.
struct CloseStream {
  StreamId stream = 0;
  std::optional<Error> error;
};

// A round has ended. For watchers and metrics; nothing is to be sent to workers.
struct RoundEnded {
  GroupId group;
  std::shared_ptr<const RoundOutcome> outcome;
  absl::Duration duration;  // Since its first contribution.
  uint32_t contributors = 0;
  Rank last_rank = 0;
};

// A group is gone. Its watchers' calls end.
struct GroupEnded {
  GroupId group;
};

using Effect = std::variant<SendJoined, SendResults, SendLayerError, SendMembership, SendLateRounds, CloseStream,
                            RoundEnded, GroupEnded>;
using Effects = std::vector<Effect>;

// ---- The engine -----------------------------------------------------------------------------------------------------

// Holds the groups of a master: who is in them, which rounds are in flight, what ended rounds brought. It has no
// thread, no lock, no clock and no socket: the same events at the same times give the same effects, byte for byte.
// `now` must not go backwards.
//
// A contribution is O(channels); a completed round is O(workers * channels); every other event is O(what it touches).
//
// Thread safety: none; the caller serializes.
class Coordinator {
 public:
  explicit Coordinator(Limits limits = Limits());
  ~Coordinator();
  Coordinator(const Coordinator&) = delete;
  Coordinator& operator=(const Coordinator&) = delete;

  // Takes note of the event and says what is to be done. Every bad input has its answer among the effects.
  Effects On(const Event& event, absl::Time now);

  // When On(TimePassed) is next due; InfiniteFuture if nothing waits for time to pass.
  absl::Time NextDeadline() const;

  // The bytes of the longest result that a round of the group can have, by the layers that were declared; 0 without
  // any.
  size_t LongestResult(const GroupId& id) const;

  // By job and group name.
  std::vector<GroupSummary> ListGroups() const;
  // Errors: NOT_FOUND, naming the groups (or layers) that there are.
  absl::StatusOr<GroupView> GetGroup(const GroupId& id, absl::Time now) const;
  // By name.
  absl::StatusOr<std::vector<LayerSummary>> ListLayers(const GroupId& id) const;
  absl::StatusOr<LayerView> GetLayer(const GroupId& id, absl::string_view layer) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_COORDINATOR_H_
