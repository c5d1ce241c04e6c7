// One life of a simulated worker: what it has to contribute, what it waits for, what it sends next.

#ifndef SYNCBN_TESTS_SIMULATION_WORKER_H_
#define SYNCBN_TESTS_SIMULATION_WORKER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "server/core/coordinator.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/model.h"
#include "tests/simulation/random.h"

namespace syncbn::simulation {

// How a schedule's workers behave.
struct Habits {
  uint64_t sequences = 2;      // Of each layer, 0 to sequences - 1.
  bool one_by_one = false;     // Wait for each outcome before the next contribution, each in an order of its own.
  bool says_blocked = false;   // Tell the master what it waits for, where it waits for all it has sent.
  double bad_numbers = 0.0;    // Of contributions.
  double repeats = 0.0;        // Of frames, followed by something sent before.
  double changed_repeats = 0;  // Of those, with other numbers.
  double odd_roles = 0.0;      // Of forward contributions, not REQUIRED.
  double offset = 0.0;         // Of means.
};

// Talks the protocol as a client does. Pure: the world says when it acts, and carries what it says.
class Worker {
 public:
  Worker(core::Rank rank, uint64_t first_sequence, const Settings* settings, const Habits* habits, uint64_t seed)
      : rank_(rank), sequence_(first_sequence), settings_(*settings), habits_(*habits), random_(seed) {}

  core::Rank rank() const { return rank_; }
  uint64_t sequence() const { return sequence_; }
  // It has sent its leave.
  bool leaving() const { return leaving_; }

  FramePtr JoinFrame();
  void OnJoined(const core::SendJoined& joined);
  void OnOutcome(const core::RoundOutcome& outcome);
  // All that is unanswered, again.
  FramePtr Resend();
  // What it sends now; null if it waits. To be asked until it does.
  FramePtr Next();
  // Something that it has sent before, for no reason; null if there is nothing.
  FramePtr Repeat();

 private:
  // Declares the layers as they are at the frame's sequence, unless that is what was declared last.
  void Declare(Frame& frame);
  void PlanForward();
  void PlanBackward();
  NumbersPtr MakeNumbers(const core::RoundKey& key);
  std::vector<core::RoundKey> Unanswered() const;

  const core::Rank rank_;
  uint64_t sequence_;
  const Settings& settings_;
  const Habits& habits_;
  Random random_;

  uint64_t incarnation_ = 0;
  uint64_t run_id_ = 0;
  bool forward_planned_ = false;
  bool backward_planned_ = false;
  bool leaving_ = false;
  const std::vector<core::LayerSpec>* declared_ = nullptr;  // On this stream, where layers are declared anew.
  std::vector<core::RoundKey> to_send_;                     // Last first.
  std::map<core::RoundKey, NumbersPtr> sent_;
  std::set<core::RoundKey> unanswered_;
  std::map<core::RoundKey, int> changed_;  // Repeats with other numbers, on this stream, that wait for their refusal.
  std::vector<core::RoundKey> backward_;   // What the forward outcomes ask for.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_WORKER_H_
