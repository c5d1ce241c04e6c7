// FinalizeForward and FinalizeBackward, one channel at a time, against the formulas in long double.

#include "kernels/finalize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/cuda/cases.h"
#include "tests/kernels/cuda/host_kernels.h"

namespace syncbn::testing {
namespace {

using kernels::FinalizeBackwardArguments;
using kernels::FinalizeBackwardChannel;
using kernels::FinalizeForwardArguments;
using kernels::FinalizeForwardChannel;
using kernels::PendingRound;
using kernels::RoundWords;
using Doubles = std::vector<double>;

constexpr int64_t kChannels = 9;
constexpr double kEps = 0.5;

kernels::ConstVectorView View(const Doubles& values) { return {values.data(), DataType::kFloat64}; }

struct Statistics {
  Doubles mean = RandomVector(kChannels, 1, 2.0, 1.0);
  Doubles var = RandomVector(kChannels, 2, 0.6, 0.3);  // Some are below kEps, some above.
  Tensor Parameter(DataType type, uint64_t seed) const {
    Tensor tensor(type, kChannels);
    for (int64_t c = 0; c < kChannels; ++c) tensor.Set(c, 1.0 + 0.25 * Normal(seed, c));
    return tensor;
  }
};

long double ExpectedInvstd(long double var, EpsMode mode) {
  const long double eps = kEps;
  return 1 / std::sqrt(mode == EpsMode::kAdd ? var + eps : std::max(var, eps));
}

TEST(Finalize, Forward) {
  const Statistics input;
  for (const DataType type : kTypes) {
    for (const EpsMode mode : {EpsMode::kAdd, EpsMode::kClamp}) {
      for (const int64_t count : {0, 1, 100}) {
        const Tensor weight = input.Parameter(type, 3), bias = input.Parameter(type, 4);
        Tensor running_mean = input.Parameter(type, 5), running_var = input.Parameter(type, 6);
        const Tensor mean_before = running_mean, var_before = running_var;
        Doubles mean(kChannels), scale(kChannels), shift(kChannels);
        FinalizeForwardArguments arguments;
        arguments.channels = kChannels;
        arguments.count = count;
        arguments.mean = View(input.mean);
        arguments.var = View(input.var);
        arguments.weight = {weight.data(), type};
        arguments.bias = {bias.data(), type};
        arguments.eps = kEps;
        arguments.eps_mode = mode;
        arguments.out_mean = mean.data();
        arguments.out_scale = scale.data();
        arguments.out_shift = shift.data();
        arguments.running_mean = {running_mean.data(), type};
        arguments.running_var = {running_var.data(), type};
        arguments.momentum = 0.25;
        for (int64_t c = 0; c < kChannels; ++c) {
          FinalizeForwardChannel(arguments, c);
          const long double var = input.var[c];
          EXPECT_EQ(mean[c], input.mean[c]);
          EXPECT_NEAR(scale[c], weight.Get(c) * ExpectedInvstd(var, mode), 1e-14);
          EXPECT_EQ(shift[c], bias.Get(c));
          const double tolerance = type == DataType::kFloat64 ? 1e-14 : type == DataType::kFloat32 ? 1e-6 : 2e-2;
          const long double expected_mean =
              count == 0 ? mean_before.Get(c) : 0.75L * mean_before.Get(c) + 0.25L * input.mean[c];
          EXPECT_NEAR(running_mean.Get(c), expected_mean, tolerance);
          if (count <= 1) {
            EXPECT_EQ(running_var.Get(c), var_before.Get(c));
          } else {
            EXPECT_NEAR(running_var.Get(c), 0.75L * var_before.Get(c) + 0.25L * var * count / (count - 1), tolerance);
          }
        }
      }
    }
  }
}

TEST(Finalize, ForwardWithoutParameters) {
  const Statistics input;
  Doubles mean(kChannels), scale(kChannels), shift(kChannels, 5);
  FinalizeForwardArguments arguments;
  arguments.channels = kChannels;
  arguments.count = 10;
  arguments.mean = View(input.mean);
  arguments.var = View(input.var);
  arguments.eps = kEps;
  arguments.out_mean = mean.data();
  arguments.out_scale = scale.data();
  arguments.out_shift = shift.data();
  for (int64_t c = 0; c < kChannels; ++c) {
    FinalizeForwardChannel(arguments, c);
    EXPECT_NEAR(scale[c], ExpectedInvstd(input.var[c], EpsMode::kAdd), 1e-14);
    EXPECT_EQ(shift[c], 0.0);
  }
}

TEST(Finalize, Backward) {
  const Statistics input;
  const Doubles sum_dy = RandomVector(kChannels, 7, 1.0, 2.0), sum_dy_xmu = RandomVector(kChannels, 8, 1.0, 2.0);
  const Doubles local_dy = RandomVector(kChannels, 9, 0.5, 2.0), local_xmu = RandomVector(kChannels, 10, 0.5, 2.0);
  for (const EpsMode mode : {EpsMode::kAdd, EpsMode::kClamp}) {
    for (const int64_t count : {0, 1, 100}) {
      const Tensor weight = input.Parameter(DataType::kFloat32, 3);
      Tensor weight_gradient(DataType::kFloat64, kChannels), bias_gradient(DataType::kFloat64, kChannels);
      Doubles scale(kChannels), mean_dy(kChannels), projection(kChannels);
      FinalizeBackwardArguments arguments;
      arguments.channels = kChannels;
      arguments.count = count;
      arguments.var = View(input.var);
      arguments.sum_dy = sum_dy.data();
      arguments.sum_dy_xmu = sum_dy_xmu.data();
      arguments.weight = {weight.data(), DataType::kFloat32};
      arguments.eps = kEps;
      arguments.eps_mode = mode;
      arguments.out_scale = scale.data();
      arguments.out_mean_dy = mean_dy.data();
      arguments.out_projection = projection.data();
      arguments.local_sum_dy = local_dy.data();
      arguments.local_sum_dy_xmu = local_xmu.data();
      arguments.weight_gradient = {weight_gradient.data(), DataType::kFloat64};
      arguments.bias_gradient = {bias_gradient.data(), DataType::kFloat64};
      for (int64_t c = 0; c < kChannels; ++c) {
        FinalizeBackwardChannel(arguments, c);
        const long double var = input.var[c];
        const long double invstd = ExpectedInvstd(var, mode);
        EXPECT_NEAR(scale[c], weight.Get(c) * invstd, 1e-14);
        EXPECT_NEAR(mean_dy[c], count > 0 ? sum_dy[c] / count : 0.0, 1e-14);
        const bool fixed = count == 0 || (mode == EpsMode::kClamp && var < kEps);
        EXPECT_NEAR(projection[c], fixed ? 0 : invstd * invstd * sum_dy_xmu[c] / count, 1e-13);
        EXPECT_NEAR(weight_gradient.Get(c), local_xmu[c] * invstd, 1e-13);
        EXPECT_EQ(bias_gradient.Get(c), local_dy[c]);
      }
    }
  }
}

TEST(Finalize, BackwardThroughConstantStatistics) {
  const Statistics input;
  const Doubles local_dy = RandomVector(kChannels, 9, 0.5, 2.0), local_xmu = RandomVector(kChannels, 10, 0.5, 2.0);
  Tensor weight_gradient(DataType::kFloat32, kChannels);
  Doubles scale(kChannels), mean_dy(kChannels, 5), projection(kChannels, 5);
  FinalizeBackwardArguments arguments;
  arguments.channels = kChannels;
  arguments.count = 10;
  arguments.var = View(input.var);
  arguments.eps = kEps;
  arguments.out_scale = scale.data();
  arguments.out_mean_dy = mean_dy.data();
  arguments.out_projection = projection.data();
  arguments.local_sum_dy = local_dy.data();
  arguments.local_sum_dy_xmu = local_xmu.data();
  arguments.weight_gradient = {weight_gradient.data(), DataType::kFloat32};
  for (int64_t c = 0; c < kChannels; ++c) {
    FinalizeBackwardChannel(arguments, c);
    const long double invstd = ExpectedInvstd(input.var[c], EpsMode::kAdd);
    EXPECT_NEAR(scale[c], invstd, 1e-14);
    EXPECT_EQ(mean_dy[c], 0.0);
    EXPECT_EQ(projection[c], 0.0);
    EXPECT_NEAR(weight_gradient.Get(c), local_xmu[c] * invstd, 1e-6);
  }
}

// The arguments of a forward pass over some statistics, with memory for what it writes.
struct Forward {
  Statistics input;
  Tensor running_mean = input.Parameter(DataType::kFloat32, 5), running_var = input.Parameter(DataType::kFloat32, 6);
  Doubles mean = Doubles(kChannels), scale = Doubles(kChannels), shift = Doubles(kChannels);

