// A GPU for tests: the kernels' algorithms run on the host, in the order of their stream, when the test says so.

#ifndef SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_
#define SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
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

  // Work runs when it is enqueued, or, after Defer, only by Run.
  void Defer(bool defer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    deferred_ = defer;
  }
  Stream MakeStream(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t id = ++streams_made_;
    const Stream stream = reinterpret_cast<Stream>(id << 8);
    streams_[stream] = {device, id, false, {}};
    return stream;
  }
  // Runs what the stream holds; without `run` it is lost, as after a kernel that failed.
  void Run(Stream stream, bool run = true) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::deque<std::function<void()>> work = std::move(streams_[stream].work);
    streams_[stream].work.clear();
    if (!run) return;
    for (const auto& one : work) one();
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
    *device = current_device_;
    return kSuccess;
  }
  Error SetDevice(int device) override {
    if (device < 0 || device >= kDevices) return kInvalidDevice;
    current_device_ = device;
    return kSuccess;
  }

  Error StreamId(Stream stream, uint64_t* id) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    *id = streams_[stream].id;
    return streams_[stream].device == current_device_ ? kSuccess : kWrongDevice;
  }
  Error StreamState(Stream stream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_error_ != kSuccess) return state_error_;
    return streams_[stream].work.empty() ? kSuccess : kNotReady;
  }
  Error StreamIsCapturing(Stream stream, bool* capturing) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    *capturing = streams_[stream].capturing;
    return kSuccess;
  }

  Error AllocatePinned(size_t bytes, void** memory) override { return Allocate(bytes, 0, memory); }
  Error AllocateDevice(size_t bytes, void** memory) override { return Allocate(bytes, 0xff, memory); }
  Error ZeroDevice(Stream stream, void* memory, size_t bytes) override {
    return Enqueue(stream, [=] { std::memset(memory, 0, bytes); });
  }
  void FreePinned(void* memory) override { std::free(memory); }
  void FreeDevice(void* memory) override { std::free(memory); }

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
  struct StreamOfTest {
    int device = 0;
    uint64_t id = 0;
    bool capturing = false;
    std::deque<std::function<void()>> work;
  };

  // The executor's own flag is a plain store; a thread that polls needs a release.
  static void Raise(const kernels::cuda::Context& context) {
    if (context.signal.flag == nullptr) return;
    __atomic_store_n(context.signal.flag, context.signal.value, __ATOMIC_RELEASE);
  }

  Error Allocate(size_t bytes, int fill, void** memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++allocations_;
    *memory = std::malloc(bytes);
    std::memset(*memory, fill, bytes);
    return kSuccess;
  }

  Error Enqueue(Stream stream, std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (launch_error_ != kSuccess) return launch_error_;
    if (streams_[stream].device != current_device_) return kWrongDevice;
    if (deferred_) {
      streams_[stream].work.push_back(std::move(work));
    } else {
      work();
    }
    return kSuccess;
  }

  inline static thread_local int current_device_ = 0;
  mutable std::mutex mutex_;
  bool deferred_ = false;
  uint64_t streams_made_ = 0;
  int allocations_ = 0;
  Error launch_error_ = kSuccess;
  Error state_error_ = kSuccess;
  std::map<Stream, StreamOfTest> streams_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_CUDA_FAKE_DEVICE_RUNTIME_H_
