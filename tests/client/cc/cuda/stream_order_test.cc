// Stream-ordered passes, on a GPU that a thread plays: the caller runs ahead, results are those of host-driven passes,
// and whatever becomes of a round, no stream is left waiting and no caller uninformed.

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_round.h"
#include "client/cc/device_runtime.h"
#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "tests/client/cc/cuda/layer_step.h"
#include "tests/client/cc/worker_group.h"
#include "tests/testing/gpu/fake_device_runtime.h"

namespace syncbn::testing {
namespace {

// Never destroyed: what the library keeps for its streams outlives a test.
FakeDeviceRuntime& Gpu() {
  static FakeDeviceRuntime* const gpu = new FakeDeviceRuntime;
  return *gpu;
}

bool AllNan(const Doubles& values) {
  return std::all_of(values.begin(), values.end(), [](double value) { return std::isnan(value); });
}

// On a GPU, stream-ordered. Its memory stays until the stream has run out of work.
struct GpuStep : Step {
  GpuStep(int64_t rows, int seed, Stream on_stream, int on_device = 0) : Step(rows, seed, Device::kCuda) {
    index = on_device;
    stream = on_stream;
    stream_ordered = true;
  }
  GpuStep(const GpuStep&) = default;
  ~GpuStep() override { Gpu().Drain(stream); }
  void CountBatch() override {
    Gpu().Enqueue(stream, [this] { ++batches; });
  }
};

class StreamOrderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    DeviceRuntime::SetForTesting(&Gpu());
    Gpu().Fail(DeviceRuntime::kSuccess, false);
    Gpu().StartGpu();
    master_ = StartMaster();
    stream_ = Gpu().MakeStream(0);
  }
  // Ends only if no stream is left waiting.
  void TearDown() override {
    Gpu().StopGpu();
    DeviceRuntime::SetForTesting(nullptr);
  }

  std::unique_ptr<Worker> Join(uint32_t rank, uint32_t world_size,
                               const std::function<void(Worker::Options&)>& change = nullptr) {
    Worker::Options options = WorkerOptions(master_->target(), rank, world_size);
    options.round_timeout = absl::Seconds(10);
    if (change) change(options);
    auto worker = JoinOrDie(std::move(options));
    for (int layer = 0; layer < kLayers; ++layer) {
      LayerOptions declared = BatchNormOptions(absl::StrCat("bn", layer), kChannels);
      declared.eps = kEps;
      EXPECT_TRUE(worker->DeclareLayer(declared).ok());
    }
    return worker;
  }

  // Allocates on the stream what `passes` forward passes and as many backward passes that are alive at once need: on
  // this GPU, memory is got only when no stream waits.
  void Reserve(Stream stream, int device, int passes) {
    auto alone = JoinOrDie([&] {
      Worker::Options options = WorkerOptions(master_->target(), 0, 1);
      options.group = absl::StrCat("reserve", groups_++);
      return options;
    }());
    LayerOptions layer = BatchNormOptions("reserve", kChannels);
    ASSERT_TRUE(alone->DeclareLayer(layer).ok());
    GpuStep step(64, 1, stream, device);
    step.stream_ordered = false;
    std::vector<ForwardPass> forward;
    std::vector<BackwardPass> backward;
    for (int i = 0; i < passes; ++i) {
      auto pass = step.Forward(*alone, "reserve");
      ASSERT_TRUE(pass.ok()) << pass.status();
      forward.push_back(*std::move(pass));
      auto back = BackwardPass::Start(*alone, forward.back().statistics(), step.Inputs(), step.Options());
      ASSERT_TRUE(back.ok()) << back.status();
      ASSERT_TRUE(back->Wait().ok());
      backward.push_back(*std::move(back));
    }
    Gpu().Drain(stream);
  }

  static constexpr int kLayers = 4;
  std::unique_ptr<MasterServer> master_;
  Stream stream_ = nullptr;
  int groups_ = 0;
};

