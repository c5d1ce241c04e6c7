// Passes of several workers against one float64 computation over the concatenated batch.

#include "client/cc/batch_norm_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::testing {
namespace {

constexpr unsigned kSeed = 4711;

struct Case {
  std::string name;
  std::vector<size_t> batches;  // One for each worker.
  size_t channels = 3;
  size_t spatial = 4;
  bool channels_last = false;
  bool float32 = false;
  bool clamp_eps = false;
  double eps = 1e-5;
  double offset = 0.0;  // The mean, in standard deviations.
};

// The type's elements behind a TensorView, and the same as doubles.
struct Tensor {
  Tensor(const Case& c, size_t batch, std::vector<double> values) : doubles(std::move(values)) {
    shape.batch = static_cast<int64_t>(batch);
    shape.channels = static_cast<int64_t>(c.channels);
    shape.spatial = static_cast<int64_t>(c.spatial);
    shape.type = c.float32 ? kernels::DataType::kFloat32 : kernels::DataType::kFloat64;
    shape.layout = c.channels_last ? kernels::Layout::kChannelsLast : kernels::Layout::kChannelsFirst;
    floats.assign(doubles.begin(), doubles.end());
  }
  void* data() { return is_float() ? static_cast<void*>(floats.data()) : static_cast<void*>(doubles.data()); }
  bool is_float() const { return shape.type == kernels::DataType::kFloat32; }
  TensorView view() { return {data(), shape}; }
  double at(size_t i) const { return is_float() ? floats[i] : doubles[i]; }

  kernels::TensorShape shape;
  std::vector<double> doubles;
  std::vector<float> floats;
};

VectorView View(std::vector<double>& values) { return {values.data(), kernels::DataType::kFloat64}; }

// The results of one worker.
struct Outcome {
  std::vector<double> y, dx, running_mean, running_var, d_weight, d_bias;
};

struct Problem {
  explicit Problem(const Case& problem) : c(problem) {
    std::mt19937_64 random(kSeed);
    std::normal_distribution<double> normal;
    for (size_t channel = 0; channel < c.channels; ++channel) {
      weight.push_back(normal(random));
      bias.push_back(normal(random));
    }
    for (const size_t batch : c.batches) {
      x.push_back(Draw(batch, c.offset, random, normal));
      dy.push_back(Draw(batch, 0.0, random, normal));
    }
  }

  // Representable in the tensor's type, so that input rounding is no issue.
  std::vector<double> Draw(size_t batch, double offset, std::mt19937_64& random,
                           std::normal_distribution<double>& normal) const {
    std::vector<double> values(batch * c.channels * c.spatial);
    for (double& value : values) {
      value = normal(random) + offset;
      if (c.float32) value = static_cast<float>(value);
    }
    return values;
  }

  OracleShape ShapeOf(size_t batch) const { return {batch, c.channels, c.spatial, c.channels_last}; }

  static std::vector<double> Concatenate(const std::vector<std::vector<double>>& parts) {
    std::vector<double> whole;
    for (const auto& part : parts) whole.insert(whole.end(), part.begin(), part.end());
    return whole;
  }

