// Passes over CUDA tensors on a fake GPU: results, order, reuse of memory, errors.

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_runtime.h"
#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "server/master_server.h"
#include "tests/client/cc/cuda/layer_step.h"
#include "tests/testing/gpu/fake_device_runtime.h"

namespace syncbn::testing {
namespace {

// Never destroyed: the library's memory for its streams outlives a test.
FakeDeviceRuntime& Gpu() {
  static FakeDeviceRuntime* const gpu = new FakeDeviceRuntime;
  return *gpu;
}

class CudaPassTest : public ::testing::Test {
 protected:
  void SetUp() override {
    DeviceRuntime::SetForTesting(&Gpu());
    Gpu().Defer(false);
    Gpu().Fail(DeviceRuntime::kSuccess, false);
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    auto master = MasterServer::Start(options);
    ASSERT_TRUE(master.ok()) << master.status();
    master_ = *std::move(master);
  }
  void TearDown() override { DeviceRuntime::SetForTesting(nullptr); }

  std::unique_ptr<Worker> Join(uint32_t rank, uint32_t world_size) {
    Worker::Options options;
    options.target = master_->target();
    options.rank = rank;
    options.world_size = world_size;
    options.round_timeout = absl::Seconds(20);
    auto worker = Worker::Join(options);
    EXPECT_TRUE(worker.ok()) << worker.status();
    return *std::move(worker);
  }
  static void Declare(Worker& worker, const std::string& name) {
    LayerOptions layer;
    layer.name = name;
    layer.channels = kChannels;
    layer.eps = kEps;
    ASSERT_TRUE(worker.DeclareLayer(layer).ok());
  }