// All calls of one worker return before the other worker has made its first: by one thread.
TEST_F(StreamOrderTest, RunsAhead) {
  auto ahead = Join(0, 2), other = Join(1, 2);
  Reserve(stream_, 0, kLayers);
  const int allocations = Gpu().allocations();
  std::vector<GpuStep> steps;
  for (int i = 0; i < kLayers; ++i) steps.push_back(GpuStep(5 + i, i, stream_));
  for (Step& step : steps) std::fill(step.y.begin(), step.y.end(), 17.0);
  std::vector<ForwardPass> passes;
  for (int i = 0; i < kLayers; ++i) {
    auto pass = steps[i].Forward(*ahead, absl::StrCat("bn", i));
    ASSERT_TRUE(pass.ok()) << pass.status();
    EXPECT_TRUE(pass->stream_ordered());
    EXPECT_TRUE(IsPending(pass->Wait(absl::ZeroDuration())));
    passes.push_back(*std::move(pass));
  }
  for (int i = kLayers - 1; i >= 0; --i) ASSERT_TRUE(steps[i].Backward(*ahead, passes[i]).ok());
  Gpu().AwaitBlocked(stream_);
  EXPECT_EQ(Gpu().allocations(), allocations);
  EXPECT_EQ(steps[0].y, Doubles(steps[0].y.size(), 17.0));
  EXPECT_TRUE(IsPending(ahead->Settle(absl::ZeroDuration())));

  std::vector<Step> others;
  for (int i = 0; i < kLayers; ++i) others.emplace_back(3, 20 + i, Device::kCpu);
  std::vector<ForwardPass> other_passes;
  for (int i = 0; i < kLayers; ++i) {
    auto pass = others[i].Forward(*other, absl::StrCat("bn", i));
    ASSERT_TRUE(pass.ok()) << pass.status();
    other_passes.push_back(*std::move(pass));
  }
  for (int i = kLayers - 1; i >= 0; --i) ASSERT_TRUE(others[i].Backward(*other, other_passes[i]).ok());
  EXPECT_TRUE(ahead->Settle().ok());
  Gpu().Drain(stream_);

  // The same batches, both workers on the CPU.
  auto a = Join(0, 2, [](Worker::Options& options) { options.group = "expected"; });
  auto b = Join(1, 2, [](Worker::Options& options) { options.group = "expected"; });
  for (int i = 0; i < kLayers; ++i) {
    Step first(5 + i, i, Device::kCpu), second(3, 20 + i, Device::kCpu);
    OnEachRank(2, [&](uint32_t rank) {
      EXPECT_TRUE((rank == 0 ? first : second).Run(rank == 0 ? *a : *b, absl::StrCat("bn", i)).ok());
    });
    ExpectNear(steps[i].y, first.y, "y");
    ExpectNear(steps[i].dx, first.dx, "dx");
    ExpectNear(steps[i].d_weight, first.d_weight, "d_weight");
    ExpectNear(steps[i].d_bias, first.d_bias, "d_bias");
    ExpectNear(steps[i].running_mean, first.running_mean, "running_mean");
    ExpectNear(steps[i].running_var, first.running_var, "running_var");
    ExpectNear(others[i].dx, second.dx, "dx of the other");
  }
}

// Two workers, a GPU each, several steps through several layers: the bits of host-driven passes. The workers' threads
// make no call to CUDA, though memory is allocated while streams wait.
TEST_F(StreamOrderTest, EqualsHostDriven) {
  const Stream streams[2] = {stream_, Gpu().MakeStream(1)};
  const auto run = [&](bool stream_ordered, const std::string& group) {
    std::vector<std::vector<GpuStep>> all(2);
    std::set<std::thread::id> threads[2];
    OnEachRank(2, [&](uint32_t rank) {
      threads[rank].insert(std::this_thread::get_id());
      auto worker = Join(rank, 2, [&](Worker::Options& options) { options.group = group; });
      const int device = static_cast<int>(rank);
      for (int i = 0; i < 5 * kLayers; ++i) {
        all[rank].push_back(GpuStep(2 + (i + rank) % 7 * (rank + 1), 100 * rank + i, streams[rank], device));
      }
      for (int i = 0; i < 5 * kLayers; i += kLayers) {
        std::vector<ForwardPass> passes;
        for (int layer = 0; layer < kLayers; ++layer) {
          Step& step = all[rank][i + layer];
          step.stream_ordered = stream_ordered;
          auto pass = step.Forward(*worker, absl::StrCat("bn", layer));
          ASSERT_TRUE(pass.ok()) << pass.status();
          ASSERT_EQ(pass->stream_ordered(), stream_ordered);
          passes.push_back(*std::move(pass));
        }
        for (int layer = kLayers - 1; layer >= 0; --layer) {
          ASSERT_TRUE(all[rank][i + layer].Backward(*worker, passes[layer]).ok());
        }
      }
      EXPECT_TRUE(worker->Leave("done").ok());
      Gpu().Drain(streams[rank]);
    });
    std::set<std::thread::id> callers = Gpu().callers();
    for (const std::set<std::thread::id>& own : threads) {
      for (const std::thread::id id : own) callers.erase(id);
    }
    EXPECT_EQ(callers.size(), 0u);
    return all;
  };
  const std::vector<std::vector<GpuStep>> ahead = run(true, "ahead");
  Gpu().StopGpu();
  Gpu().StartGpu();
  const std::vector<std::vector<GpuStep>> driven = run(false, "driven");
  for (int rank = 0; rank < 2; ++rank) {
    for (int i = 0; i < 5 * kLayers; ++i) {
      EXPECT_EQ(ahead[rank][i].y, driven[rank][i].y);
      EXPECT_EQ(ahead[rank][i].dx, driven[rank][i].dx);
      EXPECT_EQ(ahead[rank][i].d_weight, driven[rank][i].d_weight);
      EXPECT_EQ(ahead[rank][i].d_bias, driven[rank][i].d_bias);
      EXPECT_EQ(ahead[rank][i].running_mean, driven[rank][i].running_mean);
      EXPECT_EQ(ahead[rank][i].running_var, driven[rank][i].running_var);
    }
  }
}

