// The arithmetic of a round: checks of a contribution's numbers, and the merge of all contributions.

#ifndef SYNCBN_SERVER_CORE_MERGE_H_
#define SYNCBN_SERVER_CORE_MERGE_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/btree_map.h"
#include "server/core/limits.h"
#include "server/core/types.h"

namespace syncbn::core {

// A contribution, as the engine keeps it until its round ends.
struct Payload {
  uint64_t incarnation = 0;
  DeclarationPtr declaration;  // The one under which it was made.
  int64_t count = 0;
  BackwardRole backward_role = BackwardRole::kRequired;
  std::vector<double> first;
  std::vector<double> second;
  bool repeats = false;

  size_t bytes() const { return (first.size() + second.size()) * sizeof(double); }
};

// Returns true if both have the same numbers, bit for bit: NaN equals itself, 0 and -0 differ.
bool SameNumbers(const Payload& payload, const Contribution& contribution);

// Returns a hash of all bits of the numbers, by which a replay is recognized when the payload is gone. Stable within a
// process.
uint64_t Digest(const Payload& payload);
uint64_t Digest(const Contribution& contribution);

// Returns why a contribution to a round of this layer cannot be merged (INVALID_CONTRIBUTION, NOT_FINITE), naming rank,
// channel and value; nothing if it can. Backward rounds and sums take any value.
std::optional<Error> CheckNumbers(const Contribution& contribution, const LayerSpec& spec, Rank rank,
                                  const Limits& limits);

// By rank, so that merging in order of iteration is merging in order of rank.
using Payloads = absl::btree_map<Rank, Payload>;

// Fill the outcome's count and vectors, of length `channels`. Payloads are added in order of rank, so the result has
// the same bits for every order of arrival. MergeForward merges moments channel by channel (kernels/moments.h) and
// leaves mean and biased variance; MergeSums adds vectors.
void MergeForward(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome);
void MergeSums(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome);

// Returns a hash of all bits of a result, never 0. It is the same in every process, so that a master can tell whether
// repeated contributions have given what they gave to an earlier one.
uint64_t ResultDigest(const RoundOutcome& outcome);

// Returns NOT_FINITE, naming the channel, if finite moments have overflowed in their merge. Layers that propagate,
// backward rounds and sums may have any result.
std::optional<Error> CheckMerged(const RoundOutcome& outcome, const LayerSpec& spec);

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_MERGE_H_
