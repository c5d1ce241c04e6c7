// A round engine on a virtual clock, whose effects are sorted by the stream that they go to.

#ifndef SYNCBN_TESTS_TESTING_ENGINE_H_
#define SYNCBN_TESTS_TESTING_ENGINE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/core/state.h"

namespace syncbn::testing {

// The numbers of a contribution, which a core::Contribution only points to.
struct Numbers {
  int64_t count = 0;
  std::vector<double> first;
  std::vector<double> second;
  core::BackwardRole role = core::BackwardRole::kRequired;
};

// All that a stream was told.
struct StreamLog {
  std::optional<core::SendJoined> joined;
  std::vector<std::shared_ptr<const core::RoundOutcome>> outcomes;
  std::vector<core::SendLayerError> layer_errors;
  std::vector<core::Membership> memberships;
  std::vector<core::LateRound> late_rounds;
  size_t result_frames = 0;
  bool closed = false;
  std::optional<core::Error> closed_with;

  // The reason it was closed with; empty if it was not, or without an error.
  std::string close_reason() const;
};

core::LayerSpec BatchNormLayer(const std::string& name, uint32_t channels);
core::LayerSpec SumLayer(const std::string& name, uint32_t elements);
core::RoundKey Forward(const std::string& layer, uint64_t sequence);
core::RoundKey Backward(const std::string& layer, uint64_t sequence);
core::RoundKey Sum(const std::string& layer, uint64_t sequence);

// Protocol version 1, group "g" of job "j", and nothing else out of the ordinary.
core::Join MakeJoin(core::Rank rank, uint32_t world_size);

// True if two outcomes are equal in every bit of every number.
bool SameOutcome(const core::RoundOutcome& a, const core::RoundOutcome& b);

// "ROUND_TIMEOUT", or "" if the round completed.
std::string ReasonOf(const core::RoundOutcome& outcome);

// Checks every effect on its way: nothing may be sent to a stream that was closed, by either side, and the first thing
// that a stream is sent is `joined`. Checks the coordinator's invariants after every event.
class Engine {
 public:
  explicit Engine(core::Limits limits = core::Limits());

  // Begins with what an earlier coordinator has stored. Before the first event.
  void Restore(const std::vector<core::GroupState>& groups) { coordinator_.Restore(groups, now_); }
  // Takes everything that is to be stored, `max_bytes` at a time.
  std::vector<core::StateChanges> TakeChanges(size_t max_bytes = SIZE_MAX);

  absl::Time now() const { return now_; }
  const core::Coordinator& coordinator() const { return coordinator_; }
  static core::GroupId group() { return {"j", "g"}; }

  // Handles the event at the present time.
  core::Effects On(const core::Event& event);

  // Lets time pass, and wakes the coordinator whenever it has asked for it.
  core::Effects Advance(absl::Duration duration);

  // Joins on a new stream, and returns it.
  core::StreamId Join(const core::Join& join);
  // Joins a group of `world_size` and declares the layers as they come.
  core::StreamId Join(core::Rank rank, uint32_t world_size, const std::vector<core::LayerSpec>& layers = {});
  // Comes back on a new stream as the same incarnation of the same run.
  core::StreamId Reconnect(core::StreamId stream);

  core::Effects Declare(core::StreamId stream, const std::vector<core::LayerSpec>& layers);
  core::Effects Contribute(core::StreamId stream, const core::RoundKey& key, const Numbers& numbers);
  // Contributes, and says that nothing else comes until this round has ended.
  core::Effects ContributeAndBlock(core::StreamId stream, const core::RoundKey& key, const Numbers& numbers);
  core::Effects Leave(core::StreamId stream);
  // The worker says that it has read the newest membership that it was told, and whether it `caught_up`.
  core::Effects Read(core::StreamId stream, bool caught_up = false);
  // The worker's side closes.
  core::Effects Close(core::StreamId stream);
  core::Effects Shutdown();

  const StreamLog& log(core::StreamId stream) const { return logs_.at(stream); }
  // The outcomes of the key that the stream was told, in that order.
  std::vector<std::shared_ptr<const core::RoundOutcome>> Outcomes(core::StreamId stream,
                                                                  const core::RoundKey& key) const;
  // The one outcome of the key that the stream was told; fails the test and returns an outcome with the error "NONE"
  // if there was none, or more than one.
  std::shared_ptr<const core::RoundOutcome> Outcome(core::StreamId stream, const core::RoundKey& key) const;
  // All ended rounds, in the order of their ends.
  const std::vector<core::RoundEnded>& ended() const { return ended_; }
  // All changes of members, and all joins that were refused, in the order in which they happened.
  const std::vector<core::MemberChanged>& changes() const { return changes_; }
  const std::vector<core::JoinRefused>& refused() const { return refused_; }
  size_t groups_ended() const { return groups_ended_; }
  core::GroupView View() const;
  core::LayerView Layer(const std::string& name) const;

 private:
  void Record(const core::Effect& effect);
  void CheckOpen(core::StreamId stream) const;

  core::Coordinator coordinator_;
  absl::Time now_;
  core::StreamId last_stream_ = 0;
  std::map<core::StreamId, core::Join> joins_;
  std::map<core::StreamId, bool> gone_;  // Closed by the worker.
  std::map<core::StreamId, StreamLog> logs_;
  std::vector<core::RoundEnded> ended_;
  std::vector<core::MemberChanged> changes_;
  std::vector<core::JoinRefused> refused_;
  size_t groups_ended_ = 0;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_ENGINE_H_
