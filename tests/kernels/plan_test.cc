#include "kernels/cpu/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/batch_norm.h"

namespace syncbn::kernels {
namespace {

constexpr uint64_t kSeed = 77;

TensorShape RandomShape(std::mt19937_64* rng, int64_t limit) {
  const auto extent = [rng](int64_t max) {
    const int bits = static_cast<int>((*rng)() % 40);
    return static_cast<int64_t>((*rng)() % static_cast<uint64_t>(std::min(max, int64_t{1} << bits)));
  };
  TensorShape shape;
  shape.channels = 1 + extent(limit);
  shape.batch = extent(limit / shape.channels + 1);
  shape.spatial = extent(limit / shape.channels / std::max<int64_t>(shape.batch, 1) + 1);
  if ((*rng)() % 3 == 0) shape.spatial = 1;
  shape.layout = (*rng)() % 2 == 0 ? Layout::kChannelsFirst : Layout::kChannelsLast;
  return shape;
}

std::string Describe(const TensorShape& s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.channels) + "x" + std::to_string(s.spatial) +
         (s.layout == Layout::kChannelsLast ? " channels last" : " channels first") + ", seed " + std::to_string(kSeed);
}

// Counts each element of a plan by walking its units as a kernel does.
void Mark(const cpu::ReductionPlan& plan, const TensorShape& shape, std::vector<int>* seen) {
  for (int64_t unit = 0; unit < plan.units(); ++unit) {
    const cpu::Range counters = plan.CountersOf(unit);
    const cpu::Range chunks = plan.ChunksOf(plan.SplitOf(unit));
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const cpu::Range rows = plan.RowsOf(chunk);
      const cpu::Range columns = plan.ColumnsOf(chunk);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t counter = counters.begin; counter < counters.end; ++counter) {
          for (int64_t column = columns.begin; column < columns.end; ++column) {
            const int64_t i = plan.first_element + (row * plan.width + counter) * plan.columns + column;
            ++(*seen).at(static_cast<size_t>(i));
            const bool last = shape.layout == Layout::kChannelsLast || shape.spatial == 1;
            ASSERT_EQ(counter % shape.channels, last ? i % shape.channels : i / shape.spatial % shape.channels);
          }
        }
      }
    }
  }
}

TEST(Plan, ReductionCoversEveryElementOnce) {
  std::mt19937_64 rng(kSeed);
  for (int round = 0; round < 600; ++round) {
    const TensorShape shape = RandomShape(&rng, round % 10 == 0 ? 1 << 18 : 1 << 12);
    SCOPED_TRACE(Describe(shape));
    ASSERT_EQ(Validate(shape), nullptr);
    const cpu::Reduction reduction = cpu::PlanReduction(shape);
    std::vector<int> seen(static_cast<size_t>(shape.size()), 0);
    Mark(reduction.body, shape, &seen);
    Mark(reduction.rest, shape, &seen);
    for (int count : seen) ASSERT_EQ(count, 1);
  }
}

// Consecutive, from 0 to `end`, none empty.
template <typename Get>
void ExpectPartition(int64_t parts, int64_t end, Get get) {
  int64_t at = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const cpu::Range range = get(i);
    ASSERT_EQ(range.begin, at);
    ASSERT_GT(range.end, range.begin);
    at = range.end;
  }
  ASSERT_EQ(at, end);
}

void CheckLargePlan(const cpu::ReductionPlan& plan) {
  ExpectPartition(plan.splits(), plan.chunks(), [&](int64_t i) { return plan.ChunksOf(i); });
  ExpectPartition(plan.splits() == 0 ? 0 : plan.blocks(), plan.splits() == 0 ? 0 : plan.width,
                  [&](int64_t i) { return plan.CountersOf(i); });
  ExpectPartition(plan.column_chunks(), plan.columns, [&](int64_t i) { return plan.ColumnsOf(i); });
  ExpectPartition(plan.chunks() / plan.column_chunks(), plan.rows,
                  [&](int64_t i) { return plan.RowsOf(i * plan.column_chunks()); });
  EXPECT_LE(plan.splits() * plan.width, std::max<int64_t>(2 * plan.width, 256 * 130));
}

TEST(Plan, LargeReductionsArePartitions) {
  std::mt19937_64 rng(kSeed + 1);
  for (int round = 0; round < 300; ++round) {
    const TensorShape shape = RandomShape(&rng, int64_t{1} << 36);
    SCOPED_TRACE(Describe(shape));
    const cpu::Reduction reduction = cpu::PlanReduction(shape);
    const auto elements = [](const cpu::ReductionPlan& plan) { return plan.rows * plan.width * plan.columns; };
    ASSERT_EQ(elements(reduction.body) + elements(reduction.rest), shape.size());
    if (elements(reduction.body) > int64_t{1} << 34) continue;  // The walk below is over chunks.
    CheckLargePlan(reduction.body);
    CheckLargePlan(reduction.rest);
  }
}

TEST(Plan, ElementwiseUnitsBeginAtWholeMaskBytes) {
  std::mt19937_64 rng(kSeed + 2);
  for (int round = 0; round < 300; ++round) {
    const TensorShape shape = RandomShape(&rng, round % 2 == 0 ? 1 << 12 : int64_t{1} << 36);
    SCOPED_TRACE(Describe(shape));
    const cpu::ElementwisePlan plan = cpu::PlanElementwise(shape);
    ExpectPartition(plan.units(), shape.size(), [&](int64_t i) { return plan.ElementsOf(i); });
    for (int64_t unit = 0; unit < std::min<int64_t>(plan.units(), 10); ++unit) {
      ASSERT_EQ(plan.ElementsOf(unit).begin % 8, 0);
    }
    ASSERT_EQ(plan.period % shape.channels, 0);
    for (int i = 0; i < 100 && shape.size() > 0; ++i) {
      const int64_t element = static_cast<int64_t>(rng() % static_cast<uint64_t>(shape.size()));
      const int64_t channel =
          shape.layout == Layout::kChannelsLast ? element % shape.channels : element / shape.spatial % shape.channels;
      ASSERT_EQ(element / plan.repeat % plan.period % shape.channels, channel);
    }
  }
}

TEST(Validate, AcceptsShapes) {
  EXPECT_EQ(Validate({2, 3, 4}), nullptr);
  EXPECT_EQ(Validate({0, 1, 0}), nullptr);
  EXPECT_EQ(Validate({int64_t{1} << 31, int64_t{1} << 31, 1}), nullptr);
  EXPECT_EQ(Validate({0, INT64_MAX, INT64_MAX}), nullptr);
}

TEST(Validate, NamesWhatIsWrong) {
  EXPECT_STREQ(Validate({2, 0, 4}), "a tensor needs at least one channel");
  EXPECT_STREQ(Validate({-1, 1, 4}), "the batch extent is negative");
  EXPECT_STREQ(Validate({1, 1, -4}), "the spatial extent is negative");
  EXPECT_STREQ(Validate({int64_t{1} << 31, int64_t{1} << 31, 2}), "the tensor has more than 2^62 elements");
  EXPECT_STREQ(Validate({INT64_MAX, INT64_MAX, INT64_MAX}), "the tensor has more than 2^62 elements");
  EXPECT_STREQ(Validate({1, 1, 1, static_cast<DataType>(9)}), "unknown data type");
  EXPECT_STREQ(Validate({1, 1, 1, DataType::kFloat32, static_cast<Layout>(2)}), "unknown layout");
}

}  // namespace
}  // namespace syncbn::kernels
