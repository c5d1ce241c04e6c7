// The host's conversions of 16-bit floats, all 65,536 of each, against the definitions of their formats.

#include "kernels/cuda/scalar_types.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace syncbn::kernels::cuda {
namespace {

// A binary format with `exponent_bits` and `fraction_bits`, decoded by its definition.
double Decode(uint16_t bits, int exponent_bits, int fraction_bits) {
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    value = std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  }
  return bits >> 15 ? -value : value;
}

template <typename T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kExponent = 5, kFraction = 10;
};
template <>
struct Format<BFloat16> {
  static constexpr int kExponent = 8, kFraction = 7;
};

template <typename T>
class Conversions : public ::testing::Test {
 public:
  static double DecodeBits(int bits) {
    return Decode(static_cast<uint16_t>(bits), Format<T>::kExponent, Format<T>::kFraction);
  }
};
using Types = ::testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(Conversions, Types);

TYPED_TEST(Conversions, WidenAndNarrowAll) {
  for (int bits = 0; bits < 65536; ++bits) {
    const TypeParam value{static_cast<uint16_t>(bits)};
    const double expected = this->DecodeBits(bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(Widen(value)));
      EXPECT_TRUE(std::isnan(Widen(Narrow<TypeParam>::From(Widen(value)))));
      continue;
    }
    ASSERT_EQ(static_cast<double>(Widen(value)), expected);
    ASSERT_EQ(std::signbit(Widen(value)), std::signbit(expected));
    ASSERT_EQ(Narrow<TypeParam>::From(Widen(value)).bits, bits);
  }
}

TYPED_TEST(Conversions, NarrowGoesToTheNearestAndTiesToEven) {
  // Between every two neighbours: the middle, and the floats next to it.
  const int infinity = ((1 << Format<TypeParam>::kExponent) - 1) << Format<TypeParam>::kFraction;
  for (int bits = 0; bits < infinity; ++bits) {
    const double low = this->DecodeBits(bits);
    // The upper neighbour of the largest number is where the next would be.
    const double high = bits + 1 < infinity ? this->DecodeBits(bits + 1) : 2 * low - this->DecodeBits(bits - 1);
    const float middle = static_cast<float>((low + high) / 2);
    if (static_cast<double>(middle) != (low + high) / 2) continue;  // bfloat16's smallest: no float in between.
    const int even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(Narrow<TypeParam>::From(middle).bits, even) << bits;
    ASSERT_EQ(Narrow<TypeParam>::From(std::nextafterf(middle, 0.0f)).bits, bits);
    ASSERT_EQ(Narrow<TypeParam>::From(std::nextafterf(middle, INFINITY)).bits, bits + 1);
    ASSERT_EQ(Narrow<TypeParam>::From(-middle).bits, even | 0x8000);
  }
  EXPECT_EQ(Narrow<TypeParam>::From(INFINITY).bits, infinity);
}

TEST(Vector, LoadsAndStoresElementsBelowTheLimit) {
  std::vector<uint16_t> source(40), target(40, 0xabcd);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint16_t>(0x3c00 + i);
  const auto* from = reinterpret_cast<const BFloat16*>(source.data());
  auto* to = reinterpret_cast<BFloat16*>(target.data());
  for (int64_t limit = 0; limit <= 8; ++limit) {
    Vector<BFloat16, 8> vector;
    Load(from, 0, limit, true, &vector);
    Store(vector, 0, limit, true, to);
    for (int64_t i = 0; i < 8; ++i) {
      EXPECT_EQ(vector.Get(i), i < limit ? Widen(from[i]) : 0.0f);
      EXPECT_EQ(target[i], i < limit ? source[i] : 0xabcd);
    }
    std::fill(target.begin(), target.end(), 0xabcd);
  }
}

}  // namespace
}  // namespace syncbn::kernels::cuda
