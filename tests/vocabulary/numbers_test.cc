// Each check beside the plain comparison that it stands for, at the places where IEEE 754 has its corners.

#include "vocabulary/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace syncbn {
namespace {

constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<double> Corners() {
  const double nan = std::nan("");
  return {0.0,
          -0.0,
          std::numeric_limits<double>::denorm_min(),
          -std::numeric_limits<double>::denorm_min(),
          1.0,
          -1.0,
          std::nextafter(2.0, 0.0),
          -std::nextafter(2.0, 0.0),
          2.0,
          -2.0,
          std::nextafter(2.0, 3.0),
          -std::nextafter(2.0, 3.0),
          nan,
          -nan,
          kLargest,
          -kLargest,
          kInfinity,
          -kInfinity};
}

// The value among zeros, at each place of a vector that is longer than a register and no multiple of one.
template <typename Check>
void ExpectEverywhere(bool expected, double value, Check check) {
  for (size_t place = 0; place < 11; ++place) {
    std::vector<double> values(11);
    values[place] = value;
    EXPECT_EQ(check(values), expected) << value << " at " << place;
  }
}

TEST(Numbers, MagnitudesWithinABound) {
  for (const double bound : {0.0, 2.0, kLargest}) {
    for (const double value : Corners()) {
      ExpectEverywhere(std::fabs(value) <= bound, value,
                       [bound](const std::vector<double>& values) { return AllWithin(values, bound); });
    }
  }
  EXPECT_TRUE(AllWithin({}, 0.0));
}

TEST(Numbers, ValuesBetweenZeroAndABound) {
  for (const double bound : {0.0, 2.0, kLargest}) {
    for (const double value : Corners()) {
      ExpectEverywhere(value >= 0.0 && value <= bound && !std::signbit(value), value,
                       [bound](const std::vector<double>& values) { return AllBetweenZeroAnd(bound, values); });
    }
  }
  EXPECT_TRUE(AllBetweenZeroAnd(0.0, {}));
}

TEST(Numbers, FiniteValues) {
  for (const double value : Corners()) {
    const bool finite = std::isfinite(value);
    ExpectEverywhere(finite, value, [](const std::vector<double>& values) { return AllFinite(values); });
    ExpectEverywhere(finite && !std::signbit(value), value,
                     [](const std::vector<double>& values) { return AllFinitePositive(values); });
  }
  EXPECT_TRUE(AllFinite({}) && AllFinitePositive({}));
}

TEST(Numbers, ValuesWithoutASign) {
  for (const double value : Corners()) {
    ExpectEverywhere(!std::signbit(value), value,
                     [](const std::vector<double>& values) { return AllPositive(values); });
  }
  EXPECT_TRUE(AllPositive({}));
}

}  // namespace
}  // namespace syncbn
