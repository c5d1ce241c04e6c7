// One layer of a group: what workers agreed upon, what its ended rounds brought, its running statistics.

#ifndef SYNCBN_SERVER_CORE_LAYER_H_
#define SYNCBN_SERVER_CORE_LAYER_H_

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "server/core/limits.h"
#include "server/core/rank_set.h"
#include "server/core/running_statistics.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// In what `worker` deviates from `reference` ("channels 32 instead of 64"); empty if they agree. Momentum is not
// compared.
std::string Difference(const LayerSpec& worker, const LayerSpec& reference);

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
  bool backward_required = false;
  int64_t count = 0;
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
  Layer(const LayerSpec& spec, uint64_t retained_rounds, OutcomeBudget* budget)
      : spec_(spec), retained_rounds_(retained_rounds), budget_(budget) {}

  const LayerSpec& spec() const { return spec_; }
  const RankSet& known_to() const { return known_to_; }

  // A rank says what the layer is. The first one's word stands; who deviates brings the layer into conflict until the
  // last one that deviates agrees, or all that know the layer have come to deviate alike. Returns whether that has just
  // made it another layer; rounds in flight are then of the old one.
  bool Declare(Rank rank, const LayerSpec& spec);
  // What the rank has said counts no more: it has left, or its successor speaks for it.
  void Forget(Rank rank);
  // The conflict, if there is one, naming the deviating ranks and the differences.
  std::optional<Error> conflict() const;

  // The record of an ended round, or null.
  EndedRound* Find(Phase phase, uint64_t sequence);
  // Whether the key lies so far behind the newest of its phase that it may have been forgotten.
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
    uint64_t newest = 0;
  };

  const History& history(Phase phase) const { return histories_[static_cast<size_t>(phase) - 1]; }
  History& history(Phase phase) { return histories_[static_cast<size_t>(phase) - 1]; }
  bool MaybeAdopt();

  LayerSpec spec_;
  const uint64_t retained_rounds_;
  OutcomeBudget* const budget_;
  RankSet known_to_;
  size_t knowing_ = 0;                          // How many they are.
  absl::btree_map<Rank, LayerSpec> deviating_;  // What those who deviate say.
  std::array<History, 3> histories_;
  std::shared_ptr<const RoundOutcome> newest_forward_;
  RunningStatistics running_;
  uint64_t completed_ = 0;
  uint64_t failed_ = 0;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LAYER_H_
