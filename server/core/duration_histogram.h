// A distribution of durations, in buckets whose bounds grow by a factor of 2.5.

#ifndef SYNCBN_SERVER_CORE_DURATION_HISTOGRAM_H_
#define SYNCBN_SERVER_CORE_DURATION_HISTOGRAM_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace syncbn::core {

// Counts durations from 0 to infinity. Adding one allocates nothing.
//
// Thread safety: none; a value.
class DurationHistogram {
 public:
  // Buckets with a bound; one more counts what exceeds the greatest.
  static constexpr size_t kBounds = 15;

  // Returns the greatest duration of a bucket: 100 us for the first, 37 s for the last.
  static absl::Duration Bound(size_t bucket) {
    absl::Duration bound = absl::Microseconds(100);
    for (size_t i = 0; i < bucket; ++i) bound = bound * 5 / 2;
    return bound;
  }

  void Add(absl::Duration duration) {
    static const std::array<absl::Duration, kBounds> bounds = [] {
      std::array<absl::Duration, kBounds> all;
      for (size_t i = 0; i < kBounds; ++i) all[i] = Bound(i);
      return all;
    }();
    const auto bucket = std::lower_bound(bounds.begin(), bounds.end(), duration) - bounds.begin();
    ++counts_[static_cast<size_t>(bucket)];
    ++count_;
    sum_ += duration;
  }

  uint64_t count() const { return count_; }
  absl::Duration sum() const { return sum_; }
  // The number of durations in a bucket, up to its bound and above the bound before it. Bucket kBounds has the rest.
  uint64_t in_bucket(size_t bucket) const { return counts_[bucket]; }

  // Returns an estimate of the duration that the fraction `p` of all does not exceed: exact to its bucket, within which
  // durations are taken to be spread evenly. Zero if there are none; the greatest bound for what exceeds it.
  absl::Duration Quantile(double p) const {
    const double wanted = p * static_cast<double>(count_);
    double below = 0.0;
    for (size_t i = 0; i < kBounds; ++i) {
      const auto inside = static_cast<double>(counts_[i]);
      if (inside > 0.0 && below + inside >= wanted) {
        const absl::Duration from = i == 0 ? absl::ZeroDuration() : Bound(i - 1);
        return from + (Bound(i) - from) * std::max(0.0, (wanted - below) / inside);
      }
      below += inside;
    }
    return count_ == 0 ? absl::ZeroDuration() : Bound(kBounds - 1);
  }

 private:
  std::array<uint64_t, kBounds + 1> counts_ = {};
  uint64_t count_ = 0;
  absl::Duration sum_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_DURATION_HISTOGRAM_H_