// As many slots as passes were ever ahead at once, however many there were.
TEST_F(StreamOrderTest, SlotsAreUsedAgain) {
  auto worker = Join(0, 1);
  Reserve(stream_, 0, 4);
  const int before = Gpu().allocations();
  GpuStep step(4, 1, stream_);
  for (int i = 0; i < 50; ++i) {
    ASSERT_TRUE(step.Run(*worker, "bn0").ok());
    ASSERT_TRUE(step.Run(*worker, "bn1").ok());
    ASSERT_TRUE(worker->Settle().ok());
  }
  EXPECT_EQ(Gpu().allocations(), before);
}

// The thread that watches for reductions wakes when it means to, where the system can do it: timers have no slack.
TEST_F(StreamOrderTest, TheThreadSleepsPrecisely) {
  int least = -1, slack = -1;
  std::thread([&] {
    prctl(PR_SET_TIMERSLACK, 1UL);
    least = prctl(PR_GET_TIMERSLACK);
  }).join();
  auto worker = Join(0, 1);
  auto lease = LeaseSlot(&Gpu(), 0, stream_, kChannels);
  ASSERT_TRUE(lease.ok()) << lease.status();
  __atomic_store_n((*lease)->slot().flag, (*lease)->slot().epoch, __ATOMIC_RELEASE);
  const auto begin = [&](Worker&, const double*, const double*) -> absl::StatusOr<Round> {
    slack = prctl(PR_GET_TIMERSLACK);
    return absl::CancelledError("enough");
  };
  const auto round = DeviceRound::StartStreamOrdered(*worker, {"bn0", Phase::kForward}, *std::move(lease), begin);
  ASSERT_TRUE(round.ok()) << round.status();
  EXPECT_EQ((*round)->Wait(absl::InfiniteDuration()).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(slack, least);
}

// A cumulative average, whose weights are in the GPU's memory: the caller does not have to know how many batches there
// were, which it could only know by waiting for the stream.
TEST_F(StreamOrderTest, CumulativeAverage) {
  constexpr int kBatches = 4, kRows = 6;
  auto worker = Join(0, 1);
  GpuStep step(kRows, 0, stream_);
  step.cumulative = true;
  Doubles expected(kChannels, 0.0);
  for (int batch = 0; batch < kBatches; ++batch) {
    step.x = Values(kRows, batch);
    ASSERT_TRUE(step.Run(*worker, "bn0").ok());
    ASSERT_TRUE(worker->Settle().ok());
    Gpu().Drain(stream_);
    for (size_t i = 0; i < step.x.size(); ++i) expected[i % kChannels] += step.x[i] / kRows / kBatches;
  }
  EXPECT_EQ(step.batches, kBatches);
  ExpectNear(step.running_mean, expected, "running_mean");
}

// The host may wait, and then has the statistics that a host-driven pass has.
TEST_F(StreamOrderTest, WaitIsAllowed) {
  auto ahead = Join(0, 2), other = Join(1, 2);
  Reserve(stream_, 0, 2);
  GpuStep step(5, 1, stream_);
  Step rest(3, 2, Device::kCpu);
  auto pass = step.Forward(*ahead, "bn0");
  ASSERT_TRUE(pass.ok());
  EXPECT_EQ(pass->statistics()->channels, kChannels);
  EXPECT_EQ(pass->statistics()->count, 0);
  std::thread thread([&] { EXPECT_TRUE(rest.Run(*other, "bn0").ok()); });
  EXPECT_TRUE(pass->Wait().ok());
  EXPECT_TRUE(pass->Wait().ok());
  EXPECT_EQ(pass->sequence(), 0u);
  EXPECT_EQ(pass->statistics()->count, 8);
  EXPECT_EQ(pass->statistics()->mean.size(), static_cast<size_t>(kChannels));
  EXPECT_TRUE(pass->statistics()->backward_required);
  EXPECT_TRUE(pass->stream_ordered());
  // Finishing again normalizes again, as a second forward pass of a checkpoint does.
  GpuStep again = step;
  std::fill(again.y.begin(), again.y.end(), 0.0);
  ForwardArguments outputs = again.Outputs();
  outputs.running_mean = outputs.running_var = VectorView();
  ASSERT_TRUE(pass->Finish(View(again.x, Device::kCuda), outputs).ok());
  auto backward = BackwardPass::Start(*ahead, pass->statistics(), step.Inputs(), step.Options());
  ASSERT_TRUE(backward.ok());
  EXPECT_TRUE(backward->Wait().ok());
  BackwardOutputs gradients;
  gradients.dx = step.dx.data();
  EXPECT_TRUE(backward->Finish(gradients).ok());
  thread.join();
  Gpu().Drain(stream_);
  EXPECT_EQ(again.y, step.y);
  EXPECT_FALSE(AllNan(step.dx));
}

// Passes that need the round's outcome early, or cannot wait on the GPU, are driven by the host.
TEST_F(StreamOrderTest, FallsBackToTheHost) {
  auto worker = Join(0, 1);
  const auto is_ordered = [&](Worker& by, Step& step, BackwardRole role) {
    PassOptions options = step.Options();
    options.backward_role = role;
    auto pass = ForwardPass::Start(by, "bn0", View(step.x, Device::kCuda), options);
    EXPECT_TRUE(pass.ok()) << pass.status();
    EXPECT_TRUE(pass->Wait().ok());
    return pass->stream_ordered();
  };
  GpuStep two(2, 1, stream_), one(1, 1, stream_), none(0, 1, stream_);
  EXPECT_TRUE(is_ordered(*worker, two, BackwardRole::kRequired));
  EXPECT_TRUE(is_ordered(*worker, two, BackwardRole::kNone));
  EXPECT_FALSE(is_ordered(*worker, two, BackwardRole::kIfRequired));
  EXPECT_FALSE(is_ordered(*worker, one, BackwardRole::kRequired));
  EXPECT_FALSE(is_ordered(*worker, none, BackwardRole::kRequired));
  auto proceeding = Join(0, 1, [](Worker::Options& options) {
    options.group = "proceeding";
    options.missing_policy = MissingPolicy::kProceed;
    options.min_workers = 1;
  });
  EXPECT_FALSE(is_ordered(*proceeding, two, BackwardRole::kRequired));
  EXPECT_TRUE(StreamOrderStatus(0).ok());
  EXPECT_EQ(StreamOrderStatus(7).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Gpu().preloads(0), 1);

  static FakeDeviceRuntime* const old = new FakeDeviceRuntime(false);
  DeviceRuntime::SetForTesting(old);
  GpuStep there(4, 1, old->MakeStream(0));
  EXPECT_FALSE(is_ordered(*worker, there, BackwardRole::kRequired));
  EXPECT_NE(StreamOrderStatus(0).message().find("cannot be stream-ordered"), std::string::npos);
  EXPECT_TRUE(there.Run(*worker, "bn0").ok());
  EXPECT_EQ(old->preloads(0), 0);

  // An error is not remembered.
  static FakeDeviceRuntime* const busy = new FakeDeviceRuntime;
  DeviceRuntime::SetForTesting(busy);
  busy->FailPreparation(FakeDeviceRuntime::kNotSupported);
  EXPECT_NE(StreamOrderStatus(0).message().find("801"), std::string::npos);
  busy->FailPreparation(DeviceRuntime::kSuccess);
  EXPECT_TRUE(StreamOrderStatus(0).ok());
  EXPECT_EQ(busy->preloads(0), 1);
  DeviceRuntime::SetForTesting(&Gpu());
}

// A pass without a backward round: the statistics are constants to its backward pass, which learns the count on the
// GPU.
TEST_F(StreamOrderTest, RoleNoneGoesBackWithoutARound) {
  auto worker = Join(0, 1);
  std::vector<GpuStep> steps = {GpuStep(6, 3, stream_), GpuStep(6, 3, stream_)};
  steps[1].stream_ordered = false;
  for (Step& step : steps) {
    PassOptions options = step.Options();
    options.backward_role = BackwardRole::kNone;
    auto pass = ForwardPass::Start(*worker, "bn0", View(step.x, Device::kCuda), options);
    ASSERT_TRUE(pass.ok());
    if (!step.stream_ordered) {
      ASSERT_TRUE(pass->Wait().ok());
    }
    ASSERT_TRUE(pass->Finish(View(step.x, Device::kCuda), step.Outputs()).ok());
    ASSERT_TRUE(step.Backward(*worker, *pass).ok());
  }
  Gpu().Drain(stream_);
  EXPECT_EQ(steps[0].dx, steps[1].dx);
  EXPECT_EQ(steps[0].d_weight, steps[1].d_weight);
  EXPECT_FALSE(AllNan(steps[0].dx));
}

// Host-driven and stream-ordered passes of one worker and one layer are counted in the order of their starts.
TEST_F(StreamOrderTest, MixesWithHostDrivenPasses) {
  auto worker = Join(0, 1);
  GpuStep step(4, 1, stream_);
  for (uint64_t sequence = 0; sequence < 8; ++sequence) {
    step.stream_ordered = sequence % 2 == 0;
    auto pass = step.Forward(*worker, "bn0");
    ASSERT_TRUE(pass.ok());
    ASSERT_TRUE(step.Backward(*worker, *pass).ok());
    ASSERT_TRUE(pass->Wait().ok());
    EXPECT_EQ(pass->sequence(), sequence);
  }
  EXPECT_TRUE(worker->Settle().ok());
}

// Two branches, a stream each, which the workers take in opposite orders; and a branch of two layers that must not hold
// back the other, which the other worker wants first.
TEST_F(StreamOrderTest, BranchesInAnyOrder) {
  auto first = Join(0, 2), second = Join(1, 2);
  const Stream branch = Gpu().MakeStream(0), other = Gpu().MakeStream(1);
  Reserve(stream_, 0, 2);
  Reserve(branch, 0, 1);
  Reserve(other, 1, 3);
  std::vector<GpuStep> steps = {GpuStep(4, 1, stream_), GpuStep(4, 2, stream_), GpuStep(4, 3, branch)};
  std::vector<ForwardPass> passes;
  for (int i = 0; i < 3; ++i) {
    auto pass = steps[i].Forward(*first, absl::StrCat("bn", i));
    ASSERT_TRUE(pass.ok());
    passes.push_back(*std::move(pass));
  }
  std::vector<GpuStep> there = {GpuStep(4, 4, other, 1), GpuStep(4, 5, other, 1), GpuStep(4, 6, other, 1)};
  for (const int i : {2, 0, 1}) {
    auto pass = there[i].Forward(*second, absl::StrCat("bn", i));
    ASSERT_TRUE(pass.ok());
    passes.push_back(*std::move(pass));
  }
  EXPECT_TRUE(first->Settle().ok());
  EXPECT_TRUE(second->Settle().ok());
  for (Stream stream : {stream_, branch, other}) Gpu().Drain(stream);
  for (const Step& step : steps) EXPECT_FALSE(AllNan(step.y));
}

// Two workers of a process, of two groups, that two threads use in opposite orders on streams of their own.
TEST_F(StreamOrderTest, TwoWorkersOfOneProcess) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (const char* group : {"one", "two"}) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      workers.push_back(Join(rank, 2, [&](Worker::Options& options) { options.group = group; }));
    }
  }
  Stream all_streams[2][2];
  for (int device = 0; device < 2; ++device) {
    for (Stream& stream : all_streams[device]) {
      stream = Gpu().MakeStream(device);
      Reserve(stream, device, 20);
    }
  }
  OnEachRank(2, [&](uint32_t rank) {
    const int device = static_cast<int>(rank);
    const Stream* const streams = all_streams[rank];
    GpuStep steps[2] = {GpuStep(4, 1, streams[0], device), GpuStep(4, 2, streams[1], device)};
    for (int i = 0; i < 20; ++i) {
      for (const int group : {static_cast<int>(rank), 1 - static_cast<int>(rank)}) {
        EXPECT_TRUE(steps[group].Run(*workers[2 * group + rank], "bn0").ok());
      }
    }
    for (int group = 0; group < 2; ++group) {
      EXPECT_TRUE(workers[2 * group + rank]->Settle().ok());
      Gpu().Drain(streams[group]);
      EXPECT_FALSE(AllNan(steps[group].dx));
    }
  });
}

