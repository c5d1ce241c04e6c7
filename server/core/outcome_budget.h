// The memory that a group spends on its ended rounds.

#ifndef SYNCBN_SERVER_CORE_OUTCOME_BUDGET_H_
#define SYNCBN_SERVER_CORE_OUTCOME_BUDGET_H_

#include <cstddef>
#include <cstdint>
#include <list>

#include "server/core/ended_round.h"
#include "server/core/types.h"

namespace syncbn::core {

class Layer;

// Forgets the oldest outcomes of ended rounds beyond one number of bytes, and the oldest records of rounds whose
// outcomes are forgotten beyond another. It does not own the records; layers do.
//
// Thread safety: none; pure.
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

  // The newest `min_outcomes` outcomes are never forgotten, whatever their size.
  OutcomeBudget(size_t max_bytes, size_t min_outcomes, size_t max_record_bytes)
      : max_bytes_(max_bytes), min_outcomes_(min_outcomes), max_record_bytes_(max_record_bytes) {}

  // Counts a record, and forgets the oldest outcomes if there are too many bytes of them now. The entry's round must
  // stay at its address until the record is refunded. `entry.forgotten`: its outcome is unknown.
  Handle Charge(Entry entry);
  // Stops counting a record that is about to be destroyed.
  void Refund(Handle handle);
  // Forgets the oldest outcomes, `bytes` of them or a little more, as far as there are more than the newest few.
  // Returns how many bytes those took.
  size_t ForgetOldest(size_t bytes);
  // Has layers drop the oldest records beyond the limit, among those whose outcomes are forgotten.
  void Trim();

  // The bytes of outcomes and records that are counted.
  size_t bytes() const { return bytes_ + record_bytes_; }
  size_t max_bytes() const { return max_bytes_; }
  // Returns whether outcomes were last forgotten by ForgetOldest, and not for max_bytes().
  bool forgot_for_others() const { return forgot_for_others_; }

  // Aborts unless `records` records are counted and the totals are their sums. Layers check that each of their records
  // has an entry of its own.
  void CheckInvariants(size_t records) const;

 private:
  friend struct InvariantsPeer;

  void Forget(Handle oldest);

  const size_t max_bytes_;
  const size_t min_outcomes_;
  const size_t max_record_bytes_;
  bool forgot_for_others_ = false;
  size_t bytes_ = 0;             // Those in `remembered_`.
  size_t record_bytes_ = 0;      // Those in both lists.
  std::list<Entry> remembered_;  // Oldest first.
  std::list<Entry> forgotten_;   // In the order in which they were forgotten.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_OUTCOME_BUDGET_H_
