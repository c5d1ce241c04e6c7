// The arithmetic of a round: are a contribution's numbers sound, and what do the contributions of all ranks make.

#ifndef SYNCBN_SERVER_CORE_MERGE_H_
#define SYNCBN_SERVER_CORE_MERGE_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/btree_map.h"
#include "server/core/limits.h"
#include "server/core/types.h"

namespace syncbn::core {

// What the engine keeps of a contribution until its round ends.
struct Payload {
  uint64_t incarnation = 0;
  DeclarationPtr declaration;  // Under which it was made.
  int64_t count = 0;
  BackwardRole backward_role = BackwardRole::kRequired;
  std::vector<double> first;
  std::vector<double> second;

  size_t bytes() const { return (first.size() + second.size()) * sizeof(double); }
};

// Whether two payloads are the same, bit for bit (NaN equals itself; 0 and -0 differ).
bool SameNumbers(const Payload& payload, const Contribution& contribution);

// A number that stands for all bits of a payload, to recognize a replay when the payload is gone. Stable within a
// process.
uint64_t Digest(const Payload& payload);
uint64_t Digest(const Contribution& contribution);

// What is wrong with a contribution to a round of this layer (INVALID_CONTRIBUTION, NOT_FINITE), naming rank, channel
// and value; nothing if it can be merged. Backward rounds and sums take any value.
std::optional<Error> CheckNumbers(const Contribution& contribution, const LayerSpec& spec, Rank rank,
                                  const Limits& limits);

// By rank, so that merging in order of iteration is merging in order of rank.
using Payloads = absl::btree_map<Rank, Payload>;

// Fills the outcome's count and vectors. Forward: moments merged channel by channel (kernels/moments.h), `second` being
// the biased variance. Else: sums. `channels` is the length of the result's vectors.
void MergeForward(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome);
void MergeSums(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome);

// Moments that are finite one by one may overflow together. NOT_FINITE, naming the channel, unless the layer
// propagates; never of a backward round or a sum.
std::optional<Error> CheckMerged(const RoundOutcome& outcome, const LayerSpec& spec);

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_MERGE_H_
