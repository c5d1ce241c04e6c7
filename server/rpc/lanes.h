// The groups' queues of streams that wait: for readers that lag, or for their frames' next slices.

#ifndef SYNCBN_SERVER_RPC_LANES_H_
#define SYNCBN_SERVER_RPC_LANES_H_

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "server/core/types.h"

namespace syncbn::rpc {

// The streams of one group.
struct Lane {
  explicit Lane(core::GroupId group) : id(std::move(group)) {}

  const core::GroupId id;
  size_t streams = 0;
  size_t lagging = 0;                   // Streams with much unread; the others wait for them.
  std::vector<core::StreamId> waiting;  // To be read from, or to have their frames handled.
  std::deque<core::StreamId> backlog;   // Streams whose frames have more slices.
};

// Pure bookkeeping. Thread safety: none.
class Lanes {
 public:
  // A stream joins the group. The lane stays valid until all of its streams have left.
  Lane* Enter(const core::GroupId& id);
  // A stream that does not lag leaves.
  void Leave(Lane* lane);

  // A stream of the lane catches up. Returns the streams that have waited, if it was the last that lagged.
  std::vector<core::StreamId> CatchUp(Lane& lane);

  // A stream's frame has more slices.
  void AddToBacklog(Lane& lane, core::StreamId id);
  bool has_backlog() const { return !turns_.empty(); }
  // Takes the stream whose turn it is from the backlog, which must not be empty. The groups take turns: one slice of
  // each, however many of its streams wait.
  core::StreamId NextTurn();

 private:
  absl::flat_hash_map<core::GroupId, std::unique_ptr<Lane>> lanes_;
  std::deque<Lane*> turns_;  // Lanes with a backlog, each once.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_LANES_H_
