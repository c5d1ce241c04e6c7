// The plan covers every value once, whatever the shape, and stays within what a launch can have.

#include "kernels/cuda/plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/batch_norm.h"
#include "kernels/cuda/plane_vector.cuh"
#include "kernels/cuda/reduce.cuh"

namespace syncbn::kernels::cuda {
namespace {

constexpr uint64_t kSeed = 20240607;

TensorShape RandomShape(std::mt19937_64* random, int64_t largest) {
  const auto extent = [&](int64_t most) {
    return 1 + static_cast<int64_t>(
                   std::exp(std::uniform_real_distribution<>(0, std::log(static_cast<double>(most)))(*random)));
  };
  TensorShape shape;
  shape.batch = extent(largest);
  shape.channels = extent(largest);
  shape.spatial = extent(largest);
  shape.type = static_cast<DataType>((*random)() % 4);
  shape.layout = static_cast<Layout>((*random)() % 2);
  return shape;
}

void CheckLimits(const ReducePlan& plan, const TensorShape& shape) {
  EXPECT_GE(plan.threads(), kMaxThreads / 2);
  EXPECT_LE(plan.threads(), kMaxThreads);
  EXPECT_LE(plan.accumulators, plan.threads());
  EXPECT_LE(plan.accumulators * plan.member_helpers, plan.threads());
  EXPECT_LE(plan.accumulators * plan.slot_helpers, plan.threads());
  EXPECT_GE(plan.splits, 1);
  EXPECT_GE(plan.group * plan.groups, plan.splits);
  EXPECT_LT(plan.group * (plan.groups - 1), plan.splits);
  if (plan.splits > 1) {
    // Every counter that is used lies in the workspace's front.
    EXPECT_LE((2 + plan.tiles + plan.tiles * plan.groups) * sizeof(uint32_t), kCounterBytes);
    EXPECT_LE(plan.blocks(), 4 * 132);
  }
  // No block without work.
  if (plan.batches > 0) {
    EXPECT_LE(plan.splits, plan.batches);
  }
  EXPECT_EQ(plan.replicas > 1, plan.mapping == Mapping::kRows && shape.channels % plan.vector_width != 0);
}

TEST(ReducePlan, LimitsHoldForAllShapes) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 20000; ++i) {
    const TensorShape shape = RandomShape(&random, 100000);
    SCOPED_TRACE(testing::Message() << shape.batch << "x" << shape.channels << "x" << shape.spatial << " type "
                                    << static_cast<int>(shape.type) << " layout " << static_cast<int>(shape.layout));
    for (const int tensors : {1, 2}) CheckLimits(PlanReduce(shape, tensors), shape);
    if (HasFailure()) return;
  }
}

// Marks every element that the threads of a plan visit.
std::vector<int> Visits(const TensorShape& shape, const ReducePlan& plan, bool* right_channel) {
  std::vector<int> visits(shape.size());
  const int width = plan.vector_width;
  *right_channel = true;
  const auto visit = [&](int64_t element, int64_t channel) {
    const int64_t actual =
        shape.layout == Layout::kChannelsLast ? element % shape.channels : element / shape.spatial % shape.channels;
    ++visits[element];
    if (actual != channel) *right_channel = false;
  };
  for (int64_t block = 0; block < plan.blocks(); ++block) {
    for (int thread = 0; thread < plan.threads(); ++thread) {
      const bool rows = plan.mapping == Mapping::kRows;
      const Place at = rows ? PlaceOf<Mapping::kRows>(plan, thread) : PlaceOf<Mapping::kPlanes>(plan, thread);
      const int64_t column = block % plan.tiles * plan.tile_columns + at.column;
      for (int64_t batch = block / plan.tiles; batch < plan.batches; batch += plan.splits) {
        for (int u = 0; u < plan.unroll; ++u) {
          const int64_t unit = batch * plan.members * plan.unroll + at.member + u * plan.members;
          if (rows) {
            if (unit >= plan.rows || column >= plan.columns) continue;
            for (int v = 0; v < width; ++v) {
              visit((unit * plan.columns + column) * width + v, (column * width + v) % shape.channels);
            }
          } else if (column < plan.channels) {
            const PlaneVector vector = FindPlaneVector(plan, column, unit, width);
            for (int v = 0; v < width; ++v) {
              if (vector.valid >> v & 1) visit(vector.first + v, column);
            }
          }
        }
      }
    }
  }
  for (int64_t i = shape.size() - plan.tail; i < shape.size(); ++i) ++visits[i];
  return visits;
}