// ---- Failures -------------------------------------------------------------------------------------------------------

// The results of one worker's passes whose rounds fail: `fail` makes them fail once the stream waits.
class StreamOrderFailureTest : public StreamOrderTest {
 public:
  void ExpectPoison() {
    Gpu().Drain(stream_);
    for (const Step& step : steps_) {
      EXPECT_TRUE(AllNan(step.y) && AllNan(step.dx) && AllNan(step.d_weight) && AllNan(step.d_bias));
      EXPECT_EQ(step.running_mean, Doubles(kChannels, 0.0));
      EXPECT_EQ(step.running_var, Doubles(kChannels, 1.0));
      EXPECT_EQ(step.batches, 0);
    }
  }

 protected:
  void SetUp() override {
    StreamOrderTest::SetUp();
    Reserve(stream_, 0, 3);
    steps_ = {GpuStep(4, 1, stream_), GpuStep(4, 2, stream_)};
  }

  // Two layers forward and back, all enqueued before the stream comes to the first of them.
  void GetAhead(Worker& worker) {
    Gpu().Hold(stream_, true);
    std::vector<ForwardPass> passes;
    for (int i = 0; i < 2; ++i) {
      auto pass = steps_[i].Forward(worker, absl::StrCat("bn", i));
      ASSERT_TRUE(pass.ok()) << pass.status();
      passes.push_back(*std::move(pass));
    }
    for (int i = 1; i >= 0; --i) ASSERT_TRUE(steps_[i].Backward(worker, passes[i]).ok());
    Gpu().Hold(stream_, false);
  }

