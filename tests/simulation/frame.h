// What simulated workers send.

#ifndef SYNCBN_TESTS_SIMULATION_FRAME_H_
#define SYNCBN_TESTS_SIMULATION_FRAME_H_

#include <memory>
#include <optional>
#include <vector>

#include "server/core/coordinator.h"
#include "tests/testing/engine.h"

namespace syncbn::simulation {

using NumbersPtr = std::shared_ptr<const testing::Numbers>;

struct Part {
  core::RoundKey key;
  NumbersPtr numbers;
};

// A core::FrameReceived that owns its numbers, on its way.
struct Frame {
  std::optional<core::Join> join;
  std::vector<core::LayerSpec> layers;
  std::vector<Part> parts;  // Of one sequence.
  std::vector<core::RoundKey> blocked_on;
  bool leave = false;
};
using FramePtr = std::shared_ptr<const Frame>;

// The engine's, but for a wait after which rounds are late that is within the schedules' deadlines, and turns that the
// rounds of a group do not fit into.
inline core::Limits SimulatedLimits() {
  core::Limits limits;
  limits.late_round_after = absl::Milliseconds(25);
  limits.max_turn_bytes = 1'500;  // Two or three rounds.
  return limits;
}

// Points into the frame.
inline core::FrameReceived ToEvent(core::StreamId stream, const Frame& frame) {
  core::FrameReceived event;
  event.stream = stream;
  event.join = frame.join;
  event.layers = frame.layers;
  for (const Part& part : frame.parts) {
    const testing::Numbers& numbers = *part.numbers;
    event.contributions.push_back({part.key, numbers.count, numbers.role, numbers.first, numbers.second});
  }
  event.blocked_on = frame.blocked_on;
  if (frame.leave) event.leave = "finished";
  return event;
}

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_FRAME_H_
