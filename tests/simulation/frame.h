// Frames on the path between simulated workers and masters, and how the two sides' structs become each other's.

#ifndef SYNCBN_TESTS_SIMULATION_FRAME_H_
#define SYNCBN_TESTS_SIMULATION_FRAME_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "client/cc/session/frame.h"
#include "server/core/coordinator.h"
#include "tests/simulation/settings.h"
#include "tests/testing/engine.h"

namespace syncbn::simulation {

using NumbersPtr = std::shared_ptr<const testing::Numbers>;

// A session's contribution, with its numbers.
struct SimulatedContribution final : public session::Contribution {
  SimulatedContribution(RoundKey key, size_t bytes, NumbersPtr its_numbers)
      : Contribution(std::move(key), bytes), numbers(std::move(its_numbers)) {}

  const NumbersPtr numbers;
};

struct Part {
  core::RoundKey key;
  NumbersPtr numbers;
  // The round's end as another master has told it to the worker; null if it asks for the outcome.
  std::shared_ptr<const core::EndedReport> report = nullptr;
};

// A core::FrameReceived that owns its numbers, on its way.
struct Frame {
  std::optional<core::Join> join;
  std::vector<core::LayerSpec> layers;
  std::vector<Part> parts;
  std::vector<core::Rank> left_ranks;
  bool caught_up = false;
  std::vector<core::RoundKey> forgotten;
  std::vector<core::RoundKey> blocked_on;
  bool leave = false;
  uint64_t membership_read = 0;
};
using FramePtr = std::shared_ptr<const Frame>;
using ContributionRef = std::shared_ptr<session::Contribution>;
using ServerFramePtr = std::shared_ptr<const session::ServerFrame>;

// Returns the join of a rank that was let in as `incarnation` of `run_id` before; 0 and 0 if it was not.
core::Join MakeJoin(const Settings& settings, core::Rank rank, uint64_t incarnation, uint64_t run_id);

// Converts a frame that a worker of this rank has written.
FramePtr FromSession(const session::ClientFrame& frame, const Settings& settings, core::Rank rank);
// Points into the frame.
core::FrameReceived ToEvent(core::StreamId stream, const Frame& frame);

// Converts what a master sends; returns null for effects that no worker is told.
ServerFramePtr ToSession(const core::Effect& effect);
// Returns the streams that an effect goes to.
std::vector<core::StreamId> ReceiversOf(const core::Effect& effect);
absl::Status ToStatus(const core::Error& error, const std::string& layer);
core::Error ToError(const absl::Status& status);

// "a/0/1": layer, sequence, phase.
std::string Name(const RoundKey& key);

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_FRAME_H_