  const Case c;
  std::vector<double> weight, bias;
  std::vector<std::vector<double>> x, dy;  // By rank.
};

Outcome Train(Worker& worker, const Problem& problem) {
  const Case& c = problem.c;
  const uint32_t rank = worker.rank();
  Outcome outcome;
  LayerOptions layer = BatchNormOptions("bn", static_cast<uint32_t>(c.channels));
  layer.eps = c.eps;
  layer.eps_mode = c.clamp_eps ? EpsMode::kClamp : EpsMode::kAdd;
  EXPECT_TRUE(worker.DeclareLayer(layer).ok());
  Tensor x(c, c.batches[rank], problem.x[rank]), dy(c, c.batches[rank], problem.dy[rank]);
  Tensor y(c, c.batches[rank], std::vector<double>(problem.x[rank].size())), dx = y;
  std::vector<double> weight = problem.weight, bias = problem.bias;
  outcome.running_mean.assign(c.channels, 0.25);
  outcome.running_var.assign(c.channels, 2.0);
  outcome.d_weight.resize(c.channels);
  outcome.d_bias.resize(c.channels);

  auto forward = ForwardPass::Start(worker, "bn", x.view(), {});
  EXPECT_TRUE(forward.ok()) << forward.status();
  ForwardArguments outputs;
  outputs.weight = View(weight);
  outputs.bias = View(bias);
  outputs.running_mean = View(outcome.running_mean);
  outputs.running_var = View(outcome.running_var);
  outputs.y = y.view();
  EXPECT_EQ(forward->Finish(x.view(), outputs).code(), absl::StatusCode::kFailedPrecondition);
  absl::Status status = forward->Wait();
  EXPECT_TRUE(status.ok()) << status;
  status = forward->Finish(x.view(), outputs);
  EXPECT_TRUE(status.ok()) << status;

  BackwardInputs inputs;
  inputs.dy = dy.view();
  inputs.x = x.data();
  inputs.weight = View(weight);
  inputs.bias = View(bias);
  BackwardOutputs gradients;
  gradients.dx = dx.data();
  gradients.d_weight = View(outcome.d_weight);
  gradients.d_bias = View(outcome.d_bias);
  const auto go_back = [&](bool again) {
    PassOptions options;
    options.again = again;
    auto backward = BackwardPass::Start(worker, forward->statistics(), inputs, options);
    EXPECT_TRUE(backward.ok()) << backward.status();
    absl::Status ended = backward->Wait();
    EXPECT_TRUE(ended.ok()) << ended;
    ended = backward->Finish(gradients);
    EXPECT_TRUE(ended.ok()) << ended;
  };
  go_back(false);
  const std::vector<double> doubles = dx.doubles, d_weight = outcome.d_weight, d_bias = outcome.d_bias;
  const std::vector<float> floats = dx.floats;
  for (int pass = 0; pass < 2; ++pass) {  // Later passes have the first one's bits.
    std::fill(dx.doubles.begin(), dx.doubles.end(), -1.0);
    std::fill(dx.floats.begin(), dx.floats.end(), -1.0f);
    go_back(true);
    EXPECT_EQ(x.is_float() || dx.doubles == doubles, true);
    EXPECT_EQ(!x.is_float() || dx.floats == floats, true);
    EXPECT_EQ(outcome.d_weight, d_weight);
    EXPECT_EQ(outcome.d_bias, d_bias);
  }
  for (size_t i = 0; i < y.doubles.size(); ++i) {
    outcome.y.push_back(y.at(i));
    outcome.dx.push_back(dx.at(i));
  }
  return outcome;
}

// The whole batch's forward and backward, from the definitions.
struct Expected {
  explicit Expected(const Problem& problem) {
    const Case& c = problem.c;
    size_t batch = 0;
    for (const size_t b : c.batches) batch += b;
    shape = problem.ShapeOf(batch);
    const std::vector<double> x = Problem::Concatenate(problem.x), dy = Problem::Concatenate(problem.dy);
    const OracleStats stats = Stats(shape, x);
    n = static_cast<long double>(batch * c.spatial);
    std::vector<double> scale, mean_dy, projection;
    for (size_t channel = 0; channel < c.channels; ++channel) {
      const long double biased = n == 0 ? 0 : stats.m2[channel] / n;
      const bool clamped = c.clamp_eps && biased < c.eps;
      const long double denominator = c.clamp_eps ? std::max<long double>(biased, c.eps) : biased + c.eps;
      mean.push_back(static_cast<double>(stats.mean[channel]));
      var.push_back(biased);
      invstd.push_back(1 / std::sqrt(denominator));
      frozen.push_back(clamped);
      scale.push_back(static_cast<double>(invstd[channel] * problem.weight[channel]));
    }
    y = Forward(shape, x, mean, scale, problem.bias, {}, false);
    const std::vector<bool> open(x.size(), true);
    const OracleSums sums = BackwardReduce(shape, dy, x, mean, open);
    for (size_t channel = 0; channel < c.channels; ++channel) {
      mean_dy.push_back(n == 0 ? 0 : static_cast<double>(sums.sum_dy[channel] / n));
      projection.push_back(n == 0 || frozen[channel]
                               ? 0
                               : static_cast<double>(invstd[channel] * invstd[channel] * sums.sum_dy_xmu[channel] / n));
    }
    dx = Backward(shape, dy, x, mean, scale, mean_dy, projection, open);
  }

