// A simulated training program: it decides which rounds begin, what is waited for, and when the worker leaves. The
// protocol is its session's business.

#ifndef SYNCBN_TESTS_SIMULATION_TRAINER_H_
#define SYNCBN_TESTS_SIMULATION_TRAINER_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "tests/simulation/checked_session.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/random.h"
#include "tests/simulation/settings.h"

namespace syncbn::simulation {

// The behaviour of a schedule's programs. Numbers without a unit are probabilities.
struct Habits {
  uint64_t sequences = 2;  // Each layer has rounds 0 to sequences - 1.
  // A rank, if any, that leaves after fewer.
  std::optional<core::Rank> leaver;
  uint64_t leaver_sequences = 0;
  bool one_by_one = false;     // Wait for each outcome before the next contribution, each in an order of its own.
  bool says_blocked = false;   // Tell the session what they wait for.
  bool second_thread = false;  // Begin rounds from another thread while one waits.
  bool sums_overlap = false;   // Begin the next sequence while sums of the last are unanswered.
  double early_leave = 0.0;    // Leave without waiting for what they have begun last.
  double bad_numbers = 0.0;    // A contribution has bad numbers.
  double odd_roles = 0.0;      // A forward contribution's role is not REQUIRED.
  double offset = 0.0;         // Added to means.
  // Leave the rest of a step out, among the first three, before something that is to be done next;
  double raises = 0.0;
  bool gives_up = false;  // and once a round has failed that is waited for.
  // Contributions are a function of this number, their rank and their key: a step that is repeated has the same ones.
  std::optional<uint64_t> numbers_seed;
};

class Trainer {
 public:
  Trainer(core::Rank rank, uint64_t first_sequence, const Settings* settings, const Habits* habits, uint64_t seed)
      : rank_(rank),
        sequence_(first_sequence),
        settings_(*settings),
        habits_(*habits),
        random_(seed),
        raising_(~seed) {}

  core::Rank rank() const { return rank_; }
  uint64_t sequence() const { return sequence_; }
  // The rounds that it waits for, in the order in which they were begun.
  const std::vector<ContributionRef>& waiting() const { return waiting_; }

  // Does what comes next. Returns after how long it does more; nothing if it waits for an outcome, or has left.
  std::optional<absl::Duration> Act(CheckedSession& session, absl::Time now);
  // Returns whether it has waited for this round.
  bool OnOutcome(const session::Complete& complete);
  // The number of steps whose rest it has left out of its own accord.
  uint64_t raised() const { return raised_; }
  // It has done all, and leaves next.
  bool finished() const {
    const bool last = sequence_ >= Sequences() || (forward_planned_ && sequence_ + 1 == Sequences());
    return last && !leaving_ && plan_.empty() && backward_.empty() && waiting_.empty();
  }
  // A round of its last step has failed.
  bool failed_last() const { return failed_last_; }

 private:
  // A round that it begins; a long vector is one.
  struct Planned {
    RoundKey key;
    size_t length = 0;
  };

  uint64_t Sequences() const { return rank_ == habits_.leaver ? habits_.leaver_sequences : habits_.sequences; }
  // Plans the forward rounds of a sequence, or the backward rounds, or nothing if none are left.
  void PlanStage(CheckedSession& session);
  void PlanForward(CheckedSession& session);
  void Begin(CheckedSession& session, absl::Time now);
  // Leaves the rest of the step out.
  void GiveUp();
  std::optional<absl::Duration> Wait(CheckedSession& session, absl::Time now);
  // Returns the oldest contribution whose outcome it needs before it goes on; null if there is none.
  ContributionRef WaitsFor() const;
  NumbersPtr MakeNumbers(const Planned& round);
  NumbersPtr MakeNumbers(const Planned& round, Random& random) const;

  const core::Rank rank_;
  uint64_t sequence_;
  const Settings& settings_;
  const Habits& habits_;
  Random random_;
  Random raising_;  // Apart, so that the rest of a schedule does not depend on it.
  uint64_t raised_ = 0;
  bool failed_last_ = false;

  bool forward_planned_ = false;
  bool backward_planned_ = false;
  bool leaving_ = false;
  bool several_threads_ = false;
  bool has_waited_ = false;  // A round has ended.
  absl::Time second_thread_at_ = absl::InfiniteFuture();
  std::vector<Planned> plan_;             // Last first.
  std::vector<Planned> backward_;         // The rounds that forward outcomes ask for.
  std::vector<ContributionRef> waiting_;  // In the order in which they were begun.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_TRAINER_H_
