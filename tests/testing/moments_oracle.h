// The expected merged statistics, in long double and by another formula than the one under test: the pooled mean
// first, then squared deviations from it.

#ifndef SYNCBN_TESTS_TESTING_MOMENTS_ORACLE_H_
#define SYNCBN_TESTS_TESTING_MOMENTS_ORACLE_H_

#include <cstdint>
#include <vector>

namespace syncbn::testing {

// One channel of one worker, or of all.
struct ExactMoments {
  int64_t count = 0;
  long double mean = 0.0L;
  long double m2 = 0.0L;
};

// The moments of the values themselves.
inline ExactMoments MomentsOf(const std::vector<double>& values) {
  ExactMoments exact;
  exact.count = static_cast<int64_t>(values.size());
  if (values.empty()) return exact;
  long double sum = 0.0L;
  for (const double value : values) sum += value;
  exact.mean = sum / static_cast<long double>(values.size());
  for (const double value : values) exact.m2 += (value - exact.mean) * (value - exact.mean);
  return exact;
}

// The moments of the union of disjoint parts.
inline ExactMoments Pool(const std::vector<ExactMoments>& parts) {
  ExactMoments pooled;
  long double sum = 0.0L;
  for (const ExactMoments& part : parts) {
    pooled.count += part.count;
    sum += static_cast<long double>(part.count) * part.mean;
  }
  if (pooled.count == 0) return pooled;
  pooled.mean = sum / static_cast<long double>(pooled.count);
  for (const ExactMoments& part : parts) {
    if (part.count == 0) continue;
    const long double shift = part.mean - pooled.mean;
    pooled.m2 += part.m2 + static_cast<long double>(part.count) * shift * shift;
  }
  return pooled;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_MOMENTS_ORACLE_H_