  std::unique_ptr<MasterServer> master_;
  std::vector<std::vector<uint64_t>> cpu_history_, cuda_history_;
};

// The same two batches, once with both workers on the CPU and once with one or both on GPUs.
TEST_F(CudaPassTest, MixedGroupAgreesWithCpuWorkers) {
  const auto run = [this](Device first, Device second, const std::string& layer) {
    std::vector<Step> steps = {Step(5, 1, first), Step(2, 2, second)};
    auto a = Join(0, 2), b = Join(1, 2);
    Declare(*a, layer);
    Declare(*b, layer);
    steps[1].index = second == Device::kCuda ? 1 : 0;
    for (Step& step : steps) step.stream = Gpu().MakeStream(step.index);
    std::thread other([&] { EXPECT_TRUE(steps[1].Run(*b, layer).ok()); });
    const absl::Status status = steps[0].Run(*a, layer);
    EXPECT_TRUE(status.ok()) << status;
    other.join();
    EXPECT_TRUE(a->Leave("done").ok());
    EXPECT_TRUE(b->Leave("done").ok());
    return steps;
  };
  const std::vector<Step> cpu = run(Device::kCpu, Device::kCpu, "cpu");
  for (const Device second : {Device::kCpu, Device::kCuda}) {
    const std::vector<Step> gpu = run(Device::kCuda, second, second == Device::kCpu ? "mixed" : "gpus");
    for (int i = 0; i < 2; ++i) {
      ExpectNear(gpu[i].y, cpu[i].y, "y");
      ExpectNear(gpu[i].dx, cpu[i].dx, "dx");
      ExpectNear(gpu[i].d_weight, cpu[i].d_weight, "d_weight");
      ExpectNear(gpu[i].d_bias, cpu[i].d_bias, "d_bias");
      ExpectNear(gpu[i].running_mean, cpu[i].running_mean, "running_mean");
      ExpectNear(gpu[i].running_var, cpu[i].running_var, "running_var");
    }
  }
}

// A later backward pass through one forward pass has the first one's bits, on either device.
TEST_F(CudaPassTest, LaterBackwardPassesHaveTheSameBits) {
  std::vector<Step> steps = {Step(5, 1, Device::kCuda), Step(2, 2, Device::kCpu)};
  for (Step& step : steps) step.stream = Gpu().MakeStream(step.index);
  auto a = Join(0, 2), b = Join(1, 2);
  Declare(*a, "bn");
  Declare(*b, "bn");
  const auto run = [](Worker& worker, Step& step) {
    const auto forward = step.Forward(worker, "bn");
    ASSERT_TRUE(forward.ok()) << forward.status();
    ASSERT_TRUE(step.Backward(worker, *forward).ok());
    const Doubles dx = step.dx, d_weight = step.d_weight, d_bias = step.d_bias;
    for (int pass = 0; pass < 2; ++pass) {
      step.dx.assign(dx.size(), -1.0);
      ASSERT_TRUE(step.Backward(worker, *forward, true).ok());
      EXPECT_EQ(step.dx, dx);
      EXPECT_EQ(step.d_weight, d_weight);
      EXPECT_EQ(step.d_bias, d_bias);
    }
  };
  std::thread other([&] { run(*b, steps[1]); });
  run(*a, steps[0]);
  other.join();
  EXPECT_TRUE(a->Leave("done").ok());
  EXPECT_TRUE(b->Leave("done").ok());
}

// A CPU worker and a CUDA worker of one group store the same running statistics, bit for bit, in vectors of every type.
TEST_F(CudaPassTest, RunningStatisticsHaveTheCpusBits) {
  constexpr kernels::DataType kTypes[] = {kernels::DataType::kFloat32, kernels::DataType::kFloat64,
                                          kernels::DataType::kFloat16, kernels::DataType::kBFloat16};
  using Bits = std::vector<uint64_t>;  // The memory of a vector of any type.
  auto a = Join(0, 2), b = Join(1, 2);
  const auto run = [&](Worker& worker, Device device, int rows) {
    std::vector<Bits> history;
    const Stream stream = Gpu().MakeStream(0);
    for (const kernels::DataType type : kTypes) {
      const std::string layer = "bn" + std::to_string(static_cast<int>(type));
      Declare(worker, layer);
      Bits mean(kChannels), var(kChannels);
      const VectorView mean_view = {mean.data(), type}, var_view = {var.data(), type};
      for (int64_t c = 0; c < kChannels; ++c) var_view.Set(c, 1.0);
      for (int i = 0; i < 30; ++i) {
        Step step(rows, 100 * rows + i, device);
        PassOptions options;
        options.stream = stream;
        options.backward_role = BackwardRole::kNone;
        auto pass = ForwardPass::Start(worker, layer, View(step.x, device), options);
        ASSERT_TRUE(pass.ok()) << pass.status();
        ASSERT_TRUE(pass->Wait().ok());
        ForwardArguments arguments = step.Outputs();
        arguments.running_mean = mean_view;
        arguments.running_var = var_view;
        ASSERT_TRUE(pass->Finish(View(step.x, device), arguments).ok());
        history.push_back(mean);
        history.push_back(var);
      }
    }
    (device == Device::kCpu ? cpu_history_ : cuda_history_) = history;
  };
  std::thread other([&] { run(*b, Device::kCuda, 2); });
  run(*a, Device::kCpu, 5);
  other.join();
  EXPECT_EQ(cpu_history_.size(), 240u);
  EXPECT_EQ(cuda_history_, cpu_history_);
}

TEST_F(CudaPassTest, SteadyStateAllocatesNothing) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  ASSERT_TRUE(step.Run(*worker, "bn").ok());
  const int before = Gpu().allocations();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(step.Run(*worker, "bn").ok());
  EXPECT_EQ(Gpu().allocations(), before);
}

// An allocation may wait for the GPU, so the layers of a network, whose passes are alive at once, share a few: for the
// workspace, and for pinned and device memory.
TEST_F(CudaPassTest, PassesThatAreAliveAtOnceShareAllocations) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  const int before = Gpu().allocations();
  std::vector<ForwardPass> alive;
  for (int i = 0; i < 53; ++i) {
    auto pass = step.Forward(*worker, "bn");
    ASSERT_TRUE(pass.ok()) << pass.status();
    alive.push_back(*std::move(pass));
  }
  EXPECT_EQ(Gpu().allocations(), before + 3);
}

TEST_F(CudaPassTest, WaitIsPendingUntilTheStreamGetsThere) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  Gpu().Defer(true);
  auto pass = ForwardPass::Start(*worker, "bn", View(step.x, Device::kCuda), step.Options());
  ASSERT_TRUE(pass.ok());
  EXPECT_TRUE(IsPending(pass->Wait(absl::ZeroDuration())));
  EXPECT_EQ(pass->statistics(), nullptr);
  Gpu().Run(step.stream);
  EXPECT_TRUE(pass->Wait().ok());
  ASSERT_TRUE(pass->Finish(View(step.x, Device::kCuda), step.Outputs()).ok());
  EXPECT_EQ(Gpu().queued(step.stream), 2u);  // Finish has waited for nothing.
  Gpu().Run(step.stream);
}

// Two layers started in one order and waited for in the other: both rounds begin in the order of their starts.
TEST_F(CudaPassTest, RoundsBeginInTheOrderOfTheirStarts) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step first(4, 1, Device::kCuda), second(3, 2, Device::kCuda);
  first.stream = second.stream = Gpu().MakeStream(0);
  auto a = ForwardPass::Start(*worker, "bn", View(first.x, Device::kCuda), first.Options());
  auto b = ForwardPass::Start(*worker, "bn", View(second.x, Device::kCuda), second.Options());
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_TRUE(b->Wait().ok());
  EXPECT_TRUE(a->Wait().ok());
  EXPECT_EQ(a->sequence(), 0u);
  EXPECT_EQ(b->sequence(), 1u);
  EXPECT_EQ(a->statistics()->count, 4);
  EXPECT_EQ(b->statistics()->count, 3);
}