  std::vector<GpuStep> steps_;
};

TEST_F(StreamOrderFailureTest, DeadlineSurfacesAtTheNextForwardAndTheWorkerGoesOn) {
  // The last rounds have to succeed within it, on a busy machine too.
  const auto soon = [](Worker::Options& options) { options.round_timeout = absl::Seconds(5); };
  auto worker = Join(0, 2, soon), other = Join(1, 2, soon);
  GetAhead(*worker);
  ExpectPoison();
  const absl::Status status = steps_[0].Forward(*worker, "bn0").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_EQ(DetailsOf(status).layer, "bn0");
  EXPECT_EQ(DetailsOf(status).ranks, std::vector<uint32_t>{1});
  EXPECT_TRUE(worker->Settle().ok());  // Once.
  // Passes enqueued behind the failure have taken no sequence: both workers go on with the same one.
  Step rest(3, 2, Device::kCpu);
  for (const char* layer : {"bn0", "bn1"}) {
    if (std::string(layer) == "bn0") {
      EXPECT_EQ(rest.Run(*other, layer).code(), absl::StatusCode::kDeadlineExceeded);
    }
    std::thread thread([&] { EXPECT_TRUE(rest.Run(*other, layer).ok()); });
    EXPECT_TRUE(steps_[0].Run(*worker, layer).ok());
    thread.join();
    EXPECT_TRUE(worker->Settle().ok());
    Gpu().Drain(stream_);
    EXPECT_FALSE(AllNan(steps_[0].dx));
  }
}

