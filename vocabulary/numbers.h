// Checks of the numbers of a round, all channels at once. Loops have no early exit, so that they vectorize; the caller
// searches for the channel to name once a check has failed.
//
// Thread safety: pure functions.
#ifndef SYNCBN_VOCABULARY_NUMBERS_H_
#define SYNCBN_VOCABULARY_NUMBERS_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/types/span.h"

namespace syncbn {

inline int64_t BitsOf(double value) {
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Returns true if |value| <= bound for all values; NaN fails. As integers without their signs, doubles are ordered by
// magnitude, and NaN is the greatest. bound >= 0.
inline bool AllWithin(absl::Span<const double> values, double bound) {
  const int64_t greatest = BitsOf(bound);
  int64_t signs = 0;
  for (const double value : values) signs |= greatest - (BitsOf(value) & std::numeric_limits<int64_t>::max());
  return signs >= 0;
}

// Returns true if 0 <= value <= bound for all values. False does not imply that one is not: -0 is none of these.
inline bool AllBetweenZeroAnd(double bound, absl::Span<const double> values) {
  const int64_t greatest = BitsOf(bound);
  int64_t signs = 0;
  for (const double value : values) {
    const int64_t bits = BitsOf(value);
    signs |= bits | (greatest - (bits & std::numeric_limits<int64_t>::max()));
  }
  return signs >= 0;
}

// A double's bits but for its sign.
inline constexpr uint64_t kWithoutSign = std::numeric_limits<int64_t>::max();
// A step of a double's exponent. Added to the bits without sign, it reaches the sign bit from infinity and NaN alone,
// which have the greatest exponent.
inline constexpr uint64_t kExponentStep = uint64_t{1} << 52;

// Returns true if no value is infinite or NaN.
inline bool AllFinite(absl::Span<const double> values) {
  uint64_t signs = 0;
  for (const double value : values) signs |= (static_cast<uint64_t>(BitsOf(value)) & kWithoutSign) + kExponentStep;
  return static_cast<int64_t>(signs) >= 0;
}

// Returns true if all values are finite, and none has its sign bit set: -0 has.
inline bool AllFinitePositive(absl::Span<const double> values) {
  uint64_t signs = 0;
  for (const double value : values) {
    const auto bits = static_cast<uint64_t>(BitsOf(value));
    signs |= bits | (bits + kExponentStep);
  }
  return static_cast<int64_t>(signs) >= 0;
}

// Returns true if no value has its sign bit set. False does not imply a negative value: -0 and NaN may have it too.
inline bool AllPositive(absl::Span<const double> values) {
  int64_t signs = 0;
  for (const double value : values) signs |= BitsOf(value);
  return signs >= 0;
}

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_NUMBERS_H_
