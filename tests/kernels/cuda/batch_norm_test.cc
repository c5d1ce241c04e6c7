// The GPU's algorithms, run on the host: against an oracle in long double, and for equal bits whatever the order of
// blocks and threads.

#include "kernels/batch_norm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tests/kernels/cuda/cases.h"
#include "tests/kernels/cuda/host_kernels.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::testing {
namespace {

using kernels::BackwardCoefficients;
using kernels::Epilogue;
using kernels::ForwardCoefficients;
using kernels::ReluGate;
using Bytes = std::vector<uint8_t>;
using Doubles = std::vector<double>;

OracleShape ToOracle(const TensorShape& shape) {
  OracleShape oracle;
  oracle.batch = shape.batch;
  oracle.channels = shape.channels;
  oracle.spatial = shape.spatial;
  oracle.channels_last = shape.layout == Layout::kChannelsLast;
  return oracle;
}

// Half the distance between neighbours at 1, of a type and of the type that it is computed in.
double RoundoffOf(DataType type) {
  switch (type) {
    case DataType::kFloat64:
      return 0x1p-53;
    case DataType::kFloat32:
      return 0x1p-24;
    case DataType::kFloat16:
      return 0x1p-11;
    case DataType::kBFloat16:
      return 0x1p-8;
  }
  return 0;
}
double WorkingRoundoff(DataType type) { return type == DataType::kFloat64 ? 0x1p-53 : 0x1p-24; }
// A result below this may lose all its bits.
double SmallestOf(DataType type) { return type == DataType::kFloat16 ? 0x1p-24 : 0x1p-140; }

// The largest shape is there for the reductions, which merge it in two levels; the other tests leave it out.
constexpr int64_t kLargest = 300000;

struct Stats {
  Doubles mean, m2;
  bool operator==(const Stats& other) const { return mean == other.mean && m2 == other.m2; }
};

Stats RunStats(const HostRun& run, const TensorShape& shape, const Tensor& x) {
  Stats stats{Doubles(shape.channels, -1), Doubles(shape.channels, -1)};
  HostStats(run, shape, x.data(), stats.mean.data(), stats.m2.data());
  return stats;
}

class CudaAlgorithms : public ::testing::TestWithParam<DataType> {};
INSTANTIATE_TEST_SUITE_P(Types, CudaAlgorithms, ::testing::ValuesIn(kTypes));

TEST_P(CudaAlgorithms, StatsAgreeWithTheOracle) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    SCOPED_TRACE(Describe(shape));
    for (const double mean : {0.0, 3.0}) {
      const Tensor x = RandomTensor(shape, 1, mean, 1.0);
      const Stats stats = RunStats({}, shape, x);
      const OracleStats oracle = testing::Stats(ToOracle(shape), x.Values());
      for (int64_t c = 0; c < shape.channels; ++c) {
        ASSERT_NEAR(stats.mean[c], oracle.mean[c], 1e-7 * (1 + std::fabs(mean))) << c;
        ASSERT_NEAR(stats.m2[c], oracle.m2[c], 1e-6 * oracle.m2[c]) << c;
      }
    }
  }
}

TEST_P(CudaAlgorithms, StatsDependOnNoOrderAndNoAlignment) {
  std::vector<uint32_t> counters(cuda::kCounterBytes / sizeof(uint32_t), 0);
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    SCOPED_TRACE(Describe(shape));
    const Tensor x = RandomTensor(shape, 2, 0.5, 2.0);
    const Tensor shifted = RandomTensor(shape, 2, 0.5, 2.0, 1);
    const Stats expected = RunStats({}, shape, x);
    for (const uint64_t seed : {1, 2, 3}) {
      HostRun run;
      run.seed = seed;
      run.counters = &counters;
      EXPECT_EQ(RunStats(run, shape, x), expected) << "seed " << seed;
    }
    HostRun unaligned;
    unaligned.aligned = false;
    EXPECT_EQ(RunStats(unaligned, shape, shifted), expected);
  }
  EXPECT_EQ(counters, std::vector<uint32_t>(counters.size(), 0)) << "a launch left a counter behind";
}

