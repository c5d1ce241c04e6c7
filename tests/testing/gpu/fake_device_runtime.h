// A GPU for tests of the client: DeviceRuntime over a FakeGpu, with the errors that a test asks for.

#ifndef SYNCBN_TESTS_TESTING_GPU_FAKE_DEVICE_RUNTIME_H_
#define SYNCBN_TESTS_TESTING_GPU_FAKE_DEVICE_RUNTIME_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "client/cc/device_runtime.h"
#include "tests/testing/gpu/fake_gpu.h"
#include "tests/testing/gpu/launches.h"

namespace syncbn::testing {

// Two devices. As CUDA may, freeing and allocating memory waits until all streams of the device have run out of work,
// and keeps every other call for the device out meanwhile.
//
// Thread safety: any thread.
class FakeDeviceRuntime : public DeviceRuntime, public FakeGpu {
 public:
  using Stream = syncbn::Stream;

  static constexpr int kDevices = 2;
  static constexpr Error kInvalidDevice = 101;
  static constexpr Error kWrongDevice = 400;  // cudaErrorInvalidResourceHandle.
  static constexpr Error kLaunchFailure = 719;
  static constexpr Error kNotSupported = 801;
  static constexpr Error kNotPreloaded = 999999;  // No error of CUDA's: the kernels were not loaded before a wait.

  explicit FakeDeviceRuntime(bool can_wait = true) : can_wait_(can_wait) {}