  FinalizeForwardArguments Arguments() {
    FinalizeForwardArguments arguments;
    arguments.channels = kChannels;
    arguments.mean = View(input.mean);
    arguments.var = View(input.var);
    arguments.eps = kEps;
    arguments.out_mean = mean.data();
    arguments.out_scale = scale.data();
    arguments.out_shift = shift.data();
    arguments.running_mean = {running_mean.data(), DataType::kFloat32};
    arguments.running_var = {running_var.data(), DataType::kFloat32};
    return arguments;
  }
  void Run(const FinalizeForwardArguments& arguments) {
    for (int64_t c = 0; c < kChannels; ++c) FinalizeForwardChannel(arguments, c);
  }
};

// The words of a pending round have the count; the argument's is not read.
TEST(Finalize, ForwardTakesTheCountOfAPendingRound) {
  for (const int64_t count : {0, 1, 100}) {
    Forward known, pending;
    FinalizeForwardArguments arguments = known.Arguments();
    arguments.count = count;
    known.Run(arguments);
    const RoundWords words = {count, 7};
    arguments = pending.Arguments();
    arguments.count = -5;
    arguments.pending = {&words, 7};
    pending.Run(arguments);
    EXPECT_EQ(pending.mean, known.mean);
    EXPECT_EQ(pending.scale, known.scale);
    EXPECT_EQ(pending.shift, known.shift);
    for (int64_t c = 0; c < kChannels; ++c) {
      EXPECT_EQ(pending.running_mean.Get(c), known.running_mean.Get(c));
      EXPECT_EQ(pending.running_var.Get(c), known.running_var.Get(c));
    }
  }
}

// A batch that its caller has counted stays counted if the running statistics take it, whichever channel comes first.
TEST(Finalize, ForwardCountsOutWhatItDoesNotTake) {
  const RoundWords completed = {100, 7}, empty = {0, 7}, failed = {100, 6};
  for (const RoundWords* words : {&completed, &empty, &failed}) {
    for (const bool backwards : {false, true}) {
      Forward forward;
      int64_t batches = 5;
      FinalizeForwardArguments arguments = forward.Arguments();
      arguments.pending = {words, 7};
      arguments.batches = &batches;
      for (int64_t c = 0; c < kChannels; ++c) {
        FinalizeForwardChannel(arguments, backwards ? kChannels - 1 - c : c);
      }
      EXPECT_EQ(batches, words == &completed ? 5 : 4);
    }
  }
}

// The cumulative average after five batches gives the last a fifth.
TEST(Finalize, ForwardOfACumulativeAverage) {
  Forward known, cumulative;
  FinalizeForwardArguments arguments = known.Arguments();
  arguments.count = 100;
  arguments.momentum = 1.0 / 5;
  known.Run(arguments);
  int64_t batches = 5;
  arguments = cumulative.Arguments();
  arguments.count = 100;
  arguments.momentum = 1e30;
  arguments.batches = &batches;
  arguments.cumulative = true;
  cumulative.Run(arguments);
  EXPECT_EQ(batches, 5);
  for (int64_t c = 0; c < kChannels; ++c) {
    EXPECT_EQ(cumulative.running_mean.Get(c), known.running_mean.Get(c));
    EXPECT_EQ(cumulative.running_var.Get(c), known.running_var.Get(c));
  }
}

// The words have an earlier epoch, or a later one: another round completed.
TEST(Finalize, ForwardOfAPendingRoundThatFailed) {
  for (const uint32_t completed : {0u, 6u, 8u, UINT32_MAX}) {
    Forward forward;
    const Tensor mean_before = forward.running_mean, var_before = forward.running_var;
    const RoundWords words = {100, completed};
    FinalizeForwardArguments arguments = forward.Arguments();
    arguments.pending = {&words, 7};
    forward.Run(arguments);
    for (int64_t c = 0; c < kChannels; ++c) {
      EXPECT_TRUE(std::isnan(forward.mean[c]) && std::isnan(forward.scale[c]) && std::isnan(forward.shift[c]));
      EXPECT_EQ(forward.running_mean.Get(c), mean_before.Get(c));
      EXPECT_EQ(forward.running_var.Get(c), var_before.Get(c));
    }
  }
}

TEST(Finalize, BackwardOfPendingRounds) {
  const Statistics input;
  const Doubles sum_dy = RandomVector(kChannels, 7, 1.0, 2.0), sum_dy_xmu = RandomVector(kChannels, 8, 1.0, 2.0);
  const auto run = [&](const PendingRound& forward, const PendingRound& backward, DataType type, bool rounds) {
    Doubles scale(kChannels, 5), mean_dy(kChannels, 5), projection(kChannels, 5);
    Tensor weight_gradient(type, kChannels), bias_gradient(type, kChannels);
    FinalizeBackwardArguments arguments;
    arguments.channels = kChannels;
    arguments.count = forward.words == nullptr ? 100 : -5;
    arguments.var = View(input.var);
    if (rounds) {
      arguments.sum_dy = sum_dy.data();
      arguments.sum_dy_xmu = sum_dy_xmu.data();
    }
    arguments.eps = kEps;
    arguments.out_scale = scale.data();
    arguments.out_mean_dy = mean_dy.data();
    arguments.out_projection = projection.data();
    arguments.local_sum_dy = sum_dy.data();
    arguments.local_sum_dy_xmu = sum_dy_xmu.data();
    arguments.weight_gradient = {weight_gradient.data(), type};
    arguments.bias_gradient = {bias_gradient.data(), type};
    arguments.pending_forward = forward;
    arguments.pending_backward = backward;
    for (int64_t c = 0; c < kChannels; ++c) FinalizeBackwardChannel(arguments, c);
    Doubles all = scale;
    all.insert(all.end(), mean_dy.begin(), mean_dy.end());
    all.insert(all.end(), projection.begin(), projection.end());
    for (int64_t c = 0; c < kChannels; ++c) {
      all.push_back(weight_gradient.Get(c));
      all.push_back(bias_gradient.Get(c));
    }
    return all;
  };
  const RoundWords forward = {100, 3}, backward = {0, 9};
  for (const DataType type : kTypes) {
    for (const bool rounds : {true, false}) {
      const Doubles known = run({}, {}, type, rounds);
      EXPECT_EQ(run({&forward, 3}, {&backward, 9}, type, rounds), known);
      EXPECT_EQ(run({&forward, 3}, {}, type, rounds), known);
      EXPECT_EQ(run({}, {&backward, 9}, type, rounds), known);
      for (const Doubles& failed :
           {run({&forward, 4}, {&backward, 9}, type, rounds), run({&forward, 3}, {&backward, 10}, type, rounds),
            run({&forward, 4}, {}, type, rounds)}) {
        for (const double value : failed) EXPECT_TRUE(std::isnan(value)) << value;
      }
    }
  }
}

// NaN coefficients make every element of y and dx NaN, with and without ReLU and its gate.
TEST(Finalize, FailureReachesEveryElement) {
  const kernels::TensorShape shape = {2, kChannels, 5, DataType::kFloat32, kernels::Layout::kChannelsFirst};
  const Doubles nan(kChannels, std::nan(""));
  Tensor x(DataType::kFloat32, shape.size()), dy(DataType::kFloat32, shape.size());
  for (int64_t i = 0; i < shape.size(); ++i) {
    x.Set(i, Normal(1, i));
    dy.Set(i, Normal(2, i));
  }
  for (const bool relu : {false, true}) {
    Tensor y(DataType::kFloat32, shape.size()), dx(DataType::kFloat32, shape.size());
    kernels::Epilogue epilogue;
    epilogue.relu = relu;
    const kernels::ForwardCoefficients forward = {nan.data(), nan.data(), nan.data()};
    HostElemt(HostRun(), shape, x.data(), forward, epilogue, y.data());
    kernels::ReluGate gate;
    if (relu) gate.forward = forward;
    HostBackwardElemt(HostRun(), shape, dy.data(), x.data(), {nan.data(), nan.data(), nan.data(), nan.data()}, gate,
                      dx.data(), nullptr);
    for (int64_t i = 0; i < shape.size(); ++i) EXPECT_TRUE(std::isnan(y.Get(i)) && std::isnan(dx.Get(i))) << i;
  }
}

// Given statistics of any type are taken as they are.
TEST(Finalize, Evaluation) {
  const Statistics input;
  for (const DataType type : kTypes) {
    const Tensor given_mean = input.Parameter(type, 11), given_var = input.Parameter(type, 12);
    const Tensor weight = input.Parameter(type, 3), bias = input.Parameter(type, 4);
    Doubles mean(kChannels), scale(kChannels), shift(kChannels);
    FinalizeForwardArguments arguments;
    arguments.channels = kChannels;
    arguments.mean = {given_mean.data(), type};
    arguments.var = {given_var.data(), type};
    arguments.weight = {weight.data(), type};
    arguments.bias = {bias.data(), type};
    arguments.eps = kEps;
    arguments.out_mean = mean.data();
    arguments.out_scale = scale.data();
    arguments.out_shift = shift.data();
    for (int64_t c = 0; c < kChannels; ++c) {
      FinalizeForwardChannel(arguments, c);
      EXPECT_EQ(mean[c], given_mean.Get(c));
      EXPECT_NEAR(scale[c], weight.Get(c) * ExpectedInvstd(given_var.Get(c), EpsMode::kAdd), 1e-14);
      EXPECT_EQ(shift[c], bias.Get(c));
    }
  }
}

// Running statistics of a 16-bit type are rounded from float64 once. Rounding to float32 on the way would turn a value
// just above the midpoint of two halves into the midpoint, and then to the even half below it.
TEST(Finalize, RunningStatisticsAreRoundedOnce) {
  const struct {
    DataType type;
    double half_place, even;
  } cases[] = {{DataType::kFloat16, 0x1p-11, 1.0}, {DataType::kBFloat16, 0x1p-8, 1.0}};
  for (const auto& c : cases) {
    const Doubles mean = {c.even + c.half_place + 0x1p-40}, var = {1.0};
    Tensor running_mean(c.type, 1);
    Doubles out(3);
    FinalizeForwardArguments arguments;
    arguments.channels = 1;
    arguments.count = 2;
    arguments.mean = View(mean);
    arguments.var = View(var);
    arguments.out_mean = &out[0];
    arguments.out_scale = &out[1];
    arguments.out_shift = &out[2];
    arguments.running_mean = {running_mean.data(), c.type};
    arguments.momentum = 1.0;
    FinalizeForwardChannel(arguments, 0);
    EXPECT_EQ(running_mean.Get(0), c.even + 2 * c.half_place);
  }
}

}  // namespace
}  // namespace syncbn::testing
