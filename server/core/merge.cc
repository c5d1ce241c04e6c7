#include "server/core/merge.h"

#include <cmath>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"
#include "kernels/moments.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "vocabulary/numbers.h"

namespace syncbn::core {
namespace {

absl::string_view Bytes(absl::Span<const double> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)};
}

uint64_t DigestOf(int64_t count, BackwardRole role, absl::Span<const double> first, absl::Span<const double> second) {
  return absl::Hash<std::tuple<int64_t, int, absl::string_view, absl::string_view>>{}(
      {count, static_cast<int>(role), Bytes(first), Bytes(second)});
}

// The names of a phase's two vectors in error messages.
struct VectorNames {
  const char* first;
  const char* second;
};

VectorNames NamesOf(Phase phase) {
  switch (phase) {
    case Phase::kForward:
      return {"mean", "m2"};
    case Phase::kBackward:
      return {"sum_dy", "sum_dy_xmu"};
    case Phase::kSum:
      return {"value", ""};
  }
  return {"", ""};
}

std::optional<Error> CheckLength(const Contribution& contribution, absl::Span<const double> vector, const char* name,
                                 const LayerSpec& spec, Rank rank) {
  const bool may_be_empty = contribution.key.phase == Phase::kBackward ||
                            (contribution.key.phase == Phase::kForward && contribution.count == 0);
  if (vector.size() == spec.channels || (vector.empty() && may_be_empty)) return std::nullopt;
  return VectorLengthError(rank, contribution.key, name, vector.size(), spec.channels);
}

// A hash of numbers in their order, the same in every process.
class BitsDigest {
 public:
  // Two sums take turns: each step is a multiplication that the next one of its kind waits for.
  void Add(uint64_t bits) {
    next_ = Step(next_, bits);
    std::swap(next_, other_);
    swapped_ = !swapped_;
  }
  void Add(absl::Span<const double> values) {
    uint64_t next = next_, other = other_;
    size_t i = 0;
    for (; i + 1 < values.size(); i += 2) {
      next = Step(next, static_cast<uint64_t>(BitsOf(values[i])));
      other = Step(other, static_cast<uint64_t>(BitsOf(values[i + 1])));
    }
    next_ = next;
    other_ = other;
    if (i < values.size()) Add(static_cast<uint64_t>(BitsOf(values[i])));
  }
  uint64_t value() const {
    const auto [second, first] = swapped_ ? std::pair(other_, next_) : std::pair(next_, other_);
    return (first * 0xbf58476d1ce4e5b9u) ^ second;
  }

 private:
  static uint64_t Step(uint64_t sum, uint64_t bits) {
    sum = (sum ^ bits) * 0x9e3779b97f4a7c15u;
    return sum ^ (sum >> 32);
  }

  uint64_t next_ = 0x94d049bb133111ebu;
  uint64_t other_ = 0x2545f4914f6cdd1du;
  bool swapped_ = false;
};

void Add(absl::Span<const double> values, std::vector<double>& sums) {
  const double* const from = values.data();
  double* __restrict const to = sums.data();
  for (size_t c = 0; c < values.size(); ++c) to[c] += from[c];
}

// Merges the moments of another set, neither set being empty.
void MergeChannels(const MergeWeights& weights, const Payload& payload, RoundOutcome& outcome) {
  const double* const from_mean = payload.first.data();
  const double* const from_m2 = payload.second.data();
  double* __restrict const mean = outcome.first.data();
  double* __restrict const m2 = outcome.second.data();
  const size_t channels = outcome.first.size();
  for (size_t c = 0; c < channels; ++c) MergeInto(weights, from_mean[c], from_m2[c], mean[c], m2[c]);
}

// Only forward rounds may refuse infinities: in mixed-precision training gradients overflow regularly, and a loss
// scaler looks for infinities to skip the step.
bool Propagates(Phase phase, const LayerSpec& spec) {
  return phase != Phase::kForward || spec.numeric_policy == NumericPolicy::kPropagate;
}

// Returns an error unless |value| <= bound for all values, or the round propagates what IEEE 754 makes of them.
std::optional<Error> CheckMagnitude(const Contribution& contribution, absl::Span<const double> vector, const char* name,
                                    const LayerSpec& spec, Rank rank, double bound) {
  if (Propagates(contribution.key.phase, spec) || AllWithin(vector, bound)) return std::nullopt;
  for (size_t channel = 0; channel < vector.size(); ++channel) {
    if (std::fabs(vector[channel]) <= bound) continue;
    return MagnitudeError(rank, contribution.key, name, channel, vector[channel], bound);
  }
  return std::nullopt;
}

std::optional<Error> CheckCount(const Contribution& contribution, Rank rank, int64_t max_count) {
  if (contribution.count >= 0 && contribution.count <= max_count) return std::nullopt;
  return CountError(rank, contribution.key, contribution.count, max_count);
}

