#include "kernels/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace syncbn::kernels {
namespace {

// A 16-bit format, and the value of its bits by the definition.
struct Format {
  int fraction_bits;
  int bias;
  uint16_t infinity;
  uint16_t (*from)(double);
  double (*to)(uint16_t);
};

const Format kFormats[] = {{10, 15, 0x7C00, Float16FromDouble, Float16ToDouble},
                           {7, 127, 0x7F80, BFloat16FromDouble, BFloat16ToDouble}};

double Value(const Format& format, int bits) {
  const int field = bits >> format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int significand = field == 0 ? fraction : fraction + (1 << format.fraction_bits);
  return std::ldexp(significand, (field == 0 ? 1 : field) - format.bias - format.fraction_bits);
}

TEST(Half, EveryFiniteValueGoesThere_AndBack) {
  for (const Format& format : kFormats) {
    for (int bits = 0; bits < format.infinity; ++bits) {
      const double value = Value(format, bits);
      const uint16_t positive = static_cast<uint16_t>(bits);
      const uint16_t negative = static_cast<uint16_t>(bits | 0x8000);
      ASSERT_EQ(format.to(positive), value);
      ASSERT_EQ(format.to(negative), -value);
      ASSERT_EQ(format.from(value), positive);
      ASSERT_EQ(format.from(-value), negative);
    }
  }
}

TEST(Half, RoundsToNearestAndTiesToEven) {
  for (const Format& format : kFormats) {
    for (int bits = 0; bits < format.infinity; ++bits) {
      // The last interval ends where the next value would be if the exponent went on; beyond its middle is infinity.
      const double low = Value(format, bits);
      const double middle = (low + Value(format, bits + 1)) / 2;
      const int even = bits % 2 == 0 ? bits : bits + 1;
      ASSERT_EQ(format.from(middle), even) << bits;
      ASSERT_EQ(format.from(std::nextafter(middle, 0.0)), bits);
      ASSERT_EQ(format.from(std::nextafter(middle, 1e300)), bits + 1);
      ASSERT_EQ(format.from(-middle), even | 0x8000);
    }
  }
}

TEST(Half, InfinityNanAndZero) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const Format& format : kFormats) {
    EXPECT_EQ(format.from(inf), format.infinity);
    EXPECT_EQ(format.from(-inf), format.infinity | 0x8000);
    EXPECT_EQ(format.from(1e300), format.infinity);
    EXPECT_EQ(format.from(1e-300), 0);
    EXPECT_EQ(format.from(-5e-324), 0x8000);
    EXPECT_EQ(format.from(-0.0), 0x8000);
    EXPECT_EQ(format.to(format.infinity), inf);
    EXPECT_EQ(format.to(format.infinity | 0x8000), -inf);
    for (int bits = format.infinity + 1; bits < 0x8000; ++bits) {
      ASSERT_TRUE(std::isnan(format.to(static_cast<uint16_t>(bits))));
    }
    EXPECT_TRUE(std::isnan(format.to(format.from(std::nan("")))));
    EXPECT_TRUE(std::signbit(format.to(format.from(-std::nan("")))));
  }
}

}  // namespace
}  // namespace syncbn::kernels