TEST_F(StreamOrderFailureTest, LostWorkerSurfacesAtTheNextBackward) {
  auto worker = Join(0, 2), other = Join(1, 2);
  auto pass = steps_[0].Forward(*worker, "bn2");
  ASSERT_TRUE(pass.ok());
  Step rest(3, 2, Device::kCpu);
  ASSERT_TRUE(rest.Forward(*other, "bn2").ok());
  ASSERT_TRUE(pass->Wait().ok());
  ASSERT_TRUE(steps_[0].Backward(*worker, *pass).ok());
  other->Close();
  Gpu().Drain(stream_);
  EXPECT_TRUE(AllNan(steps_[0].dx) && AllNan(steps_[0].d_weight) && AllNan(steps_[0].d_bias));
  EXPECT_FALSE(AllNan(steps_[0].y));
  const absl::Status status = steps_[0].Backward(*worker, *pass);
  EXPECT_EQ(DetailsOf(status).reason, "WORKER_LOST") << status;
}

TEST_F(StreamOrderFailureTest, InterruptSurfacesAtSettle) {
  auto worker = Join(0, 2), other = Join(1, 2);
  GetAhead(*worker);
  Gpu().AwaitBlocked(stream_);
  worker->Interrupt();
  ExpectPoison();
  const absl::Status status = worker->Settle();
  EXPECT_EQ(DetailsOf(status).reason, "INTERRUPTED") << status;
  EXPECT_TRUE(worker->Settle().ok());
}

TEST_F(StreamOrderFailureTest, RefusedNumbersSurfaceAtTheNextSum) {
  auto worker = Join(0, 1);
  steps_[0].x[0] = std::numeric_limits<double>::quiet_NaN();
  GetAhead(*worker);
  ExpectPoison();
  const absl::Status status = Sum(*worker, "gradient", {1.0}).status();
  EXPECT_EQ(DetailsOf(status).reason, "NOT_FINITE") << status;
  EXPECT_TRUE(Sum(*worker, "gradient", {1.0}).ok());
}

TEST_F(StreamOrderFailureTest, LeaveTellsOfAFailureAndLeaves) {
  const auto soon = [](Worker::Options& options) { options.round_timeout = absl::Milliseconds(100); };
  auto worker = Join(0, 2, soon), other = Join(1, 2, soon);
  GetAhead(*worker);
  EXPECT_EQ(worker->Leave("done").code(), absl::StatusCode::kDeadlineExceeded);
  ExpectPoison();
  EXPECT_TRUE(worker->Leave("again").ok());
  EXPECT_EQ(DetailsOf(worker->Flush()).reason, "LEFT");
}

// Passes that are ahead when a worker leaves are seen through.
TEST_F(StreamOrderFailureTest, LeaveWaitsForPasses) {
  auto worker = Join(0, 2), other = Join(1, 2);
  GetAhead(*worker);
  std::thread leaving([&] { EXPECT_TRUE(worker->Leave("done").ok()); });
  std::vector<Step> rest = {Step(3, 2, Device::kCpu), Step(3, 3, Device::kCpu)};
  std::vector<ForwardPass> passes;
  for (int i = 0; i < 2; ++i) passes.push_back(*rest[i].Forward(*other, absl::StrCat("bn", i)));
  for (int i = 1; i >= 0; --i) EXPECT_TRUE(rest[i].Backward(*other, passes[i]).ok());
  leaving.join();
  Gpu().Drain(stream_);
  EXPECT_FALSE(AllNan(steps_[0].dx));
}

