// The name of a round.

#ifndef SYNCBN_VOCABULARY_ROUND_KEY_H_
#define SYNCBN_VOCABULARY_ROUND_KEY_H_

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "vocabulary/enums.h"

namespace syncbn {

// Identifies a round within its group. Ordered by layer, sequence and phase.
struct RoundKey {
  std::string layer;
  uint64_t sequence = 0;
  Phase phase = Phase::kForward;

  friend bool operator==(const RoundKey& a, const RoundKey& b) {
    return a.sequence == b.sequence && a.phase == b.phase && a.layer == b.layer;
  }
  friend bool operator<(const RoundKey& a, const RoundKey& b) {
    const int layers = a.layer.compare(b.layer);
    return layers != 0 ? layers < 0 : std::tie(a.sequence, a.phase) < std::tie(b.sequence, b.phase);
  }
  template <typename H>
  friend H AbslHashValue(H h, const RoundKey& key) {
    return H::combine(std::move(h), key.layer, key.sequence, key.phase);
  }
};

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_ROUND_KEY_H_
