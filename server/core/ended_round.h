// The record of a round that has ended.

#ifndef SYNCBN_SERVER_CORE_ENDED_ROUND_H_
#define SYNCBN_SERVER_CORE_ENDED_ROUND_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plumbing/check.h"
#include "server/core/rank_set.h"
#include "server/core/types.h"

namespace syncbn::core {

// A worker that contributed to an ended round.
struct Contributor {
  Rank rank = 0;
  BackwardRole role = BackwardRole::kRequired;
  uint16_t incarnation = 0;  // Its lowest bits, which distinguish it from the incarnations around it.

  static uint16_t LowBits(uint64_t incarnation) { return static_cast<uint16_t>(incarnation); }
  friend bool operator==(const Contributor& a, const Contributor& b) {
    return a.rank == b.rank && a.role == b.role && a.incarnation == b.incarnation;
  }
};

using Roster = std::vector<Contributor>;  // By rank.

// Kept small: a group has many of them, each with a digest for each worker. Successive rounds with the same
// contributors share their roster.
struct EndedRound {
  std::shared_ptr<const RoundOutcome> outcome;  // Null once it is forgotten.
  bool failed = false;
  // One member contributed alone, under a policy that allows it, although others were present.
  bool alone = false;
  bool backward_required = false;
  // It ended under an earlier master, and its contributions have not all been repeated to this one: the outcome is not
  // known, nor are the digests (which are 0).
  bool restored = false;
  int64_t count = 0;
  uint64_t digest = 0;              // The outcome's; 0 if it is unknown or an error.
  std::vector<Rank> missing_ranks;  // The outcome's, while it is restored.
  DeclarationPtr declaration;       // All its contributions were made under it.
  std::shared_ptr<const Roster> roster;
  std::vector<uint64_t> digests;  // The contributions', in the order of the roster.
  bool awaited = false;           // A forward round whose backward round is required and has not ended.
  // A forward round that ended under an earlier master: the members that have told or repeated it, or wait for it. None
  // of these has forgotten an end of the backward round. Empty for all other rounds.
  RankSet holders;

  // Returns null if the rank has not contributed.
  const Contributor* Find(Rank rank) const {
    const auto it = std::lower_bound(roster->begin(), roster->end(), rank,
                                     [](const Contributor& contributor, Rank r) { return contributor.rank < r; });
    return it != roster->end() && it->rank == rank ? &*it : nullptr;
  }

  // `contributor` was returned by Find.
  uint64_t DigestOf(const Contributor* contributor) const {
    const size_t index = static_cast<size_t>(contributor - roster->data());
    SYNCBN_CHECK(index < digests.size(), index, " of ", digests.size());
    return digests[index];
  }
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_ENDED_ROUND_H_
