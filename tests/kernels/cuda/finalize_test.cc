// FinalizeForward and FinalizeBackward, one channel at a time, against the formulas in long double.

#include "kernels/cuda/finalize.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/cuda/cases.h"

namespace syncbn::testing {
namespace {

using kernels::EpsMode;
using kernels::cuda::FinalizeBackwardArguments;
using kernels::cuda::FinalizeBackwardChannel;
using kernels::cuda::FinalizeEvaluationArguments;
using kernels::cuda::FinalizeEvaluationChannel;
using kernels::cuda::FinalizeForwardArguments;
using kernels::cuda::FinalizeForwardChannel;
using Doubles = std::vector<double>;

constexpr int64_t kChannels = 9;
constexpr double kEps = 0.5;

struct Statistics {
  Doubles mean = RandomVector(kChannels, 1, 2.0, 1.0);
  Doubles m2 = RandomVector(kChannels, 2, 60.0, 30.0);  // Some variances are below kEps, some above.
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
        arguments.mean = input.mean.data();
        arguments.m2 = input.m2.data();
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
          const long double var = count > 0 ? static_cast<long double>(input.m2[c]) / count : 0;
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
            EXPECT_NEAR(running_var.Get(c), 0.75L * var_before.Get(c) + 0.25L * input.m2[c] / (count - 1), tolerance);
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
  arguments.mean = input.mean.data();
  arguments.m2 = input.m2.data();
  arguments.eps = kEps;
  arguments.out_mean = mean.data();
  arguments.out_scale = scale.data();
  arguments.out_shift = shift.data();
  for (int64_t c = 0; c < kChannels; ++c) {
    FinalizeForwardChannel(arguments, c);
    EXPECT_NEAR(scale[c], ExpectedInvstd(static_cast<long double>(input.m2[c]) / 10, EpsMode::kAdd), 1e-14);
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
      arguments.mean = input.mean.data();
      arguments.m2 = input.m2.data();
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
        const long double var = count > 0 ? static_cast<long double>(input.m2[c]) / count : 0;
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
  arguments.mean = input.mean.data();
  arguments.m2 = input.m2.data();
  arguments.eps = kEps;
  arguments.out_scale = scale.data();
  arguments.out_mean_dy = mean_dy.data();
  arguments.out_projection = projection.data();
  arguments.local_sum_dy = local_dy.data();
  arguments.local_sum_dy_xmu = local_xmu.data();
  arguments.weight_gradient = {weight_gradient.data(), DataType::kFloat32};
  for (int64_t c = 0; c < kChannels; ++c) {
    FinalizeBackwardChannel(arguments, c);
    const long double invstd = ExpectedInvstd(static_cast<long double>(input.m2[c]) / 10, EpsMode::kAdd);
    EXPECT_NEAR(scale[c], invstd, 1e-14);
    EXPECT_EQ(mean_dy[c], 0.0);
    EXPECT_EQ(projection[c], 0.0);
    EXPECT_NEAR(weight_gradient.Get(c), local_xmu[c] * invstd, 1e-6);
  }
}

TEST(Finalize, Evaluation) {
  const Statistics input;
  for (const DataType type : kTypes) {
    const Tensor given_mean = input.Parameter(type, 11), given_var = input.Parameter(type, 12);
    const Tensor weight = input.Parameter(type, 3), bias = input.Parameter(type, 4);
    Doubles mean(kChannels), var(kChannels), scale(kChannels), shift(kChannels);
    FinalizeEvaluationArguments arguments;
    arguments.channels = kChannels;
    arguments.mean = {given_mean.data(), type};
    arguments.var = {given_var.data(), type};
    arguments.weight = {weight.data(), type};
    arguments.bias = {bias.data(), type};
    arguments.eps = kEps;
    arguments.out_mean = mean.data();
    arguments.out_var = var.data();
    arguments.out_scale = scale.data();
    arguments.out_shift = shift.data();
    for (int64_t c = 0; c < kChannels; ++c) {
      FinalizeEvaluationChannel(arguments, c);
      EXPECT_EQ(mean[c], given_mean.Get(c));
      EXPECT_EQ(var[c], given_var.Get(c));
      EXPECT_NEAR(scale[c], weight.Get(c) * ExpectedInvstd(given_var.Get(c), EpsMode::kAdd), 1e-14);
      EXPECT_EQ(shift[c], bias.Get(c));
    }
  }
}

}  // namespace
}  // namespace syncbn::testing
