// A round in flight: what has been contributed to it, and what it waits for.

#ifndef SYNCBN_SERVER_CORE_PENDING_ROUND_H_
#define SYNCBN_SERVER_CORE_PENDING_ROUND_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "server/core/merge.h"
#include "server/core/rank_set.h"
#include "server/core/types.h"

namespace syncbn::core {

struct PendingRound {
  absl::Time begun;
  absl::Time deadline;
  absl::Time alarm;  // When time next matters: when the round becomes late, then its deadline.
  // It ended under an earlier master with the contributions of `expected`, and is merged again from those. Only late
  // contributors and those that have not heard of the end wait for it; where nobody waits, it is *idle*.
  bool restored = false;
  // A member had sent its contribution to an earlier master, under which the round may have ended.
  bool straddles = false;
  // Then: the ranks that had left before it can have ended, by the word of one that contributed to it.
  RankSet left;
  DeclarationPtr declaration;  // Its first contribution's. All others must be made under the same one.
  size_t bytes = 0;            // The payloads'.
  size_t needed = 0;           // Contributions, if nobody leaves.
  // Backward rounds: the ranks that are to contribute, ascending. Empty in other rounds, which every rank contributes
  // to.
  std::vector<Rank> expected;
  int64_t count = 0;  // Backward rounds: of the forward round, which may be forgotten before this one ends.
  Payloads payloads;
  std::vector<Rank> latecomers;  // Restored rounds: ranks that wait for the outcome and do not count.
  Rank last_rank = 0;            // The newest contributor.

  bool Expects(Rank rank) const;
  // Returns whether nobody waits for the outcome.
  bool Idle() const;
  // Returns whether the rank is to be told the outcome: it has sent a contribution, be it one that does not count, and
  // has not only repeated its part of a round whose outcome it has had.
  bool AwaitedBy(Rank rank) const;
  // Returns the ranks that are to contribute and have not, ascending. Ranks that have left are among them.
  std::vector<Rank> MissingRanks(uint32_t world_size) const;

  // Aborts unless counts and payloads agree.
  void CheckInvariants(uint32_t world_size) const;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_PENDING_ROUND_H_
