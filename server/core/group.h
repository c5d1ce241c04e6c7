// One group: its members, their layers and their rounds, joined.

#ifndef SYNCBN_SERVER_CORE_GROUP_H_
#define SYNCBN_SERVER_CORE_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/departures.h"
#include "server/core/effects.h"
#include "server/core/events.h"
#include "server/core/layers.h"
#include "server/core/limits.h"
#include "server/core/members.h"
#include "server/core/rounds.h"
#include "server/core/state.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// Writes the config with every default filled in to `filled`. Returns why the config cannot be used; nothing if it can.
std::optional<Error> FillConfig(const GroupConfig& config, uint32_t world_size, const Limits& limits,
                                GroupConfig& filled);

// Carries what happens to one part of the group to the others: Members knows nothing of layers and rounds, Layers
// nothing of members and rounds, and Rounds reads both.
//
// The coordinator ensures that joins name this group and its generation, and that streams belong to it. Methods append
// what is to be done to `effects`.
//
// Thread safety: none; pure.
class Group {
 public:
  // A join that names a run resumes it. `memory` is told to the members: see SendJoined. `limits` must outlive this
  // object.
  Group(const Join& join, const GroupConfig& filled, uint64_t run_id, uint64_t memory, const Limits& limits,
        absl::Time now);
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  const GroupId& id() const { return id_; }
  uint64_t generation() const { return generation_; }
  uint64_t run_id() const { return run_id_; }
  // Returns the token of the first join, and so of every member.
  const Secret& token() const { return token_; }
  uint32_t present() const { return members_.present(); }
  bool empty() const { return members_.present() == 0; }
  // Returns whether successors may still come of members that are lost, or that died with an earlier master and have
  // not been here. They take their places in the run.
  bool AwaitsSuccessors() const {
    return waits() && (members_.in_grace() != 0 || (resumed_ && members_.absent() != 0));
  }

  // The group of this name has been in another run, which is over; 0 if it has not.
  void NoteOver(uint64_t run_id) { over_run_id_ = run_id; }

  // Admits the worker. Returns why it is refused; nothing if it is admitted.
  std::optional<Error> OnJoin(StreamId stream, const Join& asked, const GroupConfig& filled, absl::Time now,
                              Effects& effects);
  // Handles a member's frame, except for its join.
  void OnFrame(StreamId stream, const FrameReceived& frame, absl::Time now, Effects& effects);
  void OnStreamClosed(StreamId stream, absl::Time now, Effects& effects);
  void OnReaderLags(StreamId stream, bool lags);
  // Takes one turn of the work that is due: see Limits::max_turn_bytes.
  void OnTimePassed(absl::Time now, Effects& effects);
  // Ends the group: every round fails with GROUP_ENDED, and every stream is closed with `why`.
  void End(const Error& why, absl::Time now, Effects& effects);
  // Closes every stream with `why`, and leaves the rounds to the next master, and the leaves that are not acknowledged.
  void ShutDown(const Error& why, Effects& effects);

  // Returns when OnTimePassed is next due.
  absl::Time NextDeadline() const;
  // Returns when the group, which is empty, is to be dropped; InfiniteFuture while a member is present.
  absl::Time linger_until() const { return linger_until_; }

  // Returns the size in bytes of the longest result that a round of the layers declared so far can have.
  size_t longest_result() const { return layers_.longest_result(); }

  // The bytes of ended rounds that are kept.
  size_t retained_bytes() const { return layers_.retained_bytes(); }
  // Forgets the oldest outcomes, so many bytes of them if there are. Returns how many.
  size_t ForgetOldestOutcomes(size_t bytes) { return layers_.ForgetOldestOutcomes(bytes); }
  // Returns how many streams are open: those of the present members, and of members that leave.
  size_t streams() const { return members_.present() + departures_.size(); }
  bool Owns(StreamId stream) const { return members_.RankOf(stream).has_value() || departures_.Contains(stream); }