// A pass that is dropped still counts for the others, and its slot is used again.
TEST_F(CudaPassTest, AbandonedPassIsSentAndItsSlotReused) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  { ASSERT_TRUE(ForwardPass::Start(*worker, "bn", View(step.x, Device::kCuda), step.Options()).ok()); }
  ASSERT_TRUE(step.Run(*worker, "bn").ok());
  const int before = Gpu().allocations();
  auto pass = ForwardPass::Start(*worker, "bn", View(step.x, Device::kCuda), step.Options());
  ASSERT_TRUE(pass.ok());
  ASSERT_TRUE(pass->Wait().ok());
  EXPECT_EQ(pass->sequence(), 2u);
  EXPECT_EQ(Gpu().allocations(), before);
}

TEST_F(CudaPassTest, ErrorsOfTheGpuSurface) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  const TensorView x = View(step.x, Device::kCuda);

  Gpu().Capture(step.stream, true);
  EXPECT_EQ(ForwardPass::Start(*worker, "bn", x, step.Options()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  Gpu().Capture(step.stream, false);

  TensorView elsewhere = x;
  elsewhere.device_index = 7;
  EXPECT_EQ(ForwardPass::Start(*worker, "bn", elsewhere, step.Options()).status().code(),
            absl::StatusCode::kFailedPrecondition);

  Gpu().Defer(true);
  auto lost = ForwardPass::Start(*worker, "bn", x, step.Options());
  ASSERT_TRUE(lost.ok());
  Gpu().Run(step.stream, false);
  EXPECT_EQ(lost->Wait().code(), absl::StatusCode::kInternal);

  auto failed = ForwardPass::Start(*worker, "bn", x, step.Options());
  ASSERT_TRUE(failed.ok());
  Gpu().Fail(FakeDeviceRuntime::kLaunchFailure, true);
  const absl::Status status = failed->Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("719"), std::string::npos) << status;
  EXPECT_EQ(ForwardPass::Start(*worker, "bn", x, step.Options()).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(failed->Finish(x, step.Outputs()).code(), absl::StatusCode::kFailedPrecondition);
  Gpu().Fail(DeviceRuntime::kSuccess, false);
  Gpu().Run(step.stream);
}

// Close and Interrupt reach a thread that watches for a GPU that does not come.
TEST_F(CudaPassTest, CloseAndInterruptEndTheWait) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  Gpu().Defer(true);
  auto pass = ForwardPass::Start(*worker, "bn", View(step.x, Device::kCuda), step.Options());
  ASSERT_TRUE(pass.ok());
  std::atomic<bool> done{false};
  std::thread interrupter([&] {
    while (!done) worker->Interrupt();
  });
  const absl::Status interrupted = pass->Wait();
  done = true;
  interrupter.join();
  EXPECT_EQ(DetailsOf(interrupted).reason, "INTERRUPTED") << interrupted;
  std::thread closer([&] { worker->Close(); });
  const absl::Status closed = pass->Wait();
  closer.join();
  EXPECT_EQ(DetailsOf(closed).reason, "CLOSED") << closed;
  Gpu().Run(step.stream);
}

