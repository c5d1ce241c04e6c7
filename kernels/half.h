// The 16-bit floating-point types, one value at a time, for host and device: to double exactly, and from double with
// one rounding to nearest, ties to even. NaN stays a (quiet) NaN of the same sign; a value that is too large becomes
// infinity.

#ifndef SYNCBN_KERNELS_HALF_H_
#define SYNCBN_KERNELS_HALF_H_

#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"

namespace syncbn::kernels {

namespace internal {

// A 16-bit format: one sign bit, 15 - kFractionBits exponent bits, kFractionBits fraction bits.
template <int kFractionBits>
struct SmallFloat {
  static constexpr int kMaxExponentField = (1 << (15 - kFractionBits)) - 1;
  static constexpr int kBias = kMaxExponentField / 2;
  static constexpr uint16_t kInfinity = static_cast<uint16_t>(kMaxExponentField << kFractionBits);

  SYNCBN_HOST_DEVICE static uint16_t FromDouble(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint16_t sign = static_cast<uint16_t>(bits >> 63 << 15);
    const int exponent = static_cast<int>(bits >> 52 & 0x7FF) - 1023;
    const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
    if (exponent == 1024 && fraction != 0) return sign | kInfinity | uint16_t{1} << (kFractionBits - 1);
    if (exponent > kBias) return sign | kInfinity;
    if (exponent < 1 - kBias - kFractionBits - 1) return sign;  // Below half of the smallest subnormal.
    // The bits that are shifted out are rounded; a subnormal result shifts out more. A carry out of the fraction moves
    // into the exponent, and out of the largest exponent into infinity, as it should.
    const bool subnormal = exponent < 1 - kBias;
    const int shift = 52 - kFractionBits + (subnormal ? 1 - kBias - exponent : 0);
    const uint64_t significand = subnormal ? fraction | uint64_t{1} << 52 : fraction;
    const uint64_t field = subnormal ? 0 : static_cast<uint64_t>(exponent + kBias) << kFractionBits;
    const uint64_t truncated = field + (significand >> shift);
    const uint64_t rest = significand & ((uint64_t{1} << shift) - 1);
    const uint64_t half = uint64_t{1} << (shift - 1);
    const bool up = rest > half || (rest == half && (truncated & 1) != 0);
    return static_cast<uint16_t>(sign | (truncated + (up ? 1 : 0)));
  }

  SYNCBN_HOST_DEVICE static double ToDouble(uint16_t half) {
    const uint64_t sign = static_cast<uint64_t>(half >> 15) << 63;
    const int field = half >> kFractionBits & kMaxExponentField;
    const uint64_t fraction = half & ((1u << kFractionBits) - 1);
    uint64_t bits = fraction << (52 - kFractionBits);
    if (field == kMaxExponentField) {
      bits |= uint64_t{0x7FF} << 52;
      if (fraction != 0) bits |= uint64_t{1} << 51;
    } else if (field != 0) {
      bits |= static_cast<uint64_t>(field - kBias + 1023) << 52;
    } else {
      // A subnormal is an integer times a power of two; both are exact in a double.
      const uint64_t unit_bits = static_cast<uint64_t>(1 - kBias - kFractionBits + 1023) << 52;
      double unit;
      memcpy(&unit, &unit_bits, sizeof(unit));
      const double magnitude = static_cast<double>(fraction) * unit;
      memcpy(&bits, &magnitude, sizeof(bits));
    }
    bits |= sign;
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

}  // namespace internal

// IEEE 754 binary16.
SYNCBN_HOST_DEVICE inline uint16_t Float16FromDouble(double value) {
  return internal::SmallFloat<10>::FromDouble(value);
}
SYNCBN_HOST_DEVICE inline double Float16ToDouble(uint16_t bits) { return internal::SmallFloat<10>::ToDouble(bits); }

// The upper half of a binary32.
SYNCBN_HOST_DEVICE inline uint16_t BFloat16FromDouble(double value) {
  return internal::SmallFloat<7>::FromDouble(value);
}
SYNCBN_HOST_DEVICE inline double BFloat16ToDouble(uint16_t bits) { return internal::SmallFloat<7>::ToDouble(bits); }

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_HALF_H_
