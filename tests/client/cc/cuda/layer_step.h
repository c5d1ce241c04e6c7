// A step through one layer, on either device, for tests of passes.

#ifndef SYNCBN_TESTS_CLIENT_CC_CUDA_LAYER_STEP_H_
#define SYNCBN_TESTS_CLIENT_CC_CUDA_LAYER_STEP_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_runtime.h"
#include "client/cc/worker.h"

namespace syncbn::testing {

inline constexpr int64_t kChannels = 3;
inline constexpr double kEps = 0.25;
using Doubles = std::vector<double>;

// Rows of kChannels values.
inline Doubles Values(int64_t rows, int seed) {
  Doubles values;
  for (int64_t i = 0; i < rows * kChannels; ++i) values.push_back(std::sin(1.0 + i * 1.7 + seed) * (2 + i % 3) + i % 5);
  return values;
}

inline TensorView View(Doubles& values, Device device, int index = 0) {
  TensorView view;
  view.data = values.data();
  view.shape = {static_cast<int64_t>(values.size()) / kChannels, kChannels, 1, kernels::DataType::kFloat64,
                kernels::Layout::kChannelsFirst};
  view.device = device;
  view.device_index = index;
  return view;
}

inline VectorView Vector(Doubles& values) { return {values.data(), kernels::DataType::kFloat64}; }

// One worker's step through a layer, on either device, with its tensors, parameters and results.
struct Step {
  Doubles x, dy, y, dx, weight = {0.5, 2.0, -1.0}, bias = {0.1, -0.2, 0.3};
  Doubles running_mean = Doubles(kChannels, 0.0), running_var = Doubles(kChannels, 1.0);
  Doubles d_weight = Doubles(kChannels), d_bias = Doubles(kChannels);
  int64_t batches = 0;  // The number of forward passes that are in the running statistics.
  bool cumulative = false;
  Device device = Device::kCpu;
  int index = 0;
  Stream stream = nullptr;
  bool relu = true;
  bool stream_ordered = false;

  Step(int64_t rows, int seed, Device where)
      : x(Values(rows, seed)), dy(Values(rows, seed + 50)), y(x.size()), dx(x.size()), device(where) {}
  Step(const Step&) = default;
  virtual ~Step() = default;

  // Counts a forward pass, in the order of the stream.
  virtual void CountBatch() { ++batches; }

  PassOptions Options() const {
    PassOptions options;
    options.stream = stream;
    options.stream_ordered = stream_ordered;
    return options;
  }
  ForwardArguments Outputs() {
    ForwardArguments outputs;
    outputs.weight = Vector(weight);
    outputs.bias = Vector(bias);
    outputs.running_mean = Vector(running_mean);
    outputs.running_var = Vector(running_var);
    outputs.batches = &batches;
    outputs.cumulative = cumulative;
    outputs.relu = relu;
    outputs.y = View(y, device, index);
    return outputs;
  }
  BackwardInputs Inputs() {
    BackwardInputs inputs;
    inputs.dy = View(dy, device, index);
    inputs.x = x.data();
    inputs.weight = Vector(weight);
    inputs.bias = Vector(bias);
    inputs.relu = relu;
    return inputs;
  }
  // Stream-ordered passes are not waited for.
  absl::StatusOr<ForwardPass> Forward(Worker& worker, const std::string& layer) {
    auto forward = ForwardPass::Start(worker, layer, View(x, device, index), Options());
    if (!forward.ok()) return forward;
    if (!forward->stream_ordered()) {
      if (absl::Status status = forward->Wait(); !status.ok()) return status;
    }
    CountBatch();
    if (absl::Status status = forward->Finish(View(x, device, index), Outputs()); !status.ok()) return status;
    return forward;
  }
  absl::Status Backward(Worker& worker, const ForwardPass& forward, bool again = false) {
    PassOptions options = Options();
    options.again = again;
    auto backward = BackwardPass::Start(worker, forward.statistics(), Inputs(), options);
    if (!backward.ok()) return backward.status();
    if (!forward.stream_ordered()) {
      if (absl::Status status = backward->Wait(); !status.ok()) return status;
    }
    BackwardOutputs outputs;
    outputs.dx = dx.data();
    outputs.d_weight = Vector(d_weight);
    outputs.d_bias = Vector(d_bias);
    return backward->Finish(outputs);
  }
  absl::Status Run(Worker& worker, const std::string& layer) {
    const auto forward = Forward(worker, layer);
    return forward.ok() ? Backward(worker, *forward) : forward.status();
  }
};

inline void ExpectNear(const Doubles& a, const Doubles& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-11 * (1 + std::fabs(b[i]))) << what << " " << i;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_CUDA_LAYER_STEP_H_
