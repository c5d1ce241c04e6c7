// Layers, rounds and their results as a program sees them: plain values, shared by the public header and the session.

#ifndef SYNCBN_CLIENT_CC_SESSION_TYPES_H_
#define SYNCBN_CLIENT_CC_SESSION_TYPES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "vocabulary/enums.h"

namespace syncbn {

// A layer as the workers must agree upon it; see LayerSpec in proto/syncbn/v1/statistics.proto.
struct LayerOptions {
  std::string name;
  uint32_t channels = 0;
  LayerKind kind = LayerKind::kBatchNorm;
  double eps = 0.0;
  bool clamp_eps = false;  // 1/sqrt(max(var, eps)) instead of 1/sqrt(var + eps).
  NumericPolicy numeric_policy = NumericPolicy::kRefuse;
  std::optional<double> momentum;  // Of the master's running statistics; absent: cumulative average.
  bool biased_running_variance = false;

  friend bool operator==(const LayerOptions& a, const LayerOptions& b) {
    return a.name == b.name && a.channels == b.channels && a.kind == b.kind && a.eps == b.eps &&
           a.clamp_eps == b.clamp_eps && a.numeric_policy == b.numeric_policy && a.momentum == b.momentum &&
           a.biased_running_variance == b.biased_running_variance;
  }
};

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

// Identifies a round within its group.
struct RoundKey {
  std::string layer;
  uint64_t sequence = 0;
  Phase phase = Phase::kForward;

  friend bool operator==(const RoundKey& a, const RoundKey& b) {
    return a.sequence == b.sequence && a.phase == b.phase && a.layer == b.layer;
  }
  template <typename H>
  friend H AbslHashValue(H h, const RoundKey& key) {
    return H::combine(std::move(h), key.layer, key.sequence, key.phase);
  }
};

// As a sequence: the next one in order, which the worker counts for each layer and phase.
inline constexpr uint64_t kNextSequence = UINT64_MAX;
inline constexpr uint64_t kGreatestSequence = kNextSequence - 1;

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_SESSION_TYPES_H_
