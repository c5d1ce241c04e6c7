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

  const Contributor* Find(Rank rank) const;
  // `contributor` is one that Find has found.
  uint64_t DigestOf(const Contributor* contributor) const { return digests[contributor - roster->data()]; }
};

// Remembers the vectors of a group's ended rounds up to a number of bytes, and forgets the oldest first.
class OutcomeBudget {
 public:
  struct Entry {
    EndedRound* round = nullptr;
    size_t bytes = 0;
    bool forgotten = false;
  };
  using Handle = std::list<Entry>::iterator;

  // The newest `min_outcomes` are not forgotten, whatever their size.
  OutcomeBudget(size_t max_bytes, size_t min_outcomes) : max_bytes_(max_bytes), min_outcomes_(min_outcomes) {}

  // `round` must stay where it is until it is released.
  Handle Retain(EndedRound* round, size_t bytes);
  void Release(Handle handle);

 private:
  const size_t max_bytes_;
  const size_t min_outcomes_;
  size_t bytes_ = 0;
  std::list<Entry> remembered_;  // Oldest first.
  std::list<Entry> forgotten_;
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
  // Whether the key lies so far behind the newest completed one of its phase that it may have been forgotten.
  bool Expired(Phase phase, uint64_t sequence) const;
  // Takes the record of a round that has just ended, and forgets those that have become too old. Updates the running
  // statistics if it is a forward round that completed.
  void Record(const RoundKey& key, EndedRound round);

  LayerSummary Summary() const;
  LayerView View() const;

 private:
  struct Retained {
    std::unique_ptr<EndedRound> round;
    OutcomeBudget::Handle handle;
  };
  // Ended rounds of one phase.
  struct History {
    absl::btree_map<uint64_t, Retained> rounds;
    std::optional<uint64_t> newest_completed;
    // What decides how old others are: the newest that workers completed together. A number that one of them alone
    // believes in, wrong or hostile, does not count, however great it is ...
    uint64_t newest = 0;
    // ... and such rounds are remembered by their number instead: the failed and the lonely, in the order of their
    // ends.
    std::deque<uint64_t> aside;
  };

  const History& history(Phase phase) const { return histories_[static_cast<size_t>(phase) - 1]; }
  History& history(Phase phase) { return histories_[static_cast<size_t>(phase) - 1]; }
  void Erase(History& history, absl::btree_map<uint64_t, Retained>::iterator record);
  // Takes a completed forward round into the running statistics.
  void Observe(const EndedRound& round);

  Declarations declarations_;
  const uint64_t retained_rounds_;
  const size_t retained_failures_;
  OutcomeBudget* const budget_;
  std::array<History, 3> histories_;
  std::shared_ptr<const RoundOutcome> newest_forward_;
  RunningStatistics running_;
  DeclarationPtr running_of_;  // The newest declaration that they are of; null before the first round.
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LAYER_H_