TEST_P(CudaAlgorithms, ReductionsSignalOnce) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    SCOPED_TRACE(Describe(shape));
    const Tensor x = RandomTensor(shape, 2, 0.5, 2.0);
    std::vector<uint32_t> counters(cuda::kCounterBytes / sizeof(uint32_t), 0);
    uint32_t flag = 0;
    HostRun run;
    run.seed = 9;
    run.counters = &counters;
    run.flag = &flag;
    run.flag_value = 77;
    RunStats(run, shape, x);
    EXPECT_EQ(flag, 77u);
    EXPECT_EQ(counters, std::vector<uint32_t>(counters.size(), 0));
  }
}

// |mean|/std = 1e4, in any arrangement: one value first that is far off, sorted, drifting.
TEST(CudaAccuracy, VarianceOfHardDistributions) {
  TensorShape shape;
  shape.batch = 4;
  shape.channels = 3;
  shape.spatial = 60000;
  const auto oracle_shape = [&] { return ToOracle(shape); };
  for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
    shape.layout = layout;
    for (int kind = 0; kind < 7; ++kind) {
      SCOPED_TRACE(Describe(shape) + " kind " + std::to_string(kind));
      Tensor x(shape.type, shape.size());
      for (int64_t i = 0; i < shape.size(); ++i) {
        const double z = Normal(5, i);
        const double t = static_cast<double>(i) / shape.size();
        double value = 0;
        switch (kind) {
          case 0:
            value = 1e4 + z;
            break;
          case 1:
            value = 1e3 + 0.1 * z;
            break;
          case 2:
            value = i < 96 ? 1e4 : z;
            break;  // The first batches are far off.
          case 3:
            value = 1e4 + 3.4 * (t - 0.5);
            break;  // Sorted.
          case 4:
            value = 1e4 * t + z;
            break;  // Drifting.
          case 5:
            value = 1e20 * z;
            break;  // Squares beyond float32.
          case 6:
            value = i % 7 == 0 ? 3e38 : -3e38;
            break;  // So are differences.
        }
        x.Set(i, value);
      }
      const Stats stats = RunStats({}, shape, x);
      const OracleStats oracle = testing::Stats(oracle_shape(), x.Values());
      for (int64_t c = 0; c < shape.channels; ++c) {
        const double deviation = std::sqrt(static_cast<double>(oracle.m2[c]) / shape.values_per_channel());
        EXPECT_NEAR(stats.mean[c], oracle.mean[c], 1e-6 * deviation);
        EXPECT_NEAR(static_cast<double>(stats.m2[c] / oracle.m2[c]), 1.0, 1e-6);
      }
    }
  }
}

TEST(CudaAccuracy, AConstantHasNoVariance) {
  for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
    TensorShape shape;
    shape.batch = 3;
    shape.channels = 5;
    shape.spatial = 1000;
    shape.layout = layout;
    Tensor x(shape.type, shape.size());
    for (int64_t i = 0; i < shape.size(); ++i) x.Set(i, 0.1);
    const Stats stats = RunStats({}, shape, x);
    for (int64_t c = 0; c < shape.channels; ++c) {
      EXPECT_EQ(stats.mean[c], static_cast<double>(0.1f));
      EXPECT_EQ(stats.m2[c], 0.0);
    }
  }
}