TEST_F(StreamOrderFailureTest, CloseReleasesTheStream) {
  auto worker = Join(0, 2), other = Join(1, 2);
  GetAhead(*worker);
  Gpu().AwaitBlocked(stream_);
  worker->Close();
  ExpectPoison();
  EXPECT_EQ(DetailsOf(worker->Settle()).reason, "CLOSED");
  EXPECT_EQ(DetailsOf(steps_[0].Forward(*worker, "bn0").status()).reason, "CLOSED");
}

TEST_F(StreamOrderFailureTest, DestructionReleasesTheStream) {
  auto other = Join(1, 2);
  std::vector<ForwardPass> outlive;
  {
    auto worker = Join(0, 2);
    GetAhead(*worker);
    Gpu().AwaitBlocked(stream_);
    auto pass = steps_[0].Forward(*worker, "bn3");
    ASSERT_TRUE(pass.ok());
    outlive.push_back(*std::move(pass));
  }
  ExpectPoison();
  EXPECT_EQ(DetailsOf(outlive[0].Wait()).reason, "CLOSED");
}

// The stream has yet to come to the reduction when the round fails, and when the slot is taken anew and fails again:
// each goes on when the stream gets there, and none takes the other's fate for its own.
TEST_F(StreamOrderFailureTest, CloseBeforeTheStreamGetsThere) {
  auto alone = Join(0, 1, [](Worker::Options& options) { options.group = "alone"; });
  Gpu().Hold(stream_, true);
  for (Step& step : steps_) {
    auto worker = Join(0, 1);
    ASSERT_TRUE(step.Run(*worker, "bn0").ok());
    worker->Close();
  }
  GpuStep good(4, 3, stream_);
  ASSERT_TRUE(good.Run(*alone, "bn0").ok());
  EXPECT_TRUE(IsPending(alone->Settle(absl::ZeroDuration())));
  Gpu().Hold(stream_, false);
  ExpectPoison();
  EXPECT_TRUE(alone->Settle().ok());
  EXPECT_FALSE(AllNan(good.dx));
}

// A failure of the GPU before the flag: the worker's next call tells, nothing waits for a flag that never comes.
TEST_F(StreamOrderFailureTest, ErrorOfTheGpu) {
  auto worker = Join(0, 1);
  Gpu().Hold(stream_, true);
  ASSERT_TRUE(steps_[0].Run(*worker, "bn0").ok());
  Gpu().Run(stream_, false);
  Gpu().Fail(FakeDeviceRuntime::kLaunchFailure, true);
  const absl::Status status = worker->Settle();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("719"), std::string::npos) << status;
  EXPECT_EQ(steps_[0].Forward(*worker, "bn0").status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(worker->Leave("done").ok());
  Gpu().Fail(DeviceRuntime::kSuccess, false);
  Gpu().Hold(stream_, false);
}

// A launch that fails behind the wait leaves nothing unreleased.
TEST_F(StreamOrderFailureTest, ErrorOfALaunch) {
  auto worker = Join(0, 1);
  auto pass = ForwardPass::Start(*worker, "bn0", View(steps_[0].x, Device::kCuda), steps_[0].Options());
  ASSERT_TRUE(pass.ok());
  Gpu().Fail(FakeDeviceRuntime::kLaunchFailure, false);
  EXPECT_EQ(pass->Finish(View(steps_[0].x, Device::kCuda), steps_[0].Outputs()).code(), absl::StatusCode::kInternal);
  Gpu().Fail(DeviceRuntime::kSuccess, false);
  EXPECT_TRUE(worker->Settle().ok());
}

// Memory is freed, which waits for the streams, while one of them waits for a round: by the caller, with whatever locks
// it holds then, while the round is completed. Another caller asks CUDA for errors meanwhile, and is kept waiting.
TEST_F(StreamOrderFailureTest, MemoryGrowsWhileTheStreamWaits) {
  auto worker = Join(0, 2), other = Join(1, 2);
  constexpr int64_t kWide = 8001;  // Odd, and so many that the workspace has to grow.
  LayerOptions wide = BatchNormOptions("wide", kWide);
  ASSERT_TRUE(worker->DeclareLayer(wide).ok());
  ASSERT_TRUE(other->DeclareLayer(wide).ok());
  GetAhead(*worker);
  Gpu().AwaitBlocked(stream_);
  std::thread growing([&] {
    Doubles x(4 * kWide, 1.5), y(4 * kWide);
    TensorView view = View(x, Device::kCuda);
    view.shape.batch = 4;
    view.shape.channels = kWide;
    PassOptions options = steps_[0].Options();
    auto pass = ForwardPass::Start(*worker, "wide", view, options);
    ASSERT_TRUE(pass.ok()) << pass.status();
    ForwardArguments outputs;
    outputs.y = view;
    outputs.y.data = y.data();
    EXPECT_TRUE(pass->Finish(view, outputs).ok());
    EXPECT_TRUE(pass->Wait().ok());
    Gpu().Drain(stream_);
  });
  std::thread settling([&] { EXPECT_TRUE(worker->Settle().ok()); });
  std::vector<Step> rest = {Step(3, 2, Device::kCpu), Step(3, 3, Device::kCpu)};
  std::vector<ForwardPass> passes;
  for (int i = 0; i < 2; ++i) passes.push_back(*rest[i].Forward(*other, absl::StrCat("bn", i)));
  for (int i = 1; i >= 0; --i) EXPECT_TRUE(rest[i].Backward(*other, passes[i]).ok());
  Doubles x(2 * kWide, 2.5);
  TensorView view = View(x, Device::kCpu);
  view.shape.batch = 2;
  view.shape.channels = kWide;
  auto pass = ForwardPass::Start(*other, "wide", view, PassOptions());
  ASSERT_TRUE(pass.ok());
  EXPECT_TRUE(pass->Wait().ok());
  growing.join();
  settling.join();
  EXPECT_FALSE(AllNan(steps_[0].dx));
}