TEST(ReducePlan, EveryValueIsVisitedOnce) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 300; ++i) {
    const TensorShape shape = RandomShape(&random, 60);
    for (const int tensors : {1, 2}) {
      bool right_channel = false;
      const std::vector<int> visits = Visits(shape, PlanReduce(shape, tensors), &right_channel);
      EXPECT_EQ(visits, std::vector<int>(visits.size(), 1));
      EXPECT_TRUE(right_channel);
    }
  }
}

TEST(ReducePlan, LargeTensorsKeepTheMachineBusy) {
  TensorShape shape;
  shape.batch = 32;
  shape.channels = 64;
  shape.spatial = 112 * 112;
  EXPECT_EQ(PlanReduce(shape, 1).blocks(), 512);
  shape.batch = 128;
  shape.channels = 4;  // One channel goes over many blocks.
  shape.spatial = 224 * 224;
  EXPECT_EQ(PlanReduce(shape, 1).blocks(), 528);
  shape.layout = Layout::kChannelsLast;
  shape.channels = 3;  // No thread idles but one of 256.
  EXPECT_EQ(PlanReduce(shape, 1).threads(), 255);
}

TEST(ReducePlan, TensorsPast32Bits) {
  TensorShape shape;
  shape.batch = int64_t{1} << 33;
  shape.channels = 3;
  shape.spatial = 5;
  for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
    shape.layout = layout;
    const ReducePlan plan = PlanReduce(shape, 1);
    CheckLimits(plan, shape);
    if (plan.mapping == Mapping::kRows) {
      EXPECT_EQ(plan.rows * plan.columns * plan.vector_width + plan.tail, shape.size());
      continue;
    }
    // The last vector of the last channel ends at the tensor's end.
    int64_t end = 0;
    for (int64_t unit = plan.units - 3; unit < plan.units; ++unit) {
      const PlaneVector vector = FindPlaneVector(plan, 2, unit, plan.vector_width);
      for (int v = 0; v < plan.vector_width; ++v) {
        if (vector.valid >> v & 1) end = vector.first + v + 1;
      }
    }
    EXPECT_EQ(end, shape.size());
  }
}

TEST(ElementPlan, CoversTheTensorWithinSharedMemory) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 20000; ++i) {
    const TensorShape shape = RandomShape(&random, 100000);
    const int width = random() % 2 ? 8 : VectorWidth(shape.type);
    const ElementPlan plan = PlanElement(shape, width, width * static_cast<int>(SizeOf(shape.type)));
    if (plan.mapping == Mapping::kRows) {
      ASSERT_EQ(plan.rows * plan.columns * width + plan.tail, shape.size());
      ASSERT_LE(plan.block_threads, kMaxThreads);
      ASSERT_LE(plan.splits, 65535);  // The second extent of a grid.
      continue;
    }
    ASSERT_GT(plan.tile_elements, 0);
    ASSERT_EQ(plan.tile_elements % width, 0);
    ASSERT_EQ(plan.splits, 1);
    ASSERT_GE(plan.tiles * plan.tile_elements, shape.size());
    ASSERT_LT((plan.tiles - 1) * plan.tile_elements, shape.size());
    ASSERT_LE(plan.max_planes, kMaxPlanes);
    // A tile that begins with a plane's last element.
    ASSERT_LE((plan.tile_elements - 1 + shape.spatial - 1) / shape.spatial + 1, plan.max_planes);
    ASSERT_LE(plan.tile_elements, plan.block_threads * plan.unroll * width);
  }
}

TEST(FastDivide, AgreesWithDivision) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  std::vector<int64_t> divisors = {1,
                                   2,
                                   3,
                                   5,
                                   7,
                                   10,
                                   641,
                                   65535,
                                   65536,
                                   65537,
                                   (int64_t{1} << 31) - 1,
                                   int64_t{1} << 31,
                                   (int64_t{1} << 31) + 1,
                                   int64_t{1} << 40};
  for (int i = 0; i < 1000; ++i) divisors.push_back(1 + static_cast<int64_t>(random() >> (33 + random() % 30)));
  for (const int64_t divisor : divisors) {
    const FastDivide divide = FastDivide::By(divisor);
    for (int i = 0; i < 300; ++i) {
      const int64_t dividend = static_cast<int64_t>(random() >> (2 + random() % 62));
      ASSERT_EQ(divide(dividend), dividend / divisor) << dividend << " / " << divisor;
      const int64_t multiple = dividend / divisor * divisor;
      ASSERT_EQ(divide(multiple), multiple / divisor);
      if (multiple > 0) {
        ASSERT_EQ(divide(multiple - 1), (multiple - 1) / divisor);
      }
    }
  }
}

}  // namespace
}  // namespace syncbn::kernels::cuda
