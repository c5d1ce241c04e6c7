#include "tests/simulation/numbers.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/testing/moments_oracle.h"

namespace syncbn::simulation {
namespace {

bool SameBits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) {
           return (x == y && std::signbit(x) == std::signbit(y)) || (std::isnan(x) && std::isnan(y));
         });
}

bool Near(double actual, long double expected, long double scale) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= 1e-10L * scale + 1e-18L;  // False for a NaN.
}

// Merges one channel of a forward round.
void MergeMoments(const HeldParts& parts, uint32_t channel, Merged* merged) {
  std::vector<testing::ExactMoments> moments;
  long double scale = 0.0L;
  for (const auto& [rank, held] : parts) {
    const testing::Numbers& numbers = *held.numbers;
    if (numbers.count == 0) continue;
    moments.push_back({numbers.count, numbers.first[channel], numbers.second[channel]});
    scale = std::max(scale, std::fabs(static_cast<long double>(numbers.first[channel])));
  }
  const testing::ExactMoments pooled = testing::Pool(moments);
  const long double var = pooled.count == 0 ? 0.0L : pooled.m2 / pooled.count;
  merged->count = pooled.count;
  merged->first.push_back(pooled.mean);
  merged->second.push_back(var);
  merged->first_scale.push_back(scale);
  // The mean of the first ranks is rounded by 1e-16 of itself, and the deviation of the next rank from it by as much:
  // 1e-6 of the scale would do.
  merged->second_scale.push_back(var + 1e-5L * scale * std::sqrt(var));
}

// Adds one channel of one of the contributions' two vectors.
void MergeSums(const HeldParts& parts, uint32_t channel, std::vector<double> testing::Numbers::*vector,
               std::vector<long double>* sums, std::vector<long double>* scales) {
  long double sum = 0.0L;
  long double scale = 0.0L;
  for (const auto& [rank, held] : parts) {
    const std::vector<double>& values = (*held.numbers).*vector;
    if (values.empty()) continue;
    sum += values[channel];
    scale += std::fabs(static_cast<long double>(values[channel]));
  }
  sums->push_back(sum);
  scales->push_back(scale);
}

}  // namespace

bool SameNumbers(const testing::Numbers& a, const testing::Numbers& b) {
  return a.count == b.count && a.role == b.role && SameBits(a.first, b.first) && SameBits(a.second, b.second);
}

bool IsBad(core::Phase phase, const testing::Numbers& numbers, const core::LayerSpec& spec) {
  const bool may_be_empty = phase == core::Phase::kBackward || (phase == core::Phase::kForward && numbers.count == 0);
  const size_t second = phase == core::Phase::kSum ? 0 : spec.channels;
  const auto fits = [&](const std::vector<double>& vector, size_t length) {
    return vector.size() == length || (vector.empty() && may_be_empty);
  };
  if (!fits(numbers.first, spec.channels) || !fits(numbers.second, second) || numbers.count < 0) return true;
  if (phase != core::Phase::kForward) return false;  // They take any value.
  for (const double value : numbers.first) {
    if (!std::isfinite(value)) return true;
  }
  for (const double value : numbers.second) {
    if (!std::isfinite(value) || value < 0.0) return true;
  }
  return false;
}

Merged Merge(const core::RoundKey& key, uint32_t channels, const HeldParts& parts, int64_t forward_count) {
  Merged merged;
  merged.count = key.phase == core::Phase::kBackward ? forward_count : 0;
  for (uint32_t c = 0; c < channels; ++c) {
    if (key.phase == core::Phase::kForward) {
      MergeMoments(parts, c, &merged);
      continue;
    }
    MergeSums(parts, c, &testing::Numbers::first, &merged.first, &merged.first_scale);
    if (key.phase == core::Phase::kSum) continue;
    MergeSums(parts, c, &testing::Numbers::second, &merged.second, &merged.second_scale);
  }
  return merged;
}

std::string CompareNumbers(const core::RoundOutcome& outcome, const Merged& merged) {
  if (outcome.count != merged.count || outcome.first.size() != merged.first.size() ||
      outcome.second.size() != merged.second.size()) {
    return absl::StrCat(Name(outcome.key), " is merged to another size");
  }
  const auto compare = [&](const char* which, const auto& actual, const auto& expected,
                           const auto& scale) -> std::string {
    for (size_t c = 0; c < expected.size(); ++c) {
      if (Near(actual[c], expected[c], scale[c])) continue;
      return absl::StrFormat("%s is merged wrongly: %s number %d is %.17g, not %.20Lg", Name(outcome.key), which, c,
                             actual[c], expected[c]);
    }
    return "";
  };
  const std::string wrong = compare("first", outcome.first, merged.first, merged.first_scale);
  return wrong.empty() ? compare("second", outcome.second, merged.second, merged.second_scale) : wrong;
}

void RunningModel::Add(const Merged& round, const core::LayerSpec& spec, bool later) {
  mixed_ = mixed_ || (any_later_ && !later);
  any_later_ = any_later_ || later;
  if (round.count == 0) return;
  // Begun anew with another number of channels; what comes late from before does not count.
  if (!mean_.empty() && mean_.size() != spec.channels) {
    mixed_ = mixed_ || later_;
    mean_.clear();
    var_.clear();
    updates_ = 0;
  }
  later_ = later;
  mean_.resize(spec.channels, 0.0L);
  var_.resize(spec.channels, 1.0L);
  ++updates_;
  const long double weight = spec.momentum.has_value() ? *spec.momentum : 1.0L / updates_;
  for (uint32_t c = 0; c < spec.channels; ++c) {
    mean_[c] += weight * (round.first[c] - mean_[c]);
    if (round.count == 1 && !spec.biased_running_variance) continue;
    const long double n = round.count;
    const long double var = spec.biased_running_variance ? round.second[c] : round.second[c] * n / (n - 1);
    var_[c] += weight * (var - var_[c]);
  }
}

bool RunningModel::Agrees(const core::LayerView& view) const {
  if (mixed_) return true;
  // Nothing is shown of statistics that are of another size than the layer has come to have.
  const bool shown = mean_.empty() || view.running.mean.size() == mean_.size();
  if (!shown && view.running.updates == 0) return true;
  bool right = shown && view.running.updates == updates_;
  for (size_t c = 0; right && c < mean_.size(); ++c) {
    right = Near(view.running.mean[c], mean_[c], 1.0L + std::fabs(mean_[c])) &&
            Near(view.running.var[c], var_[c], 1.0L + std::fabs(var_[c]));
  }
  return right;
}

}  // namespace syncbn::simulation
