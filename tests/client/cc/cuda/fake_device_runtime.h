// A GPU for tests: the kernels' algorithms run on the host, in the order of their stream, when the test says so; or on
// a thread, when their stream comes to them, as on a GPU.

#ifndef SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_
#define SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "client/cc/device_runtime.h"
#include "kernels/cuda/finalize.cuh"
#include "tests/kernels/cuda/host_kernels.h"

namespace syncbn::testing {

// Two devices. A stream is any non-null address; which device it is of, MakeStream says. Thread-safe.
class FakeDeviceRuntime : public DeviceRuntime {
 public:
  static constexpr int kDevices = 2;
  static constexpr Error kInvalidDevice = 101;
  static constexpr Error kWrongDevice = 400;  // cudaErrorInvalidResourceHandle.
  static constexpr Error kLaunchFailure = 719;
  static constexpr Error kNotSupported = 801;
  static constexpr Error kNotPreloaded = 999999;  // Of no GPU: a wait was enqueued before the kernels were loaded.

  explicit FakeDeviceRuntime(bool can_wait = true) : can_wait_(can_wait) {}

  // From here on a thread runs the streams, each in its order and none waiting for another. And as CUDA may, freeing
  // and allocating memory waits until all streams have run out of work, and keeps every other call out meanwhile.
  void StartGpu() {
    callers_.clear();
    gpu_ = std::thread([this] { RunStreams(); });
  }
  // When all streams have run out of work.
  void StopGpu() {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      for (int device = 0; device < kDevices; ++device) AwaitIdle(lock, device);
      stopping_ = true;
    }
    gpu_.join();
    stopping_ = false;
  }
  // Whether the stream is busy with something else.
  void Hold(Stream stream, bool held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_[stream].held = held;
  }
  // As cudaStreamSynchronize.
  void Drain(Stream stream) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return streams_[stream].work.empty(); });
  }
  // Returns when a stream has come to a wait for a value that is not there.
  void AwaitBlocked(Stream stream) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return streams_[stream].blocked; });
  }
  // The threads that have made calls since StartGpu.
  std::set<std::thread::id> callers() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return callers_;
  }
  // CanWaitForValue gives this error.
  void FailPreparation(Error error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    preparation_error_ = error;
  }
  int preloads(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return preloads_[device];
  }

  // Work runs when it is enqueued, or, after Defer, only by Run.
  void Defer(bool defer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    deferred_ = defer;
  }
  Stream MakeStream(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t id = ++streams_made_;
    const Stream stream = reinterpret_cast<Stream>(id << 8);
    streams_[stream].device = device;
    streams_[stream].id = id;
    return stream;
  }
  // Runs what the stream holds; without `run` it is lost, as after a kernel that failed.
  void Run(Stream stream, bool run = true) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::deque<Work> work = std::move(streams_[stream].work);
    streams_[stream].work.clear();
    done_.notify_all();
    if (!run) return;
    for (const Work& one : work) one.run();
  }
  void Capture(Stream stream, bool capturing) {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_[stream].capturing = capturing;
  }
  // Every launch from here on, and StreamState if `sticky`, gives this error.
  void Fail(Error error, bool sticky) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launch_error_ = error;
    state_error_ = sticky ? error : kSuccess;
  }
  int allocations() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return allocations_;
  }
  size_t queued(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_[stream].work.size();
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
  Error SetDevice(int device) override {
    Record();
    if (device < 0 || device >= kDevices) return kInvalidDevice;
    current_device_ = device;
    return kSuccess;
  }

  Error StreamId(Stream stream, uint64_t* id) override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    *id = streams_[stream].id;
    return streams_[stream].device == current_device_ ? kSuccess : kWrongDevice;
  }
  Error StreamState(Stream stream) override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_error_ != kSuccess) return state_error_;
    return streams_[stream].work.empty() ? kSuccess : kNotReady;
  }
  Error StreamIsCapturing(Stream stream, bool* capturing) override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    *capturing = streams_[stream].capturing;
    return kSuccess;
  }

  Error AllocatePinned(size_t bytes, void** memory) override { return Allocate(bytes, 0, memory); }
  Error AllocateDevice(size_t bytes, void** memory) override { return Allocate(bytes, 0xff, memory); }
  Error ZeroDevice(Stream stream, void* memory, size_t bytes) override {
    return Enqueue(stream, [=] { std::memset(memory, 0, bytes); });
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
    return Enqueue(
        stream, [] {}, [=] { return static_cast<int32_t>(__atomic_load_n(address, __ATOMIC_ACQUIRE) - value) >= 0; });
  }
  Error Preload() override {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++preloads_[current_device_];
    return kSuccess;
  }

  size_t WorkspaceBytes(const kernels::TensorShape& shape) override { return 64 + shape.channels; }
  Error BatchNormStats(const kernels::cuda::Context& context, const kernels::TensorShape& shape, const void* x,
                       double* mean, double* m2) override {
    if (context.workspace_bytes < WorkspaceBytes(shape)) return kernels::cuda::kInvalidValue;
    return Enqueue(context.stream, [=] {
      HostStats(HostRun(), shape, x, mean, m2);
      Raise(context);
    });
  }
  Error BatchNormElemt(const kernels::cuda::Context& context, const kernels::TensorShape& shape, const void* x,
                       const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue,
                       void* y) override {
    return Enqueue(context.stream, [=] {
      if (shape.size() != 0) HostElemt(HostRun(), shape, x, coefficients, epilogue, y);
    });
  }
  Error BatchNormBackwardReduce(const kernels::cuda::Context& context, const kernels::TensorShape& shape,
                                const void* dy, const void* x, const double* mean, const kernels::ReluGate& gate,
                                double* sum_dy, double* sum_dy_xmu) override {
    if (context.workspace_bytes < WorkspaceBytes(shape)) return kernels::cuda::kInvalidValue;
    return Enqueue(context.stream, [=] {
      HostBackwardReduce(HostRun(), shape, dy, x, mean, gate, sum_dy, sum_dy_xmu);
      Raise(context);
    });
  }
  Error BatchNormBackwardElemt(const kernels::cuda::Context& context, const kernels::TensorShape& shape, const void* dy,
                               const void* x, const kernels::BackwardCoefficients& coefficients,
                               const kernels::ReluGate& gate, void* dx, void* d_residual) override {
    return Enqueue(context.stream, [=] {
      if (shape.size() != 0) HostBackwardElemt(HostRun(), shape, dy, x, coefficients, gate, dx, d_residual);
    });
  }
  Error FinalizeForward(const kernels::cuda::Context& context,
                        const kernels::cuda::FinalizeForwardArguments& arguments) override {
    return Enqueue(context.stream, [=] {
      for (int64_t c = 0; c < arguments.channels; ++c) kernels::cuda::FinalizeForwardChannel(arguments, c);
    });
  }
  Error FinalizeEvaluation(const kernels::cuda::Context& context,
                           const kernels::cuda::FinalizeEvaluationArguments& arguments) override {
    return Enqueue(context.stream, [=] {
      for (int64_t c = 0; c < arguments.channels; ++c) kernels::cuda::FinalizeEvaluationChannel(arguments, c);
    });
  }
  Error FinalizeBackward(const kernels::cuda::Context& context,
                         const kernels::cuda::FinalizeBackwardArguments& arguments) override {
    return Enqueue(context.stream, [=] {
      for (int64_t c = 0; c < arguments.channels; ++c) kernels::cuda::FinalizeBackwardChannel(arguments, c);
    });
  }

 private:
  struct Work {
    std::function<void()> run;
    std::function<bool()> ready;  // Null: always.
  };
  struct StreamOfTest {
    int device = 0;
    uint64_t id = 0;
    bool capturing = false;
    bool held = false;
    bool blocked = false;
    std::deque<Work> work;
  };

  void Record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    callers_.insert(std::this_thread::get_id());
  }

  // What every call for the current device goes through.
  class Call {
   public:
    explicit Call(FakeDeviceRuntime* runtime) : lock_(runtime->driver_[current_device_]) { runtime->Record(); }

   private:
    const std::lock_guard<std::mutex> lock_;
  };

  // The executor's own flag is a plain store; a thread that polls needs a release.
  static void Raise(const kernels::cuda::Context& context) {
    if (context.signal.flag == nullptr) return;
    __atomic_store_n(context.signal.flag, context.signal.value, __ATOMIC_RELEASE);
  }

  void RunStreams() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      bool any = false;
      for (auto& [handle, stream] : streams_) {
        if (stream.held || stream.work.empty()) continue;
        const Work& work = stream.work.front();
        const bool blocked = work.ready != nullptr && !work.ready();
        any = any || blocked != stream.blocked || !blocked;
        stream.blocked = blocked;
        if (blocked) continue;
        work.run();
        stream.work.pop_front();
      }
      if (any) done_.notify_all();
      lock.unlock();
      if (!any) std::this_thread::yield();
      lock.lock();
    }
  }

  void AwaitIdle(std::unique_lock<std::mutex>& lock, int device) {
    if (!gpu_.joinable()) return;
    done_.wait(lock, [this, device] {
      for (const auto& [handle, stream] : streams_) {
        if (stream.device == device && !stream.work.empty()) return false;
      }
      return true;
    });
  }

  Error Allocate(size_t bytes, int fill, void** memory) {
    const Call call(this);
    std::unique_lock<std::mutex> lock(mutex_);
    AwaitIdle(lock, current_device_);
    ++allocations_;
    *memory = std::malloc(bytes);
    std::memset(*memory, fill, bytes);
    return kSuccess;
  }

  void Free(void* memory) {
    const Call call(this);
    std::unique_lock<std::mutex> lock(mutex_);
    AwaitIdle(lock, current_device_);
    std::free(memory);
  }

  Error Enqueue(Stream stream, std::function<void()> run, std::function<bool()> ready = nullptr) {
    const Call call(this);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (launch_error_ != kSuccess) return launch_error_;
    if (streams_[stream].device != current_device_) return kWrongDevice;
    if (deferred_ || gpu_.joinable()) {
      streams_[stream].work.push_back({std::move(run), std::move(ready)});
    } else if (ready != nullptr && !ready()) {
      return kNotSupported;
    } else {
      run();
    }
    return kSuccess;
  }

  inline static thread_local int current_device_ = 0;
  const bool can_wait_;
  std::mutex driver_[kDevices];  // Before mutex_.
  mutable std::mutex mutex_;
  std::set<std::thread::id> callers_;
  std::condition_variable done_;
  std::thread gpu_;
  bool stopping_ = false;
  bool deferred_ = false;
  uint64_t streams_made_ = 0;
  int allocations_ = 0;
  int preloads_[kDevices] = {};
  Error launch_error_ = kSuccess;
  Error state_error_ = kSuccess;
  Error preparation_error_ = kSuccess;
  std::map<Stream, StreamOfTest> streams_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_
