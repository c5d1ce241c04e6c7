// Layers, rounds and their results as a program sees them: plain values, shared by the public header and the session.

#ifndef SYNCBN_CLIENT_CC_SESSION_TYPES_H_
#define SYNCBN_CLIENT_CC_SESSION_TYPES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "vocabulary/enums.h"
#include "vocabulary/layer_spec.h"
#include "vocabulary/round_key.h"

namespace syncbn {

// A layer as the workers must agree upon it.
using LayerOptions = LayerSpec;

// The result of a round that completed.
struct RoundResult {
  int64_t count = 0;           // Forward and backward: values in each channel, over all workers.
  std::vector<double> first;   // By phase: mean; sum_dy; the summed vector.
  std::vector<double> second;  // By phase: var (biased); sum_dy_xmu; empty.
  bool backward_required = false;
  std::vector<uint32_t> missing_ranks;

  // The two vectors by the names of the round's phase.
  const std::vector<double>& mean() const { return first; }
  const std::vector<double>& var() const { return second; }
  const std::vector<double>& sum_dy() const { return first; }
  const std::vector<double>& sum_dy_xmu() const { return second; }
  const std::vector<double>& vector() const { return first; }
};

// As a sequence: the next one in order, which the worker counts for each layer and phase.
inline constexpr uint64_t kNextSequence = UINT64_MAX;
inline constexpr uint64_t kGreatestSequence = kNextSequence - 1;

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_SESSION_TYPES_H_