  OracleShape shape;
  long double n = 0;
  std::vector<double> mean;
  std::vector<long double> var, invstd;
  std::vector<bool> frozen;
  Wide y, dx;
};

class BatchNormPassTest : public ::testing::TestWithParam<Case> {};

TEST_P(BatchNormPassTest, EqualsTheWholeBatch) {
  const Case& c = GetParam();
  RecordProperty("seed", kSeed);
  const Problem problem(c);
  const Expected expected(problem);
  const uint32_t world_size = static_cast<uint32_t>(c.batches.size());
  const auto master = StartMaster();
  const auto workers = JoinAll(master->target(), world_size);
  std::vector<Outcome> outcomes(world_size);
  OnEachRank(world_size, [&](uint32_t rank) { outcomes[rank] = Train(*workers[rank], problem); });

  // Relative to the size of the output: float32 is rounded once; float64 has the conditioning of mean/std beside it.
  const double tolerance = c.float32 ? 1e-6 : 1e-13 * (1 + std::abs(c.offset));
  size_t begin = 0;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    const Outcome& outcome = outcomes[rank];
    const OracleShape shape = problem.ShapeOf(c.batches[rank]);
    for (size_t i = 0; i < outcome.y.size(); ++i) {
      // Batches lie one after the other in both layouts.
      const double y = static_cast<double>(expected.y[begin + i]), dx = static_cast<double>(expected.dx[begin + i]);
      const double gain = 1 + static_cast<double>(expected.invstd[shape.ChannelOf(i)]);
      ASSERT_NEAR(outcome.y[i], y, tolerance * gain * (1 + std::abs(y))) << "rank " << rank << ", element " << i;
      ASSERT_NEAR(outcome.dx[i], dx, tolerance * gain * (1 + std::abs(dx))) << "rank " << rank << ", element " << i;
    }
    begin += outcome.y.size();
    const OracleSums local = BackwardReduce(shape, problem.dy[rank], problem.x[rank], expected.mean,
                                            std::vector<bool>(problem.x[rank].size(), true));
    for (size_t channel = 0; channel < c.channels; ++channel) {
      const double d_weight = static_cast<double>(local.sum_dy_xmu[channel] * expected.invstd[channel]);
      const double magnitude = static_cast<double>(local.magnitude_dy_xmu[channel] * expected.invstd[channel]);
      EXPECT_NEAR(outcome.d_weight[channel], d_weight, 1e-12 * (1 + std::abs(c.offset)) * (1 + magnitude));
      EXPECT_NEAR(outcome.d_bias[channel], static_cast<double>(local.sum_dy[channel]),
                  1e-12 * static_cast<double>(1 + local.magnitude_dy[channel]));
      const bool updated = expected.n > 0;
      const double mean = updated ? 0.9 * 0.25 + 0.1 * expected.mean[channel] : 0.25;
      EXPECT_NEAR(outcome.running_mean[channel], mean, 1e-14 * (1 + std::abs(mean)));
      const double var =
          expected.n > 1
              ? static_cast<double>(0.9L * 2.0L + 0.1L * expected.var[channel] * expected.n / (expected.n - 1))
              : 2.0;
      EXPECT_NEAR(outcome.running_var[channel], var, 1e-12 * var * (1 + std::abs(c.offset)));
      EXPECT_EQ(outcome.running_mean[channel], outcomes[0].running_mean[channel]);  // Bit for bit on every worker.
      EXPECT_EQ(outcome.running_var[channel], outcomes[0].running_var[channel]);
    }
  }
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, std::vector<size_t> batches, auto change) {
    Case c;
    c.name = name;
    c.batches = std::move(batches);
    change(c);
    cases.push_back(c);
  };
  const auto nothing = [](Case&) {};
  add("Even", {2, 2, 2}, nothing);
  add("Uneven", {1, 2, 5, 8}, nothing);
  add("WithEmptyBatches", {0, 3, 0, 1}, nothing);
  add("OneValueInAll", {0, 1}, [](Case& c) { c.spatial = 1; });
  add("AllEmpty", {0, 0}, nothing);
  add("Alone", {4}, nothing);
  add("ChannelsLast", {1, 4}, [](Case& c) { c.channels_last = true; });
  add("Float32", {1, 2, 5}, [](Case& c) { c.float32 = true; });
  add("Float32ChannelsLast", {3, 2}, [](Case& c) { c.float32 = c.channels_last = true; });
  add("Clamp", {1, 3}, [](Case& c) { c.clamp_eps = true; });
  add("ClampThatHolds", {1, 3}, [](Case& c) { c.clamp_eps = true, c.eps = 10.0; });
  add("LargeEps", {1, 3}, [](Case& c) { c.eps = 0.5; });
  add("FarFromZero", {2, 3, 1}, [](Case& c) { c.offset = 1e4; });
  add("ManyChannels", {1, 2}, [](Case& c) { c.channels = 257, c.spatial = 3; });
  return cases;
}