TEST_F(CudaPassTest, BackwardBelongsToTheForwardStream) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(4, 1, Device::kCuda);
  step.stream = Gpu().MakeStream(0);
  auto pass = ForwardPass::Start(*worker, "bn", View(step.x, Device::kCuda), step.Options());
  ASSERT_TRUE(pass.ok());
  ASSERT_TRUE(pass->Wait().ok());
  PassOptions other = step.Options();
  other.stream = Gpu().MakeStream(0);
  EXPECT_EQ(BackwardPass::Start(*worker, pass->statistics(), step.Inputs(), other).status().code(),
            absl::StatusCode::kInvalidArgument);
  BackwardInputs on_cpu = step.Inputs();
  on_cpu.dy.device = Device::kCpu;
  EXPECT_EQ(BackwardPass::Start(*worker, pass->statistics(), on_cpu, step.Options()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// A thread whose current device is another one than the tensors': that one gets no context, which takes memory there.
TEST_F(CudaPassTest, OtherDevicesStayUnused) {
  static FakeDeviceRuntime* const gpus = new FakeDeviceRuntime;  // As Gpu(), and unused so far.
  DeviceRuntime::SetForTesting(gpus);
  gpus->StartGpu();
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  Step step(5, 1, Device::kCuda);
  step.index = 1;
  step.stream = gpus->MakeStream(1);
  for (const bool stream_ordered : {false, true}) {
    step.stream_ordered = stream_ordered;
    EXPECT_TRUE(step.Run(*worker, "bn").ok());
    EXPECT_TRUE(worker->Settle().ok());
  }
  EXPECT_TRUE(StreamOrderStatus(1).ok());
  EXPECT_TRUE(worker->Leave("done").ok());
  gpus->StopGpu();
  int current = -1;
  EXPECT_EQ(gpus->CurrentDevice(&current), DeviceRuntime::kSuccess);
  EXPECT_EQ(current, 0);
  EXPECT_TRUE(gpus->has_context(1));
  EXPECT_FALSE(gpus->has_context(0));
}

TEST_F(CudaPassTest, EvaluationAgreesWithTheCpu) {
  Doubles mean = {1.0, -0.5, 2.0}, var = {0.5, 2.0, 0.0};
  std::vector<Step> steps = {Step(6, 3, Device::kCpu), Step(6, 3, Device::kCuda)};
  for (Step& step : steps) {
    step.stream = Gpu().MakeStream(0);
    EvaluateArguments options;
    options.stream = step.stream;
    options.mean = Vector(mean);
    options.var = Vector(var);
    options.weight = Vector(step.weight);
    options.bias = Vector(step.bias);
    options.eps = kEps;
    options.relu = true;
    ASSERT_TRUE(Evaluate(View(step.x, step.device), options, step.y.data()).ok());
    BackwardOutputs outputs;
    outputs.dx = step.dx.data();
    outputs.d_weight = Vector(step.d_weight);
    outputs.d_bias = Vector(step.d_bias);
    ASSERT_TRUE(EvaluateBackward(step.Inputs(), options, outputs).ok());
  }
  ExpectNear(steps[1].y, steps[0].y, "y");
  ExpectNear(steps[1].dx, steps[0].dx, "dx");
  ExpectNear(steps[1].d_weight, steps[0].d_weight, "d_weight");
  ExpectNear(steps[1].d_bias, steps[0].d_bias, "d_bias");
}

// Evaluations of a step, with given statistics.
struct EvaluatedStep : Step {
  EvaluatedStep(int64_t rows, Device where) : Step(rows, 3, where) {}
  EvaluateArguments Arguments() {
    EvaluateArguments arguments;
    arguments.stream = stream;
    arguments.mean = Vector(mean);
    arguments.var = Vector(var);
    arguments.weight = Vector(weight);
    arguments.bias = Vector(bias);
    arguments.eps = kEps;
    arguments.relu = relu;
    return arguments;
  }
  absl::Status Forward() { return Evaluate(View(x, device), Arguments(), y.data()); }
  absl::Status Backward() {
    BackwardOutputs outputs;
    outputs.dx = dx.data();
    outputs.d_weight = Vector(d_weight);
    outputs.d_bias = Vector(d_bias);
    return EvaluateBackward(Inputs(), Arguments(), outputs);
  }

  Doubles mean = {1.0, -0.5, 2.0}, var = {0.5, 2.0, 0.0};
};

// The graph has memory of its own: its replays are right after other passes have had the stream's, and read tensors and
// statistics anew.
TEST_F(CudaPassTest, EvaluationCanBeCaptured) {
  auto worker = Join(0, 1);
  Declare(*worker, "bn");
  EvaluatedStep cpu(6, Device::kCpu), captured(6, Device::kCuda);
  captured.stream = Gpu().MakeStream(0);
  const Doubles before = captured.y;
  Gpu().Capture(captured.stream, true);
  ASSERT_TRUE(captured.Forward().ok());
  ASSERT_TRUE(captured.Backward().ok());
  Gpu().Capture(captured.stream, false);
  EXPECT_EQ(captured.y, before) << "computed by the capture";
  EXPECT_EQ(Gpu().graph_bytes(), 0u) << "not freed";
  for (int replay = 0; replay < 3; ++replay) {
    SCOPED_TRACE(replay);
    Step training(4, replay, Device::kCuda);
    training.stream = captured.stream;
    ASSERT_TRUE(training.Run(*worker, "bn").ok());
    captured.x = cpu.x = Values(6, 20 + replay);
    captured.var[1] = cpu.var[1] = 0.5 + replay;
    ASSERT_EQ(Gpu().Replay(captured.stream), DeviceRuntime::kSuccess);
    ASSERT_TRUE(cpu.Forward().ok());
    ASSERT_TRUE(cpu.Backward().ok());
    ExpectNear(captured.y, cpu.y, "y");
    ExpectNear(captured.dx, cpu.dx, "dx");
    ExpectNear(captured.d_weight, cpu.d_weight, "d_weight");
    ExpectNear(captured.d_bias, cpu.d_bias, "d_bias");
  }
}

}  // namespace
}  // namespace syncbn::testing