TEST_P(CudaAlgorithms, BadNumbersStayInTheirChannel) {
  for (const double bad : {std::nan(""), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    for (TensorShape shape : SmallShapes(GetParam())) {
      if (shape.size() == 0 || shape.size() > kLargest) continue;
      SCOPED_TRACE(Describe(shape));
      Tensor x = RandomTensor(shape, 3, 0, 1);
      const int64_t where = shape.size() / 2;
      const int64_t hit = static_cast<int64_t>(ToOracle(shape).ChannelOf(where));
      const Stats before = RunStats({}, shape, x);
      x.Set(where, bad);
      const Stats after = RunStats({}, shape, x);
      for (int64_t c = 0; c < shape.channels; ++c) {
        if (c == hit) {
          EXPECT_FALSE(std::isfinite(after.mean[c]));
        } else {
          ASSERT_EQ(after.mean[c], before.mean[c]);
          ASSERT_EQ(after.m2[c], before.m2[c]);
        }
      }
    }
  }
}

// The inputs of a layer's forward and backward pass.
struct Layer {
  explicit Layer(const TensorShape& shape, int misalignment = 0)
      : shape(shape),
        x(RandomTensor(shape, 11, 2.0, 1.5, misalignment)),
        residual(RandomTensor(shape, 12, 0.0, 1.0, misalignment)),
        dy(RandomTensor(shape, 13, 0.1, 1.0, misalignment)),
        mean(RandomVector(shape.channels, 14, 2.0, 0.3)),
        scale(RandomVector(shape.channels, 15, 0.5, 0.2)),
        shift(RandomVector(shape.channels, 16, 0.1, 0.5)),
        mean_dy(RandomVector(shape.channels, 17, 0.1, 0.1)),
        projection(RandomVector(shape.channels, 18, 0.0, 0.1)) {}

  ForwardCoefficients forward() const { return {mean.data(), scale.data(), shift.data()}; }
  BackwardCoefficients backward() const { return {mean.data(), scale.data(), mean_dy.data(), projection.data()}; }

  TensorShape shape;
  Tensor x, residual, dy;
  Doubles mean, scale, shift, mean_dy, projection;
};

TEST_P(CudaAlgorithms, ElemtAgreesWithTheOracle) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    if (shape.size() == 0 || shape.size() > kLargest) continue;
    SCOPED_TRACE(Describe(shape));
    const Layer layer(shape);
    for (int variant = 0; variant < 5; ++variant) {
      SCOPED_TRACE(variant);
      Epilogue epilogue;
      Bytes mask(kernels::ReluMaskBytes(shape.size()), 0xee);
      epilogue.relu = variant == 1 || variant >= 3;
      if (variant >= 2) epilogue.residual = layer.residual.data();
      if (variant == 4) epilogue.relu_mask = mask.data();
      Tensor y(shape.type, shape.size());
      HostElemt({}, shape, layer.x.data(), layer.forward(), epilogue, y.data());
      const Wide before_relu = Forward(ToOracle(shape), layer.x.Values(), layer.mean, layer.scale, layer.shift,
                                       variant >= 2 ? layer.residual.Values() : Doubles(), false);
      for (int64_t i = 0; i < shape.size(); ++i) {
        // The terms are of size ten at most; each is rounded a few times in the working precision.
        const double slack = 64 * WorkingRoundoff(shape.type) + SmallestOf(shape.type);
        double expected = static_cast<double>(before_relu[i]);
        if (epilogue.relu && expected < 0) expected = 0;
        ASSERT_NEAR(y.Get(i), expected, RoundoffOf(shape.type) * std::fabs(expected) + slack) << i;
        if (variant == 4 && std::fabs(before_relu[i]) > slack) {
          ASSERT_EQ(mask[i / 8] >> (i % 8) & 1, before_relu[i] > 0) << i;
        }
      }
      // Bits past the last element are 0.
      if (variant == 4 && shape.size() % 8 != 0) {
        EXPECT_EQ(mask.back() >> (shape.size() % 8), 0);
      }

      HostRun shuffled;
      shuffled.seed = 4;
      shuffled.aligned = false;
      const Layer unaligned(shape, 1);
      Bytes mask_again(mask.size(), 0x11);
      Tensor y_again(shape.type, shape.size(), 1);
      if (epilogue.residual != nullptr) epilogue.residual = unaligned.residual.data();
      if (epilogue.relu_mask != nullptr) epilogue.relu_mask = mask_again.data();
      HostElemt(shuffled, shape, unaligned.x.data(), layer.forward(), epilogue, y_again.data());
      EXPECT_TRUE(y == y_again);
      if (variant == 4) {
        EXPECT_EQ(mask, mask_again);
      }
    }
  }
}

TEST_P(CudaAlgorithms, ElemtWorksInPlace) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    if (shape.size() == 0 || shape.size() > kLargest) continue;
    Layer layer(shape);
    Epilogue epilogue;
    epilogue.residual = layer.residual.data();
    Tensor y(shape.type, shape.size());
    HostElemt({}, shape, layer.x.data(), layer.forward(), epilogue, y.data());
    HostElemt({}, shape, layer.x.data(), layer.forward(), epilogue, layer.x.data());
    EXPECT_TRUE(y == layer.x) << Describe(shape);
  }
}

