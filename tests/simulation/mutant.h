// A coordinator with a bug planted around it, to show that the model's checks have teeth.

#ifndef SYNCBN_TESTS_SIMULATION_MUTANT_H_
#define SYNCBN_TESTS_SIMULATION_MUTANT_H_

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/settings.h"
#include "tests/testing/engine.h"

namespace syncbn::simulation {

enum class Bug {
  kNone,
  kNoFencing,        // A join of an older incarnation is let in, as though it were the present one.
  kStaleStream,      // A frame of a fenced stream is taken for its successor's.
  kChangedReplay,    // A replayed result differs from the first in its last bit.
  kDoubleCount,      // A contribution that is sent on a second stream counts twice.
  kLostOutcome,      // The last of a round's members is not told of its end.
  kSendAfterClose,   // Results go to a stream that was closed, too.
  kIgnoredDeadline,  // Time passes without the coordinator's knowing.
  kEarlyLeave,       // A broken stream is taken for a leave.
  kWrongVariance,    // A billionth too much of it.
  kSplitOutcome,     // Members are told a result that differs in its last bit from the one that is on record.
  kAcceptedNan,      // Bad numbers are made good on their way in.
  kAnyLayers,        // A join with a layer too many is let in.
  kSilentLate,       // Nobody is told of rounds that wait for long.
  kLostDeclaration,  // A new declaration of rank 0 is not heard.
  kStolenSeat,       // A stranger gets the seat of a worker that is alive.
  kSameMemory,       // A master that starts anew says that it has the memory of the one before it.
  kChangedRoster,    // It is not heard that a round ended without some ranks.
  kEarlyCatchUp,     // A worker that comes back is taken to have sent all that it holds.
  kAskingRepeats,    // Repeated contributions are taken for ones that ask for an outcome.
  kForgottenLeaves,  // It is not heard who has left,
  kUnknownLeaves,    // or that they had left before rounds ended.
  kImpatience,       // Workers that declare that rounds wait for successors are taken to want no wait.
  kForgottenSteps,   // Outcomes are forgotten as soon as others have ended, so that no step can be repeated.
  kWrongPlace,       // A new worker is told that its group stands one sequence further back.
  kHastyLeave,       // A leave is acknowledged before others have read of it.
  kSmallerStep,      // A successor's contributions count less than its predecessor's.
  kOpenEar,          // Those who take no part in a round are told how it has ended.
  kSplitNumber,      // Members are told numbers of their own at which to go on,
  kUsedNumber,       // or one that is in use,
  kUntoldNumber,     // or none where they have begun unequally many rounds,
  kNeedlessNumber,   // or one where a rank is merely late.
  kLightShutdown,    // A master that is shut down acknowledges leaves.
  kLateJoin,         // A join alone makes a worker of a rank that had left, though its stream has broken.
};

class Mutant {
 public:
  // `instance`: of the process.
  Mutant(Bug bug, uint64_t instance) : bug_(bug), coordinator_(LimitsWith(bug), instance) {}

  core::Effects OnFrame(core::StreamId stream, const Frame& frame, absl::Time now);
  core::Effects OnClosed(core::StreamId stream, absl::Time now);
  core::Effects On(const core::Event& event, absl::Time now) { return Distort(coordinator_.On(event, now)); }

  absl::Time NextDeadline() const;
  const core::Coordinator& coordinator() const { return coordinator_; }

 private:
  static core::Limits LimitsWith(Bug bug);
  void ChangeNumber(std::shared_ptr<const core::RoundOutcome>* outcome) const;
  core::Effects Distort(core::Effects effects);
  void Distort(core::SendResults& results);
  void DistortFrame(core::StreamId stream, core::FrameReceived& event);

  const Bug bug_;
  core::Coordinator coordinator_;
  std::map<core::StreamId, core::Rank> rank_of_;
  std::map<core::Rank, core::StreamId> seats_;
  std::map<core::Rank, uint64_t> incarnations_;
  std::set<core::StreamId> closed_;
  std::set<core::StreamId> left_;  // Streams whose workers have said that they leave.
  std::set<core::RoundKey> told_;
  std::map<core::RoundKey, std::shared_ptr<const core::RoundOutcome>> ended_;
  std::map<core::RoundKey, core::StreamId> first_stream_;   // For rank 0's contributions.
  std::vector<std::unique_ptr<std::vector<double>>> kept_;  // Numbers that were made good.
  uint64_t asked_ = 0;                                      // The incarnation that a join was robbed of.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_MUTANT_H_