// A kernel would read what it has already written.
TEST(OverlapTest, OutputsThatLieAcrossAnInputAreRefused) {
  const auto master = StartMaster();
  const auto worker = JoinOrDie(WorkerOptions(master->target(), 0, 1));
  ASSERT_TRUE(worker->DeclareLayer(BatchNormOptions("bn", 1)).ok());
  std::vector<double> memory = {1, 2, 3, 4, 5, 6, 7, 8}, far(8), further(8);
  const auto view = [](double* data) {
    TensorView tensor;
    tensor.data = data;
    tensor.shape = {4, 1, 1, kernels::DataType::kFloat64, kernels::Layout::kChannelsFirst};
    return tensor;
  };
  const TensorView x = view(memory.data() + 2);
  const auto expect_refused = [](const absl::Status& status, const std::string& what) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), what);
  };
  auto forward = ForwardPass::Start(*worker, "bn", x, {});
  ASSERT_TRUE(forward.ok() && forward->Wait().ok());
  ForwardArguments outputs;
  for (const int place : {-1, 1}) {
    outputs.y = view(memory.data() + 2 + place);
    expect_refused(forward->Finish(x, outputs), "y and x overlap without being the same memory");
  }
  outputs.y = view(far.data() + 1);
  outputs.residual = far.data();
  expect_refused(forward->Finish(x, outputs), "y and the residual overlap without being the same memory");
  outputs.residual = far.data() + 1;
  EXPECT_TRUE(forward->Finish(x, outputs).ok()) << "the same memory";
  EXPECT_EQ(memory, (std::vector<double>{1, 2, 3, 4, 5, 6, 7, 8}));

  BackwardInputs inputs;
  inputs.dy = view(far.data());
  inputs.x = x.data;
  auto backward = BackwardPass::Start(*worker, forward->statistics(), inputs, {});
  ASSERT_TRUE(backward.ok() && backward->Wait().ok());
  BackwardOutputs gradients;
  gradients.dx = far.data() + 3;
  expect_refused(backward->Finish(gradients), "dx and dy overlap without being the same memory");
  gradients.dx = memory.data();
  expect_refused(backward->Finish(gradients), "dx and x overlap without being the same memory");
  gradients.dx = gradients.d_residual = further.data();
  expect_refused(backward->Finish(gradients), "dx and d_residual are the same memory");
  gradients.d_residual = further.data() + 1;
  expect_refused(backward->Finish(gradients), "dx and d_residual overlap without being the same memory");
  gradients.d_residual = further.data() + 4;
  EXPECT_TRUE(backward->Finish(gradients).ok()) << "side by side";
  gradients.dx = far.data();
  EXPECT_TRUE(backward->Finish(gradients).ok()) << "the same memory";
}

INSTANTIATE_TEST_SUITE_P(Cases, BatchNormPassTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace syncbn::testing