// A master that goes away and does not come back, and one that does.
TEST_F(StreamOrderFailureTest, MasterGoesAway) {
  auto worker = Join(0, 2, [](Worker::Options& options) { options.join_timeout = absl::Seconds(2); });
  auto other = Join(1, 2);
  GetAhead(*worker);
  AwaitArrival(*master_, "bn0", 0);
  master_->Shutdown(absl::ZeroDuration());
  ExpectPoison();
  const absl::Status status = worker->Settle();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

TEST_F(StreamOrderFailureTest, MasterRestarts) {
  auto worker = Join(0, 2), other = Join(1, 2);
  GetAhead(*worker);
  AwaitArrival(*master_, "bn0", 0);
  const std::string target = master_->target();
  const int port = std::stoi(target.substr(target.rfind(':') + 1));
  master_->Shutdown(absl::ZeroDuration());
  master_ = nullptr;
  master_ = StartMaster(port);
  std::vector<Step> rest = {Step(3, 2, Device::kCpu), Step(3, 3, Device::kCpu)};
  std::vector<ForwardPass> passes;
  for (int i = 0; i < 2; ++i) {
    auto pass = rest[i].Forward(*other, absl::StrCat("bn", i));
    ASSERT_TRUE(pass.ok()) << pass.status();
    passes.push_back(*std::move(pass));
  }
  for (int i = 1; i >= 0; --i) EXPECT_TRUE(rest[i].Backward(*other, passes[i]).ok());
  EXPECT_TRUE(worker->Settle().ok());
  Gpu().Drain(stream_);
  EXPECT_FALSE(AllNan(steps_[0].dx));
}

// A program that ends without closing its worker: the streams are released before what was registered earlier, as CUDA
// registers its own end, runs.
TEST_F(StreamOrderFailureTest, ExitReleasesTheStream) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        static StreamOrderFailureTest* const test = this;
        std::atexit([] {
          test->ExpectPoison();
          _exit(HasFailure() ? 3 : 5);
        });
        Worker* const worker = Join(0, 2).release();
        GetAhead(*worker);
        Gpu().AwaitBlocked(stream_);
        std::exit(0);
      },
      ::testing::ExitedWithCode(5), "");
}

// A child has neither the thread nor a connection: it is told so, and ends without either. The parent's go on.
TEST_F(StreamOrderFailureTest, AForkedChildLeavesTheThreadAlone) {
  auto worker = Join(0, 2), other = Join(1, 2);
  GetAhead(*worker);
  Gpu().AwaitBlocked(stream_);
  const pid_t child = fork();
  if (child == 0) {
    const bool told = DetailsOf(worker->Settle(absl::ZeroDuration())).reason == "FORKED" &&
                      DetailsOf(worker->Leave("child")).reason == "FORKED";
    worker.reset();
    _exit(told ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(IsPending(worker->Settle(absl::ZeroDuration())));
  worker->Interrupt();
  ExpectPoison();
  EXPECT_EQ(DetailsOf(worker->Settle()).reason, "INTERRUPTED");
}

// Closes and interrupts on another thread, at any moment.
TEST_F(StreamOrderFailureTest, InterruptsAndCloseAtAnyMoment) {
  for (int turn = 0; turn < 20; ++turn) {
    auto worker = Join(0, 1, [&](Worker::Options& options) { options.group = absl::StrCat("turn", turn); });
    std::atomic<int> runs{0};
    std::thread nuisance([&] {
      while (runs < turn) worker->Interrupt();
      worker->Close();
    });
    while (true) {
      const absl::Status status = steps_[0].Run(*worker, "bn0");
      ++runs;
      if (status.ok()) continue;
      const std::string reason = DetailsOf(status).reason;
      if (reason == "CLOSED") break;
      ASSERT_EQ(reason, "INTERRUPTED") << status;
    }
    nuisance.join();
    Gpu().Drain(stream_);
  }
}

}  // namespace
}  // namespace syncbn::testing
