// The sums that one thread of the statistics accumulates, over more values than a test's tensor gives to a thread.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/stats.cuh"
#include "tests/kernels/cuda/cases.h"

namespace syncbn::kernels::cuda {
namespace {

constexpr int kBatch = 8;

// Adds value(0), ..., value(count - 1) and returns M2, with the oracle's in *expected.
template <typename Value>
double SumOf(int64_t count, Value value, long double* expected) {
  ChannelSums<float> sums;
  for (int64_t first = 0; first < count; first += kBatch) {
    AddBatch<kBatch>([&](int i) { return value(first + i); }, (1u << kBatch) - 1, kBatch, first, &sums);
  }
  long double mean = 0;
  for (int64_t i = 0; i < count; ++i) mean += static_cast<long double>(value(i)) / count;
  *expected = 0;
  for (int64_t i = 0; i < count; ++i) *expected += (value(i) - mean) * (value(i) - mean);
  ShiftedSums shifted;
  shifted.count = count;
  shifted.pivot = static_cast<double>(value(0));
  const Sums shared = Shared(sums, count, value(0));
  shifted.sum = shared.word[0];
  shifted.sum_squares = shared.word[1];
  return ToMoments(shifted).m2;
}

// The pivot that one outlier in the first batch spoils is left behind; with it, every later value's square would carry
// a rounding error of the outlier's size.
TEST(ChannelSums, AnOutlierInTheFirstBatch) {
  const auto value = [](int64_t i) { return i == 3 ? 1000.0f : 1.37f + 0.001f * static_cast<float>(i % 5); };
  long double expected = 0;
  const double m2 = SumOf(2000000, value, &expected);
  EXPECT_NEAR(static_cast<double>(m2 / expected), 1.0, 1e-6);
}

// Two plateaus: the pivot follows to the second.
TEST(ChannelSums, AStep) {
  const auto value = [](int64_t i) {
    return (i < 800 ? 0.0f : 777.77f) + static_cast<float>(0.01 * syncbn::testing::Normal(3, i));
  };
  long double expected = 0;
  const double m2 = SumOf(2000000, value, &expected);
  EXPECT_NEAR(static_cast<double>(m2 / expected), 1.0, 1e-6);
}

}  // namespace
}  // namespace syncbn::kernels::cuda
