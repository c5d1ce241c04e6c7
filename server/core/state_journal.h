// Bookkeeping of the state that outlives a master: changes since the last look, and groups of an earlier master.

#ifndef SYNCBN_SERVER_CORE_STATE_JOURNAL_H_
#define SYNCBN_SERVER_CORE_STATE_JOURNAL_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "server/core/effects.h"
#include "server/core/group.h"
#include "server/core/limits.h"
#include "server/core/state.h"
#include "server/core/types.h"

namespace syncbn::core {

// A group of an earlier master is *unclaimed* until a worker of its run joins; then the new master's group goes on with
// it. It is dropped when
//
//   - a group of the same name completes a round in another run: its workers have begun anew,
//   - a worker joins with a greater generation,
//   - nobody has claimed it for Limits::group_linger, as for a group without a stream.
//
// Thread safety: none; pure.
class StateJournal {
 public:
  // `limits` must outlive this object.
  explicit StateJournal(const Limits& limits) : limits_(limits) {}

  // Begins to note changes, and takes the groups of an earlier master.
  void Begin(const std::vector<GroupState>& groups, absl::Time now);
  // Returns whether changes are noted. Without, all else costs nothing.
  bool begun() const { return begun_; }

  // ---- Unclaimed groups
  using Unclaimed = absl::btree_map<GroupId, std::unique_ptr<Group>>;
  const Unclaimed& unclaimed() const { return unclaimed_; }
  // Returns why a join is refused that is older than an unclaimed group, and drops a group that is older than the join.
  std::optional<Error> CheckGeneration(const Join& join);
  // Returns the layers of the unclaimed group of this name and run, and forgets it; nothing if there is none.
  std::vector<LayerState> Claim(const GroupId& id, uint64_t run_id);
  // Drops the groups that nobody has claimed in time.
  void OnTimePassed(absl::Time now);
  // Returns when OnTimePassed is next due.
  absl::Time NextDeadline() const { return unclaimed_.empty() ? absl::InfiniteFuture() : unclaimed_until_; }

  // ---- Changes
  // Notes what the effects of an event tell: completed forward rounds, and groups that have ended.
  void Note(const Effects& effects);
  bool has_changes() const { return !ended_.empty() || !order_.empty(); }
  // Returns whether a group has ended and the store still has it.
  bool has_ended() const { return !ended_.empty(); }
  // Returns the greatest number of completed forward rounds of a layer among the changes.
  uint64_t most_rounds() const { return most_rounds_; }
  // Returns changes, those of layers that changed first before others, until their vectors have `max_bytes`; at least
  // one layer. The rest stays. `find` returns the group of a name, or null.
  StateChanges Take(size_t max_bytes, const std::function<const Group*(const GroupId&)>& find);

 private:
  using Rounds = absl::flat_hash_map<std::string, uint64_t>;  // By layer.

  void Drop(Unclaimed::iterator group);
  void NoteRound(const GroupId& group, const std::string& layer);

  const Limits& limits_;
  bool begun_ = false;
  Unclaimed unclaimed_;
  absl::Time unclaimed_until_;
  std::vector<GroupId> ended_;
  absl::flat_hash_map<GroupId, Rounds> changed_;
  std::deque<std::pair<GroupId, std::string>> order_;  // The layers of `changed_`, by their first change.
  uint64_t most_rounds_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_STATE_JOURNAL_H_
