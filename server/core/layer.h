// One layer of a group: its declarations, the records of its ended rounds, its running statistics.

#ifndef SYNCBN_SERVER_CORE_LAYER_H_
#define SYNCBN_SERVER_CORE_LAYER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "server/core/declarations.h"
#include "server/core/ended_round.h"
#include "server/core/limits.h"
#include "server/core/outcome_budget.h"
#include "server/core/running_statistics.h"
#include "server/core/state.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// Returns why the spec cannot be used (MALFORMED_FRAME, LIMIT_EXCEEDED), naming field and value; nothing if it can.
std::optional<Error> CheckSpec(const LayerSpec& spec, const Limits& limits);

// Thread safety: none; pure.
class Layer {
 public:
  // `budget` must outlive this object.
  Layer(const LayerSpec& spec, const Limits& limits, OutcomeBudget* budget)
      : declarations_(spec),
        retained_rounds_(limits.retained_rounds),
        retained_failures_(limits.retained_failures),
        budget_(budget) {}

  const std::string& name() const { return declarations_.current()->spec.name; }
  const Declarations& declarations() const { return declarations_; }
  // See declarations.h.
  void Declare(Rank rank, const LayerSpec& spec, bool returning) { declarations_.Declare(rank, spec, returning); }
  void Forget(Rank rank) { declarations_.Forget(rank); }

  // Returns the record of an ended round, or null.
  EndedRound* Find(Phase phase, uint64_t sequence);
  const EndedRound* Find(Phase phase, uint64_t sequence) const;
  // Returns true if the round is older than the retention window, so that its record may be gone. An awaited backward
  // round never is.
  bool Expired(Phase phase, uint64_t sequence) const;
  // Returns true if the record of the forward round was dropped for the group's memory limit, although its backward
  // round may have been awaited.
  bool LostAwaited(uint64_t sequence) const;
  // Drops a record, for OutcomeBudget.
  void Drop(Phase phase, uint64_t sequence);
  // Records a round that has just ended, and retires records that have become too old. Updates the running statistics
  // if it is a completed forward round. A restored round is recorded without its outcome.
  void Record(const RoundKey& key, EndedRound round);
  // Takes the outcome of a restored round, which has been merged again.
  void Restore(const RoundKey& key, EndedRound round);

  // Notes that the rank has contributed to a round, and forgotten it and those before it. Of backward rounds, it holds
  // the forward rounds of those that have not ended for it: see EndedRound::holders. Returns the least sequence that
  // this is news about, up to the key's; nothing if it is none.
  std::optional<uint64_t> NoteForgotten(Rank rank, const RoundKey& key);
  // Returns whether the rank may have forgotten its contribution to the round, and with it that the round has ended.
  bool MayHaveForgotten(Rank rank, Phase phase, uint64_t sequence) const;
  // Returns a rank that may have.
  std::optional<Rank> ForgottenBy(Phase phase, uint64_t sequence) const;

  // Returns the greatest sequence that has completed, if any has.
  std::optional<uint64_t> NewestCompleted(Phase phase) const { return history(phase).newest_completed; }

  LayerSummary Summary() const;
  LayerView View() const;

  // Returns what is to be stored of the layer; nothing before its running statistics' first update.
  std::optional<LayerState> State() const { return running_.State(); }
  // Goes on after an earlier master, with what it has stored or with nothing. No forward round of the layer may have
  // completed here.
  void Resume(const LayerState& state);
  void ResumeFromNothing() { running_.ResumeFromNothing(); }

  // Aborts unless the records agree with the counts that are kept of them. Returns the number of records.
  size_t CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  struct Retained {
    std::unique_ptr<EndedRound> round;
    OutcomeBudget::Handle handle;
    uint64_t number = 0;  // Among those of its phase, by their ends.
  };
  using Records = absl::btree_map<uint64_t, Retained>;  // By sequence.
  // Ended rounds of one phase.
  struct History {
    Records rounds;
    Records awaited;  // Records that are too old, kept because their backward rounds have not ended.
    uint64_t ended = 0;
    uint64_t greatest = 0;  // The greatest sequence ever recorded, if `ended` is not 0.
    uint64_t floor = 0;     // Some records below this were dropped for the group's limit; those that exist are valid.
    std::optional<uint64_t> newest_completed;
    // The newest sequence that several workers completed together. The age of others is measured from it. A sequence
    // that a single worker uses, wrong or hostile, does not count, however great it is: ...
    uint64_t newest = 0;
    // ... of rounds that failed or completed with one worker alone, a fixed number is kept, in the order in which they
    // ended.
    std::deque<uint64_t> aside;
    // The greatest sequences that members have forgotten of those that an earlier master ended, by rank, and the
    // greatest of these.
    absl::btree_map<Rank, uint64_t> forgotten;
    uint64_t greatest_forgotten = 0;
  };

  const History& history(Phase phase) const { return histories_[static_cast<size_t>(phase) - 1]; }
  History& history(Phase phase) { return histories_[static_cast<size_t>(phase) - 1]; }
  bool FarBehind(const History& h, uint64_t sequence) const {
    return h.newest > retained_rounds_ && sequence < h.newest - retained_rounds_;
  }
  // Files a record, and retires those that have become too old.
  void File(const RoundKey& key, EndedRound round, bool aside);
  OutcomeBudget::Handle Charge(const RoundKey& key, EndedRound* round);
  void Erase(Records& records, Records::iterator record);
  // Erases a record that has become too old, or keeps it aside if its backward round is awaited.
  void Retire(History& h, Records::iterator record);
  // Retires the records that have become too old.
  void Prune(Phase phase);
  // Stops awaiting a backward round, which has ended.
  void EndAwaiting(uint64_t sequence);
  // Returns nothing while no statistics of the layer's present size are known.
  std::optional<ChannelSummary> SummarizeChannels() const;
  // Updates the running statistics with a completed forward round.
  void Observe(const EndedRound& round);

  Declarations declarations_;
  const uint64_t retained_rounds_;
  const size_t retained_failures_;
  OutcomeBudget* const budget_;
  std::array<History, 3> histories_;
  std::weak_ptr<const RoundOutcome> newest_forward_;  // Null before the first, and once the outcome is forgotten.
  uint64_t newest_forward_sequence_ = 0;
  RunningStatistics running_;
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LAYER_H_
