// One layer of a group: what workers agreed upon, what its ended rounds brought, its running statistics.

#ifndef SYNCBN_SERVER_CORE_LAYER_H_
#define SYNCBN_SERVER_CORE_LAYER_H_

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "server/core/declarations.h"
#include "server/core/limits.h"
#include "server/core/running_statistics.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// INVALID_ARGUMENT (MALFORMED_FRAME) or LIMIT_EXCEEDED, naming field and value; nothing if the spec can be used.
std::optional<Error> CheckSpec(const LayerSpec& spec, const Limits& limits);

// Who contributed to an ended round.
struct Contributor {
  Rank rank = 0;
  BackwardRole role = BackwardRole::kRequired;
  uint16_t incarnation = 0;  // Its lowest bits, which tell it from those before and after.

  static uint16_t LowBits(uint64_t incarnation) { return static_cast<uint16_t>(incarnation); }
  friend bool operator==(const Contributor& a, const Contributor& b) {
    return a.rank == b.rank && a.role == b.role && a.incarnation == b.incarnation;
  }
};

using Roster = std::vector<Contributor>;  // By rank.

// A round that has ended. `outcome` is null once its vectors are forgotten. Kept small: a group has many of them, each
// with a digest for each worker. A round that the same workers contributed to as to the one before shares its roster.
struct EndedRound {
  std::shared_ptr<const RoundOutcome> outcome;
  bool failed = false;
  // One member alone contributed, by a policy that allows it, though others were there.
  bool alone = false;
  bool backward_required = false;
  int64_t count = 0;
  DeclarationPtr declaration;  // Of all its contributions.
  std::shared_ptr<const Roster> roster;
  std::vector<uint64_t> digests;  // Of what the contributors of the roster sent, in its order.
  bool awaited = false;           // A forward round, whose backward round is required and has not ended.

  const Contributor* Find(Rank rank) const;
  // `contributor` is one that Find has found.
  uint64_t DigestOf(const Contributor* contributor) const { return digests[contributor - roster->data()]; }
};

class Layer;

// Remembers what a group's ended rounds brought up to a number of bytes, and forgets the oldest first; and their
// records up to another.
class OutcomeBudget {
 public:
  struct Entry {
    Layer* layer = nullptr;
    Phase phase = Phase::kForward;
    uint64_t sequence = 0;
    EndedRound* round = nullptr;
    size_t bytes = 0;         // Of the outcome.
    size_t record_bytes = 0;  // Of the rest.
    bool forgotten = false;
  };
  using Handle = std::list<Entry>::iterator;

  // The outcomes of the newest `min_outcomes` are not forgotten, whatever their size.
  OutcomeBudget(size_t max_bytes, size_t min_outcomes, size_t max_record_bytes)
      : max_bytes_(max_bytes), min_outcomes_(min_outcomes), max_record_bytes_(max_record_bytes) {}

  // The entry's round must stay where it is until it is released.
  Handle Retain(Entry entry);
  void Release(Handle handle);
  // Has layers drop the oldest records beyond the limit, of those whose outcomes are forgotten.
  void Trim();

 private:
  const size_t max_bytes_;
  const size_t min_outcomes_;
  const size_t max_record_bytes_;
  size_t bytes_ = 0;
  size_t record_bytes_ = 0;
  std::list<Entry> remembered_;  // Oldest first.
  std::list<Entry> forgotten_;   // In the order in which they were.
};

// Not thread-safe; pure.
class Layer {
 public:
  Layer(const LayerSpec& spec, const Limits& limits, OutcomeBudget* budget)
      : declarations_(spec),
        retained_rounds_(limits.retained_rounds),
        retained_failures_(limits.retained_failures),
        budget_(budget) {}

  const std::string& name() const { return declarations_.current()->spec.name; }
  const Declarations& declarations() const { return declarations_; }
  // As in declarations.h.
  void Declare(Rank rank, const LayerSpec& spec, bool returning) { declarations_.Declare(rank, spec, returning); }
  void Forget(Rank rank) { declarations_.Forget(rank); }

  // The record of an ended round, or null.
  EndedRound* Find(Phase phase, uint64_t sequence);
  const EndedRound* Find(Phase phase, uint64_t sequence) const;
  // Returns whether the key lies so far behind the newest completed one of its phase that it may have been forgotten. A
  // backward round that is awaited does not.
  bool Expired(Phase phase, uint64_t sequence) const;
  // Returns whether the forward round was forgotten for its group's limit, though its backward round may have been
  // awaited.
  bool LostAwaited(uint64_t sequence) const;
  // For OutcomeBudget: the record goes.
  void Drop(Phase phase, uint64_t sequence);
  // Takes the record of a round that has just ended, and forgets those that have become too old. Updates the running
  // statistics if it is a forward round that completed.
  void Record(const RoundKey& key, EndedRound round);

  LayerSummary Summary() const;
  LayerView View() const;

 private:
  struct Retained {
    std::unique_ptr<EndedRound> round;
    OutcomeBudget::Handle handle;
    uint64_t number = 0;  // Among those of its phase, by their ends.
  };
  using Records = absl::btree_map<uint64_t, Retained>;  // By sequence.
  // Ended rounds of one phase.
  struct History {
    Records rounds;
    // Records that are too old, but for what is awaited of them.
    Records awaited;
    uint64_t ended = 0;
    uint64_t greatest = 0;  // Sequence that was ever recorded, if any was.
    // Records below this were dropped for the group's limit; those that are there are still good.
    uint64_t floor = 0;
    std::optional<uint64_t> newest_completed;
    // The newest sequence that workers completed together decides how old others are. A number that one of them alone
    // believes in, wrong or hostile, does not count, however great it is ...
    uint64_t newest = 0;
    // ... and such rounds are remembered by their number instead: the failed and the lonely, in the order of their
    // ends.
    std::deque<uint64_t> aside;
  };

  const History& history(Phase phase) const { return histories_[static_cast<size_t>(phase) - 1]; }
  History& history(Phase phase) { return histories_[static_cast<size_t>(phase) - 1]; }
  bool FarBehind(const History& h, uint64_t sequence) const {
    return h.newest > retained_rounds_ && sequence < h.newest - retained_rounds_;
  }
  void Erase(Records& records, Records::iterator record);
  // The record has become too old: it goes, or is kept for what is awaited of it.
  void Retire(History& h, Records::iterator record);
  // Retires those that have become too old.
  void Prune(Phase phase);
  // The backward round has ended.
  void EndAwaiting(uint64_t sequence);
  // Takes a completed forward round into the running statistics.
  void Observe(const EndedRound& round);

  Declarations declarations_;
  const uint64_t retained_rounds_;
  const size_t retained_failures_;
  OutcomeBudget* const budget_;
  std::array<History, 3> histories_;
  // Null before it, and once it has been forgotten like any other outcome.
  std::weak_ptr<const RoundOutcome> newest_forward_;
  uint64_t newest_forward_sequence_ = 0;
  RunningStatistics running_;
  DeclarationPtr running_of_;  // The declaration of the newest round in them; null before the first.
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LAYER_H_