  GroupSummary Summary() const;
  GroupView View(absl::Time now, const GroupParts& parts) const;
  std::vector<MemberView> MemberViews() const;
  std::vector<LayerSummary> LayerSummaries() const { return layers_.Summaries(); }
  // Returns null if no member has declared a layer of that name.
  const Layer* FindLayer(absl::string_view name) const { return layers_.Find(name); }

  // Returns what is to be stored of the group, without layers.
  GroupState State() const;
  // Goes on with the run of an earlier master, and with the layers that it has stored. No round may have completed
  // here.
  void Resume(const std::vector<LayerState>& stored) {
    continues_ = continues_ || !stored.empty();  // Layers are stored once a round of theirs has completed.
    layers_.Resume(stored);
  }

  // Aborts unless every counter and index of the group agrees with what it counts.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  // Returns whether a round may have ended in the group's run. Otherwise the run of a worker that comes back is as
  // good, and better if a round has ended in that.
  bool HasHistory() const { return continues_ || rounds_.completed() != 0; }
  // Takes another run than the group was in. Its members have incarnations of that run from now on.
  void AdoptRun(uint64_t run_id, absl::Time now, Effects& effects);
  void SendJoinedTo(Rank rank, Effects& effects) const;
  bool waits() const { return config_.missing_policy == MissingPolicy::kWait; }
  // Takes the word of a worker that comes back for ranks that have left. Returns whether there were any.
  bool AdoptLeft(const Join& join, absl::Time now);
  // Returns why the join does not fit the group's run and config, or may not have its rank.
  std::optional<Error> CheckJoin(const Join& join, const GroupConfig& filled) const;
  // Returns whether the join begins a new life of the rank.
  bool Seat(StreamId stream, const Join& join, absl::Time now, Effects& effects);
  // Handles a join that was refused because its set of layers differs from the group's.
  void OnLayerSetRefused(const Join& join, const Error& error, absl::Time now, Effects& effects);
  // Declares the layer for the rank. A conflict is announced, and fails the layer's rounds.
  void Declare(Rank rank, const LayerSpec& spec, bool returning, absl::Time now, Effects& effects);
  void AnnounceConflict(const Layer& layer, const Error& conflict, Effects& effects) const;
  void Leave(Rank rank, absl::Time now, Effects& effects);
  // Tells the others that the rank has left, or has left again, and begins to end what waits for it alone. `stream` was
  // its own.
  void OnLeft(Rank rank, StreamId stream, absl::Time now, Effects& effects);
  // Acknowledges leaves that are due, and all of them once nobody can need what those that leave hold.
  void EndDepartures(absl::Time now, Effects& effects);
  // Returns whether some member may yet ask for an outcome that it has not been told, or has lost with its stream.
  bool OutcomesAreAwaited() const;
  static void Acknowledge(const std::vector<StreamId>& leaves, Effects& effects);
  // After a loss or a leave.
  void OnMemberGone(absl::Time now, Effects& effects);
  void AnnounceMembership(std::optional<Rank> except, Effects& effects);
  Membership CurrentMembership() const;
  // `stream` is the one by which the member is, or was, connected.
  MemberChanged Change(Rank rank, StreamId stream) const;

  const GroupId id_;
  const uint64_t generation_;
  uint64_t run_id_;
  uint64_t over_run_id_ = 0;  // The run before this one, which this master has ended; 0 if there was none.
  const uint64_t memory_;
  bool resumed_;            // An earlier master may have begun this run.
  bool continues_ = false;  // A member has been told the end of a round in this run by an earlier master.
  const Secret token_;
  const GroupConfig config_;  // With every default filled in.
  const Limits& limits_;
  Members members_;
  Layers layers_;
  Rounds rounds_;
  Departures departures_;
  // Until when ranks that have left under an earlier master may come back; InfinitePast before there are any.
  absl::Time leavers_until_ = absl::InfinitePast();
  uint64_t membership_version_ = 1;  // Of the newest membership that was announced, or that the first member is told.
  // The version that all have to have read before leaves are acknowledged; 0 while outcomes are awaited.
  uint64_t version_to_read_ = 0;
  absl::Time linger_until_;
  uint64_t joins_ = 0;
  ReasonCounts refused_joins_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_GROUP_H_