std::optional<Error> CheckM2(const Contribution& contribution, Rank rank) {
  if (AllPositive(contribution.second)) return std::nullopt;
  for (size_t channel = 0; channel < contribution.second.size(); ++channel) {
    if (!(contribution.second[channel] < 0.0)) continue;
    return NegativeM2Error(rank, contribution.key, channel, contribution.second[channel]);
  }
  return std::nullopt;
}

}  // namespace

bool SameNumbers(const Payload& payload, const Contribution& contribution) {
  return payload.count == contribution.count && payload.backward_role == contribution.backward_role &&
         Bytes(payload.first) == Bytes(contribution.first) && Bytes(payload.second) == Bytes(contribution.second);
}

uint64_t Digest(const Payload& payload) {
  return DigestOf(payload.count, payload.backward_role, payload.first, payload.second);
}

uint64_t Digest(const Contribution& contribution) {
  return DigestOf(contribution.count, contribution.backward_role, contribution.first, contribution.second);
}

uint64_t ResultDigest(const RoundOutcome& outcome) {
  BitsDigest digest;
  digest.Add(static_cast<uint64_t>(outcome.count));
  digest.Add(outcome.backward_required ? 1 : 0);
  for (const std::vector<Rank>* ranks : {&outcome.missing_ranks, &outcome.abstaining_ranks}) {
    digest.Add(ranks->size());
    for (const Rank rank : *ranks) digest.Add(rank);
  }
  for (const std::vector<double>* values : {&outcome.first, &outcome.second}) {
    digest.Add(values->size());
    digest.Add(*values);
  }
  return digest.value() == 0 ? 1 : digest.value();
}

std::optional<Error> CheckNumbers(const Contribution& contribution, const LayerSpec& spec, Rank rank,
                                  const Limits& limits) {
  const VectorNames names = NamesOf(contribution.key.phase);
  const bool forward = contribution.key.phase == Phase::kForward;
  if (auto error = CheckLength(contribution, contribution.first, names.first, spec, rank)) return error;
  if (contribution.key.phase != Phase::kSum) {
    if (auto error = CheckLength(contribution, contribution.second, names.second, spec, rank)) return error;
  }
  if (contribution.key.phase != Phase::kSum && contribution.first.size() != contribution.second.size()) {
    return UnequalLengthsError(rank, contribution, names.first, names.second);
  }
  const double bound = limits.max_magnitude;
  // One look at m2 instead of two, as long as nothing is wrong.
  const bool m2_is_right = forward && AllBetweenZeroAnd(bound * bound, contribution.second);
  if (forward) {
    if (auto error = CheckCount(contribution, rank, limits.max_count)) return error;
    if (!m2_is_right) {
      if (auto error = CheckM2(contribution, rank)) return error;
    }
  }
  if (auto error = CheckMagnitude(contribution, contribution.first, names.first, spec, rank, bound)) return error;
  if (m2_is_right) return std::nullopt;
  return CheckMagnitude(contribution, contribution.second, names.second, spec, rank, bound * bound);
}

void MergeForward(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome) {
  SYNCBN_CHECK(outcome.key.phase == Phase::kForward && !payloads.empty(), Describe(outcome.key));
  int64_t count = 0;
  for (const auto& [rank, payload] : payloads) {
    if (payload.backward_role == BackwardRole::kRequired) outcome.backward_required = true;
    if (payload.backward_role == BackwardRole::kNone) outcome.abstaining_ranks.push_back(rank);
    if (payload.count == 0) continue;
    if (count == 0) {
      outcome.first = payload.first;
      outcome.second = payload.second;
    } else {
      MergeChannels(WeightsOf(count, payload.count), payload, outcome);
    }
    count += payload.count;
  }
  outcome.count = count;
  if (count == 0) {
    outcome.first.assign(channels, 0.0);
    outcome.second.assign(channels, 0.0);
    return;
  }
  for (double& m2 : outcome.second) m2 /= static_cast<double>(count);
}

void MergeSums(const Payloads& payloads, uint32_t channels, RoundOutcome& outcome) {
  SYNCBN_CHECK(outcome.key.phase != Phase::kForward && !payloads.empty(), Describe(outcome.key));
  const bool two = outcome.key.phase == Phase::kBackward;
  outcome.first.assign(channels, 0.0);
  outcome.second.assign(two ? channels : 0, 0.0);
  for (const auto& [rank, payload] : payloads) {
    Add(payload.first, outcome.first);
    Add(payload.second, outcome.second);
  }
}

std::optional<Error> CheckMerged(const RoundOutcome& outcome, const LayerSpec& spec) {
  if (Propagates(outcome.key.phase, spec)) return std::nullopt;
  const VectorNames names = NamesOf(outcome.key.phase);
  const auto overflow = [&](const std::vector<double>& vector, const char* name) -> std::optional<Error> {
    if (AllFinite(vector)) return std::nullopt;
    for (size_t channel = 0; channel < vector.size(); ++channel) {
      if (std::isfinite(vector[channel])) continue;
      return OverflowError(outcome.key, name, channel);
    }
    return std::nullopt;
  };
  if (auto error = overflow(outcome.first, names.first)) return error;
  return overflow(outcome.second, names.second);
}

}  // namespace syncbn::core