// A layer with ReLU, by each way to know where its gate is open.
struct GatedLayer : Layer {
  GatedLayer(const TensorShape& shape, int kind, int misalignment = 0)
      : Layer(shape, misalignment), mask(kernels::ReluMaskBytes(shape.size())), open(shape.size(), true) {
    if (kind == 0 || shape.size() == 0) return;
    Epilogue epilogue;
    epilogue.relu = true;
    Tensor y(shape.type, shape.size());
    if (kind == 1) {
      epilogue.residual = residual.data();
      epilogue.relu_mask = mask.data();
    }
    HostRun run;
    run.aligned = misalignment == 0;
    HostElemt(run, shape, x.data(), forward(), epilogue, y.data());
    for (int64_t i = 0; i < shape.size(); ++i) open[i] = kind == 1 ? (mask[i / 8] >> (i % 8) & 1) != 0 : y.Get(i) > 0;
    if (kind == 1) {
      gate.mask = mask.data();
    } else {
      gate.forward = forward();
    }
  }
  Bytes mask;
  std::vector<bool> open;
  ReluGate gate;
};

TEST_P(CudaAlgorithms, BackwardReduceAgreesWithTheOracle) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    for (int kind = 0; kind < 3; ++kind) {
      SCOPED_TRACE(Describe(shape) + " gate " + std::to_string(kind));
      const GatedLayer layer(shape, kind);
      Doubles sum_dy(shape.channels, -1), sum_dy_xmu(shape.channels, -1);
      HostBackwardReduce({}, shape, layer.dy.data(), layer.x.data(), layer.mean.data(), layer.gate, sum_dy.data(),
                         sum_dy_xmu.data());
      const OracleSums oracle =
          BackwardReduce(ToOracle(shape), layer.dy.Values(), layer.x.Values(), layer.mean, layer.open);
      for (int64_t c = 0; c < shape.channels; ++c) {
        const double slack = 20 * WorkingRoundoff(shape.type);
        ASSERT_NEAR(sum_dy[c], oracle.sum_dy[c], slack * oracle.magnitude_dy[c]) << c;
        ASSERT_NEAR(sum_dy_xmu[c], oracle.sum_dy_xmu[c], slack * (oracle.magnitude_dy_xmu[c] + oracle.magnitude_dy[c]))
            << c;
      }
      for (const uint64_t seed : {5, 6}) {
        const GatedLayer unaligned(shape, kind, 1);
        HostRun run;
        run.seed = seed;
        run.aligned = seed == 5;
        const GatedLayer& input = run.aligned ? layer : unaligned;
        Doubles sum_again(shape.channels), sum_xmu_again(shape.channels);
        HostBackwardReduce(run, shape, input.dy.data(), input.x.data(), input.mean.data(), input.gate, sum_again.data(),
                           sum_xmu_again.data());
        EXPECT_EQ(sum_again, sum_dy);
        EXPECT_EQ(sum_xmu_again, sum_dy_xmu);
      }
    }
  }
}

TEST_P(CudaAlgorithms, BackwardElemtAgreesWithTheOracle) {
  for (const TensorShape& shape : SmallShapes(GetParam())) {
    if (shape.size() == 0 || shape.size() > kLargest) continue;
    for (int kind = 0; kind < 3; ++kind) {
      SCOPED_TRACE(Describe(shape) + " gate " + std::to_string(kind));
      const GatedLayer layer(shape, kind);
      Tensor dx(shape.type, shape.size()), d_residual(shape.type, shape.size());
      HostBackwardElemt({}, shape, layer.dy.data(), layer.x.data(), layer.backward(), layer.gate, dx.data(),
                        d_residual.data());
      const Wide oracle = Backward(ToOracle(shape), layer.dy.Values(), layer.x.Values(), layer.mean, layer.scale,
                                   layer.mean_dy, layer.projection, layer.open);
      const double slack = 64 * WorkingRoundoff(shape.type) + SmallestOf(shape.type);
      for (int64_t i = 0; i < shape.size(); ++i) {
        const double expected = static_cast<double>(oracle[i]);
        ASSERT_NEAR(dx.Get(i), expected, RoundoffOf(shape.type) * std::fabs(expected) + slack) << i;
        ASSERT_EQ(d_residual.Get(i), layer.open[i] ? layer.dy.Get(i) : 0.0) << i;
      }
      HostRun run;
      run.seed = 8;
      run.aligned = false;
      GatedLayer again(shape, kind, 1);  // And in place.
      HostBackwardElemt(run, shape, again.dy.data(), again.x.data(), again.backward(), again.gate, again.dy.data(),
                        nullptr);
      EXPECT_TRUE(again.dy == dx);
    }
  }
}

}  // namespace
}  // namespace syncbn::testing
