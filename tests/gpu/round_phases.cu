// Measures the phases of a round that are not the network's: from the end of a kernel until the host knows of it,
// from the host's decision until the next kernel starts, and the gap between the two kernels if the host decides at
// once. The gap is measured by the GPU's clock alone. To separate its two parts, the GPU's clock is compared with the
// host's before each batch of cycles; the results include the error of that comparison.
//
//   round_phases RESULTS.json [--quick]

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/driver.cuh"
#include "tests/gpu/device.h"

namespace syncbn::testing {
namespace {

constexpr int kSamples = 200;      // Samples of the clocks.
constexpr int64_t kDelay = 30000;  // Nanoseconds that a kernel takes, so that the host has enqueued all that follows.
constexpr int64_t kPatience = 10'000'000;  // Nanoseconds that a host without a processor of its own is waited for.
constexpr size_t kCopied = 4096;

// In mapped pinned memory; what one side writes and the other polls has a cache line of its own.
struct Mapped {
  alignas(64) uint32_t ended;     // The GPU's: the epoch whose first kernel has ended,
  alignas(64) uint32_t begun;     // and whose second has begun.
  alignas(64) uint32_t released;  // The host's: the epoch whose second kernel may begin.
  alignas(64) int64_t host_clock;
  alignas(64) int64_t end_time;  // The GPU's clock then.
  int64_t begin_time;
  alignas(64) int64_t samples[kSamples][3];  // The GPU's clock, the host's as read from there, the GPU's again.
};

#if defined(__CUDACC__)

__device__ int64_t DeviceClock() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}
__device__ int64_t ReadHost(const int64_t* address) { return *reinterpret_cast<const volatile int64_t*>(address); }
__device__ void Raise(uint32_t* flag, uint32_t value) {
  __threadfence_system();
  *reinterpret_cast<volatile uint32_t*>(flag) = value;
}

#else  // With host/cuda_runtime.h: the "GPU's" clock is the host's, put forward.

int64_t DeviceClock() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count() + 123456789;
}
int64_t ReadHost(const int64_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
void Raise(uint32_t* flag, uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }

#endif

__global__ void EndKernel(Mapped* mapped, uint32_t epoch) {
  const int64_t start = DeviceClock();
  while (DeviceClock() - start < kDelay) {
  }
  mapped->end_time = DeviceClock();
  Raise(&mapped->ended, epoch);
}

__global__ void BeginKernel(Mapped* mapped, uint32_t epoch) {
  mapped->begin_time = DeviceClock();
  Raise(&mapped->begun, epoch);
}

// A sample is of a time that the host has just written: the read before gave another.
__global__ void SampleKernel(Mapped* mapped, uint32_t epoch) {
  int64_t last = 0;
  for (int i = 0; i < kSamples; ++i) {
    int64_t before, host, after;
    const int64_t start = DeviceClock();
    do {
      before = DeviceClock();
      host = ReadHost(&mapped->host_clock);
      after = DeviceClock();
    } while (host == last && after - start < kPatience);
    last = host;
    mapped->samples[i][0] = before;
    mapped->samples[i][1] = host;
    mapped->samples[i][2] = after;
  }
  Raise(&mapped->ended, epoch);
}

int64_t HostClock() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `meanwhile` until the flag has the value.
template <typename Function>
void WaitFor(const uint32_t* flag, uint32_t value, const char* what, Function meanwhile) {
  const int64_t give_up = HostClock() + 5'000'000'000;
  for (int64_t polls = 0; __atomic_load_n(flag, __ATOMIC_ACQUIRE) != value; ++polls) {
    meanwhile();
    if (polls % 1024 == 1023) {
      if (HostClock() > give_up) Require(cudaErrorNotReady, what);
      std::this_thread::yield();
    }
  }
}
void WaitFor(const uint32_t* flag, uint32_t value, const char* what) {
  WaitFor(flag, value, what, [] {});
}

// The host's time = the GPU's + offset, give or take `uncertainty`.
struct Offset {
  int64_t offset = 0;
  int64_t uncertainty = 0;
};

// The durations, in microseconds, of many cycles of one kind.
struct Phase {
  std::string phase, how;
  bool compares_clocks = false;
  std::vector<double> us;
};

class Measurement {
 public:
  explicit Measurement(int batches) : batches_(batches) {
    void* memory = nullptr;
    Require(cudaHostAlloc(&memory, sizeof(Mapped), cudaHostAllocMapped), "cudaHostAlloc");
    mapped_ = static_cast<Mapped*>(memory);
    std::memset(memory, 0, sizeof(Mapped));
    Require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  ~Measurement() {
    cudaStreamDestroy(stream_);
    cudaFreeHost(mapped_);
  }

  void Run() {
    // Each way of learning the end of a kernel, with each way of going on. Waiting in the stream comes second: CUDA
    // loads a kernel with its first launch, and may want the stream to be empty then.
    Cycles("flag in host memory", "launch", [&](uint32_t epoch) {
      Launch(EndKernel, 1, 1, stream_, mapped_, epoch);
      return Seen{AwaitEnd(epoch), [this, epoch] { Launch(BeginKernel, 1, 1, stream_, mapped_, epoch); }};
    });
    if (auto* const wait = kernels::cuda::DriverFunction<WaitValue>("cuStreamWaitValue32", 12000); wait != nullptr) {
      Cycles("flag in host memory", "stream waits for a value", [&](uint32_t epoch) {
        Launch(EndKernel, 1, 1, stream_, mapped_, epoch);
        Require(wait(stream_, reinterpret_cast<unsigned long long>(&mapped_->released), epoch, 0),
                "cuStreamWaitValue32");
        Launch(BeginKernel, 1, 1, stream_, mapped_, epoch);
        return Seen{AwaitEnd(epoch), [this, epoch] { __atomic_store_n(&mapped_->released, epoch, __ATOMIC_RELEASE); }};
      });
    } else {
      notes_.push_back("the driver has no cuStreamWaitValue32");
    }
    const DeviceBuffer source(kCopied);
    void* target = nullptr;
    Require(cudaHostAlloc(&target, kCopied, cudaHostAllocMapped), "cudaHostAlloc");
    Cycles("copy and synchronize", "launch", [&](uint32_t epoch) {
      Launch(EndKernel, 1, 1, stream_, mapped_, epoch);
      Require(cudaMemcpyAsync(target, source.data(), kCopied, cudaMemcpyDeviceToHost, stream_), "copy");
      Require(cudaStreamSynchronize(stream_), "synchronize");
      return Seen{HostClock(), [this, epoch] { Launch(BeginKernel, 1, 1, stream_, mapped_, epoch); }};
    });
    cudaFreeHost(target);
    Statistics();
  }

  void Write(const char* path) const {
    std::FILE* const file = std::fopen(path, "w");
    if (file == nullptr) Require(cudaErrorNotReady, path);
    std::vector<int64_t> uncertainties = uncertainties_;
    std::sort(uncertainties.begin(), uncertainties.end());
    std::fprintf(file, "{\"rows\": [");
    const char* separator = "\n";
    for (const Phase& phase : phases_) {
      std::vector<double> us = phase.us;
      std::sort(us.begin(), us.end());
      std::fprintf(file, "%s {\"phase\": \"%s\", \"how\": \"%s\", \"median_us\": %.3f, \"p90_us\": %.3f", separator,
                   phase.phase.c_str(), phase.how.c_str(), us[us.size() / 2], us[us.size() * 9 / 10]);
      if (phase.compares_clocks) {
        std::fprintf(file, ", \"uncertainty_us\": %.3f", uncertainties[uncertainties.size() / 2] * 1e-3);
      }
      std::fprintf(file, "}");
      separator = ",\n";
    }
    std::fprintf(file, "\n], \"notes\": [");
    separator = "";
    for (const std::string& note : notes_) {
      std::fprintf(file, "%s\"%s\"", separator, note.c_str());
      separator = ", ";
    }
    std::fprintf(file, "]}\n");
    std::fclose(file);
  }

 private:
  using WaitValue = int(cudaStream_t, unsigned long long, uint32_t, unsigned);
  // The time at which the host knew that the first kernel had ended, and what lets the second begin.
  struct Seen {
    int64_t time;
    std::function<void()> release;
  };

  int64_t AwaitEnd(uint32_t epoch) {
    WaitFor(&mapped_->ended, epoch, "the first kernel");
    return HostClock();
  }

  // The GPU reads the host's clock from memory, where the host keeps writing it. What it reads was the time before the
  // answer reached it, so host - after <= offset, and of many samples the largest is nearest. It is too small by no
  // more than that read took, and by how old the value was: a store, some 0.2 microseconds. The first sample may be of
  // a time written long ago, but then it is far from the largest.
  Offset SetClocks() {
    __atomic_store_n(&mapped_->host_clock, 0, __ATOMIC_RELEASE);
    Launch(SampleKernel, 1, 1, stream_, mapped_, ++epoch_);
    WaitFor(&mapped_->ended, epoch_, "the clocks' kernel",
            [&] { __atomic_store_n(&mapped_->host_clock, HostClock(), __ATOMIC_RELEASE); });
    const auto* best = &mapped_->samples[0];
    for (const auto& sample : mapped_->samples) {
      if (sample[1] - sample[2] > (*best)[1] - (*best)[2]) best = &sample;
    }
    const int64_t width = (*best)[2] - (*best)[0] + 200;
    return {(*best)[1] - (*best)[2] + width / 2, width / 2};
  }

  template <typename Begin>
  void Cycles(const std::string& how_known, const std::string& how_released, Begin begin) {
    Phase to_host{"kernel's end to host", how_known, true, {}};
    Phase to_kernel{"host to next kernel's start", how_released, true, {}};
    Phase gap{"gap between the kernels", how_known + "; " + how_released, false, {}};
    for (int batch = 0; batch < batches_; ++batch) {
      const Offset clocks = SetClocks();
      uncertainties_.push_back(clocks.uncertainty);
      for (int cycle = 0; cycle < 50; ++cycle) {
        const Seen seen = begin(++epoch_);
        const int64_t released = HostClock();
        seen.release();
        WaitFor(&mapped_->begun, epoch_, "the second kernel");
        to_host.us.push_back((seen.time - mapped_->end_time - clocks.offset) * 1e-3);
        to_kernel.us.push_back((mapped_->begin_time + clocks.offset - released) * 1e-3);
        gap.us.push_back((mapped_->begin_time - mapped_->end_time) * 1e-3);
        Require(cudaStreamSynchronize(stream_), "synchronize");
      }
    }
    for (Phase* phase : {&to_host, &to_kernel, &gap}) phases_.push_back(std::move(*phase));
  }

  // A small layer's statistics, from the call until the host may read them.
  void Statistics() {
    kernels::TensorShape shape;
    shape.batch = 8;
    shape.channels = 64;
    shape.spatial = 49;
    const std::vector<float> host(shape.size(), 1.0f);
    const DeviceBuffer x(shape.size() * sizeof(float), 0, host.data());
    const size_t workspace_bytes = kernels::cuda::WorkspaceBytes(shape);
    const DeviceBuffer workspace(workspace_bytes);
    Require(cudaMemset(workspace.data(), 0, workspace_bytes), "cudaMemset");
    Require(cudaDeviceSynchronize(), "synchronize");
    void* results = nullptr;
    Require(cudaHostAlloc(&results, 2 * shape.channels * sizeof(double), cudaHostAllocMapped), "cudaHostAlloc");
    kernels::cuda::Context context;
    context.stream = stream_;
    context.workspace = workspace.data();
    context.workspace_bytes = workspace_bytes;
    Phase phase{"statistics' launch to host", "8x64x7x7 float32, flag in host memory", false, {}};
    for (int cycle = 0; cycle < 50 * batches_; ++cycle) {
      context.signal = {&mapped_->ended, ++epoch_};
      double* const mean = static_cast<double*>(results);
      const int64_t begin = HostClock();
      Require(kernels::cuda::BatchNormStats(context, shape, x.data(), mean, mean + shape.channels), "stats");
      phase.us.push_back((AwaitEnd(epoch_) - begin) * 1e-3);
      Require(cudaStreamSynchronize(stream_), "synchronize");
    }
    phases_.push_back(std::move(phase));
    cudaFreeHost(results);
  }

  const int batches_;
  cudaStream_t stream_ = nullptr;
  Mapped* mapped_ = nullptr;
  uint32_t epoch_ = 0;
  std::vector<int64_t> uncertainties_;  // One of each batch.
  std::vector<Phase> phases_;
  std::vector<std::string> notes_;
};

}  // namespace
}  // namespace syncbn::testing

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: round_phases RESULTS.json [--quick]\n");
    return 2;
  }
  if (!syncbn::kernels::cuda::Available()) {
    syncbn::testing::PrintWhyNoGpu();
    return 0;
  }
  syncbn::testing::Measurement measurement(argc > 2 && std::strcmp(argv[2], "--quick") == 0 ? 2 : 20);
  measurement.Run();
  measurement.Write(argv[1]);
  std::printf("phases: written to %s\n", argv[1]);
  return 0;
}
