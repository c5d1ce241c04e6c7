// The round engine: everything that a master decides, as a function of what has happened.

#ifndef SYNCBN_SERVER_CORE_COORDINATOR_H_
#define SYNCBN_SERVER_CORE_COORDINATOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/effects.h"
#include "server/core/events.h"
#include "server/core/limits.h"
#include "server/core/state.h"
#include "server/core/state_journal.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

class Group;

// Holds the groups of a master: their members, the rounds in flight, and the outcomes of ended rounds. It has no
// thread, lock, clock or socket: the same events at the same times give the same effects, byte for byte.
//
// A contribution is O(channels); a completed round is O(workers * channels); every other event is O(what it touches).
//
// Thread safety: none; the caller serializes.
class Coordinator {
 public:
  // `instance`: a number that no other process has, from which the names of this one's memories are made. 0: they have
  // no names, and workers repeat nothing that they have had an answer to.
  explicit Coordinator(Limits limits = Limits(), uint64_t instance = 0);
  ~Coordinator();
  Coordinator(const Coordinator&) = delete;
  Coordinator& operator=(const Coordinator&) = delete;

  // Handles one event. `now` must not go backwards from one call to the next.
  //
  // Returns the effects, in the order in which they must be carried out. Every bad input has its answer among them.
  Effects On(const Event& event, absl::Time now);

  // Takes what an earlier master has stored, before the first event, and begins to note changes. Its groups are seen in
  // the views at once, and go on when a worker of their run joins: see state_journal.h.
  void Restore(const std::vector<GroupState>& groups, absl::Time now) { journal_.Begin(groups, now); }
  // Returns the changes that are to be stored, if Restore was called.
  const StateJournal& journal() const { return journal_; }
  // Returns changes of `max_bytes` in vectors, or a little more, and forgets them.
  StateChanges TakeChanges(size_t max_bytes);

  // Returns when On(TimePassed) is next due; InfiniteFuture if nothing waits for time to pass.
  absl::Time NextDeadline() const;

  // Returns the size in bytes of the longest result that a round of the group can have, by the layers declared so far;
  // 0 without any.
  size_t LongestResult(const GroupId& id) const;

  // Returns all groups, ordered by job and group name.
  std::vector<GroupSummary> ListGroups() const;
  // Errors: NOT_FOUND, naming the groups (or layers) that exist.
  absl::StatusOr<GroupView> GetGroup(const GroupId& id, absl::Time now, const GroupParts& parts = GroupParts()) const;
  // Returns the group's layers, ordered by name.
  absl::StatusOr<std::vector<LayerSummary>> ListLayers(const GroupId& id) const;
  absl::StatusOr<LayerView> GetLayer(const GroupId& id, absl::string_view layer) const;

  // Aborts unless every counter and index of every group agrees with what it counts. For tests, after each event: it
  // looks at everything that there is.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  struct Slot {
    std::unique_ptr<Group> group;
    absl::Time alarm;     // The group's NextDeadline(), if the group was looked at after its last event;
    size_t retained = 0;  // and its retained_bytes().
    // Peers of the join that began it.
    std::string connection;
    std::string address;
  };
  using Groups = absl::btree_map<GroupId, Slot>;

  void Handle(const FrameReceived& frame, absl::Time now, Effects& effects);
  void Handle(const StreamClosed& closed, absl::Time now, Effects& effects);
  void Handle(const ReaderLags& reader, absl::Time now, Effects& effects);
  void Handle(const TimePassed& passed, absl::Time now, Effects& effects);
  void Handle(const Shutdown& shutdown, absl::Time now, Effects& effects);

  void HandleFirstFrame(const FrameReceived& frame, absl::Time now, Effects& effects);
  // Returns why the join does not belong to its job, whose first join has decided the token.
  std::optional<Error> CheckToken(const Join& join) const;
  // Ends the older generation or the abandoned run of the group that this join names; `ended_run` becomes the run that
  // ends. Returns why the join is refused if it is the outdated one.
  std::optional<Error> EndSuperseded(const Join& join, absl::Time now, uint64_t* ended_run, Effects& effects);
  // Ends the group that has been empty for longest, of all or of those that the join's connection or address has begun,
  // if there is no room for another. Returns why there is none left.
  std::optional<Error> MakeRoom(const Join& join, absl::Time now, Effects& effects);
  // Returns how many groups the connection or address of this name has begun.
  size_t BegunBy(const std::string& name) const;
  // Begins the group of the join.
  Groups::iterator Begin(const Join& join, std::unique_ptr<Group> group);
  // Forgets the group, which has ended or has never had a member.
  void Erase(Groups::iterator slot);
  void EndGroup(Groups::iterator slot, const Error& why, absl::Time now, Effects& effects);

  // Returns the group of a joined stream.
  Groups::iterator SlotOf(StreamId stream, const GroupId& id);
  absl::StatusOr<const Group*> Find(const GroupId& id) const;
  // Keeps `alarms_` and `retained_` in step with the group, which an event has changed.
  void Update(Groups::iterator slot);
  // Keeps what all groups retain within its limit.
  void LimitRetained(absl::Time now, Effects& effects);
  // Returns the group that nobody has been connected to for longest; end() if somebody is to each. Empty names stand
  // for all groups, others for those that such a connection or address has begun.
  Groups::iterator Abandoned(const std::string& connection = "", const std::string& address = "");
  uint64_t NewRunId(absl::Time now);
  // Returns the name of the memory of a new group.
  uint64_t NewMemory();

  const Limits limits_;
  const uint64_t instance_;
  Groups groups_;
  absl::flat_hash_map<StreamId, GroupId> streams_;  // Those that have joined and are open.
  absl::btree_set<std::pair<absl::Time, GroupId>> alarms_;
  size_t retained_ = 0;                                // By all groups.
  absl::flat_hash_map<std::string, size_t> begun_by_;  // Groups, by the name of a connection or address.
  StateJournal journal_;
  uint64_t runs_ = 0;
  uint64_t memories_ = 0;
  bool shutting_down_ = false;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_COORDINATOR_H_