  void StartGpu() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      callers_.clear();
    }
    FakeGpu::StartGpu();
  }
  // The threads that have made calls since StartGpu.
  std::set<std::thread::id> callers() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return callers_;
  }
  // Makes CanWaitForValue return this error.
  void FailPreparation(Error error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    preparation_error_ = error;
  }
  int preloads(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return preloads_[device];
  }
  // True if anything has used the device.
  bool has_context(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return has_context_[device];
  }
  // Begins or ends the capture of a stream. What is enqueued in between runs with each Replay.
  void Capture(Stream stream, bool capturing) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing) {
      capturing_.insert(stream);
      graphs_[stream].clear();
    } else {
      capturing_.erase(stream);
    }
  }
  Error Replay(Stream stream) {
    std::vector<std::function<void()>> graph;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      graph = graphs_[stream];
    }
    for (const auto& work : graph) {
      if (const Error error = Launch(stream, work); error != kSuccess) return error;
    }
    return kSuccess;
  }
  // Makes every launch from here on, and StreamState if `sticky`, return this error.
  void Fail(Error error, bool sticky) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launch_error_ = error;
    state_error_ = sticky ? error : kSuccess;
  }
  int allocations() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return allocations_;
  }

  const char* Version() const override { return "0.0"; }
  const char* ErrorString(Error error) const override {
    return error == kSuccess ? "no error" : "an error of the test";
  }

  Error CurrentDevice(int* device) override {
    Record();
    *device = current_device_;
    return kSuccess;
  }
  Error EnterDevice(int device) override {
    Record();
    if (device < 0 || device >= kDevices) return kInvalidDevice;
    entered_from_.push_back(std::exchange(current_device_, device));
    return kSuccess;
  }
  void LeaveDevice() override {
    Record();
    current_device_ = entered_from_.back();
    entered_from_.pop_back();
  }

  Error StreamId(Stream stream, uint64_t* id) override {
    const Call call(this);
    *id = id_of(stream);
    return device_of(stream) == current_device_ ? kSuccess : kWrongDevice;
  }
  Error StreamState(Stream stream) override {
    const Call call(this);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (state_error_ != kSuccess) return state_error_;
    }
    return queued(stream) == 0 ? kSuccess : kNotReady;
  }
  Error StreamIsCapturing(Stream stream, bool* capturing) override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    *capturing = capturing_.count(stream) != 0;
    return kSuccess;
  }

  Error AllocatePinned(size_t bytes, void** memory) override { return Allocate(bytes, 0, memory); }
  Error AllocateDevice(size_t bytes, void** memory) override { return Allocate(bytes, 0xff, memory); }
  Error ZeroDevice(Stream stream, void* memory, size_t bytes) override {
    return Launch(stream, [=] { std::memset(memory, 0, bytes); });
  }
  // Memory of a graph: NaN where a replay reads it before it has written it, or after it has freed it.
  Error AllocateInStream(Stream stream, size_t bytes, void** memory) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (capturing_.count(stream) == 0) return kNotSupported;
      graph_memory_.push_back(std::make_unique<std::vector<double>>((bytes + sizeof(double) - 1) / sizeof(double)));
      *memory = graph_memory_.back()->data();
      graph_bytes_[*memory] = bytes;
    }
    return Launch(stream, [memory = *memory, bytes] { std::memset(memory, 0xff, bytes); });
  }
  Error FreeInStream(Stream stream, void* memory) override {
    size_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = graph_bytes_.find(memory);
      if (known == graph_bytes_.end()) return cuda::kInvalidValue;
      bytes = known->second;
      graph_bytes_.erase(known);
    }
    return Launch(stream, [=] { std::memset(memory, 0xff, bytes); });
  }
  // The memory that graphs have allocated and not freed.
  size_t graph_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t bytes = 0;
    for (const auto& [memory, size] : graph_bytes_) bytes += size;
    return bytes;
  }
  void FreePinned(void* memory) override { Free(memory); }
  void FreeDevice(void* memory) override { Free(memory); }

  Error CanWaitForValue(bool* can) override {
    const Call call(this);
    *can = can_wait_;
    const std::lock_guard<std::mutex> lock(mutex_);
    return preparation_error_;
  }
  Error WaitForValue(Stream stream, const uint32_t* address, uint32_t value) override {
    if (!can_wait_) return kNotSupported;
    if (preloads(current_device_) == 0) return kNotPreloaded;
    return Launch(
        stream, [] {}, [=] { return static_cast<int32_t>(__atomic_load_n(address, __ATOMIC_ACQUIRE) - value) >= 0; });
  }
  Error Preload() override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++preloads_[current_device_];
    return kSuccess;
  }

  size_t WorkspaceBytes(const kernels::TensorShape& shape) override { return cuda::WorkspaceBytes(shape); }
  Error BatchNormStats(const cuda::Context& context, const kernels::TensorShape& shape, const void* x, double* mean,
                       double* m2) override {
    if (!HasWorkspace(context, shape)) return cuda::kInvalidValue;
    return Launch(context.stream, StatsWork(context, shape, x, mean, m2));
  }
  Error BatchNormElemt(const cuda::Context& context, const kernels::TensorShape& shape, const void* x,
                       const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                       void* y) override {
    return Launch(context.stream, ElemtWork(shape, x, coefficients, epilogue, y));
  }
  Error BatchNormBackwardReduce(const cuda::Context& context, const kernels::TensorShape& shape, const void* dy,
                                const void* x, const double* mean, const kernels::ReluGate& gate, double* sum_dy,
                                double* sum_dy_xmu) override {
    if (!HasWorkspace(context, shape)) return cuda::kInvalidValue;
    return Launch(context.stream, BackwardReduceWork(context, shape, dy, x, mean, gate, sum_dy, sum_dy_xmu));
  }
  Error BatchNormBackwardElemt(const cuda::Context& context, const kernels::TensorShape& shape, const void* dy,
                               const void* x, const kernels::BackwardCoefficients& coefficients,
                               const kernels::ReluGate& gate, void* dx, void* d_residual) override {
    return Launch(context.stream, BackwardElemtWork(shape, dy, x, coefficients, gate, dx, d_residual));
  }
  Error FinalizeForward(const cuda::Context& context, const kernels::FinalizeForwardArguments& arguments) override {
    return Launch(context.stream, FinalizeWork(arguments));
  }
  Error FinalizeBackward(const cuda::Context& context, const kernels::FinalizeBackwardArguments& arguments) override {
    return Launch(context.stream, FinalizeWork(arguments));
  }

 private:
  void Record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    callers_.insert(std::this_thread::get_id());
  }

  // The entry of every call for the current device, which gives that device a context, as CUDA does.
  class Call {
   public:
    explicit Call(FakeDeviceRuntime* runtime) : lock_(runtime->driver_[current_device_]) {
      runtime->Record();
      const std::lock_guard<std::mutex> lock(runtime->mutex_);
      runtime->has_context_[current_device_] = true;
    }

   private:
    const std::lock_guard<std::mutex> lock_;
  };

  Error Allocate(size_t bytes, int fill, void** memory) {
    const Call call(this);
    AwaitIdle(current_device_);
    *memory = std::malloc(bytes);
    std::memset(*memory, fill, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++allocations_;
    return kSuccess;
  }

  void Free(void* memory) {
    const Call call(this);
    AwaitIdle(current_device_);
    std::free(memory);
  }

  Error Launch(Stream stream, std::function<void()> run, std::function<bool()> ready = nullptr) {
    const Call call(this);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (launch_error_ != kSuccess) return launch_error_;
    }
    if (device_of(stream) != current_device_) return kWrongDevice;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (capturing_.count(stream) != 0) {
        if (ready != nullptr) return kNotSupported;
        graphs_[stream].push_back(std::move(run));
        return kSuccess;
      }
    }
    return Enqueue(stream, std::move(run), std::move(ready)) ? kSuccess : kNotSupported;
  }

  inline static thread_local int current_device_ = 0;
  inline static thread_local std::vector<int> entered_from_;
  const bool can_wait_;
  std::mutex driver_[kDevices];  // Taken before mutex_ and FakeGpu's.
  mutable std::mutex mutex_;     // Guards the rest.
  std::set<std::thread::id> callers_;
  std::set<Stream> capturing_;
  std::map<Stream, std::vector<std::function<void()>>> graphs_;
  std::vector<std::unique_ptr<std::vector<double>>> graph_memory_;  // For replays, until the end.
  std::map<void*, size_t> graph_bytes_;
  int allocations_ = 0;
  int preloads_[kDevices] = {};
  bool has_context_[kDevices] = {};
  Error launch_error_ = kSuccess;
  Error state_error_ = kSuccess;
  Error preparation_error_ = kSuccess;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_GPU_FAKE_DEVICE_RUNTIME_H_
