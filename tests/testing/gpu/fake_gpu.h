// The streams of a GPU, for tests: work that the host does in the order of each stream. It is done when it is enqueued;
// or later, when the test says so; or on a thread, as on a GPU.

#ifndef SYNCBN_TESTS_TESTING_GPU_FAKE_GPU_H_
#define SYNCBN_TESTS_TESTING_GPU_FAKE_GPU_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

struct CUstream_st;

namespace syncbn::testing {

// Thread safety: any thread. A call waits for the work that is under way.
class FakeGpu {
 public:
  using Stream = CUstream_st*;

  FakeGpu() = default;
  FakeGpu(const FakeGpu&) = delete;
  FakeGpu& operator=(const FakeGpu&) = delete;

  // Streams are numbers, never memory.
  Stream MakeStream(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t id = ++streams_made_;
    const Stream stream = reinterpret_cast<Stream>(id << 8);
    streams_[stream].device = device;
    streams_[stream].id = id;
    return stream;
  }
  // Waits for the stream's work first.
  void DestroyStream(Stream stream) {
    Drain(stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(stream);
  }
  int device_of(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_[stream].device;
  }
  uint64_t id_of(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_[stream].id;
  }
  size_t queued(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_[stream].work.size();
  }

  // Adds work to a stream, which stops in front of it until `ready` returns true (null: at once). False if it had to be
  // done now and was not ready.
  bool Enqueue(Stream stream, std::function<void()> run, std::function<bool()> ready = nullptr) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (deferred_ || gpu_.joinable()) {
      streams_[stream].work.push_back({std::move(run), std::move(ready)});
      return true;
    }
    if (ready != nullptr && !ready()) return false;
    run();
    return true;
  }

  // Work is done when it is enqueued, or, after Defer(true), only by Run.
  void Defer(bool defer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    deferred_ = defer;
  }
  // Does the stream's work; without `run` it is lost, as after a kernel that failed.
  void Run(Stream stream, bool run = true) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::deque<Work> work = std::exchange(streams_[stream].work, {});
    done_.notify_all();
    if (!run) return;
    for (const Work& one : work) one.run();
  }

  // From here on a thread does the work of all streams, each in its order and none waiting for another.
  void StartGpu() {
    gpu_ = std::thread([this] { RunStreams(); });
  }
  // Ends the thread when all streams have run out of work.
  void StopGpu() {
    AwaitIdle();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    gpu_.join();
    stopping_ = false;
  }
  // Keeps the thread from a stream's work, as if the stream were busy with something else.
  void Hold(Stream stream, bool held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_[stream].held = held;
  }
  // Waits until the thread has done the stream's work.
  void Drain(Stream stream) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return streams_[stream].work.empty(); });
  }
  // Waits until a stream stops in front of work that is not ready.
  void AwaitBlocked(Stream stream) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return streams_[stream].blocked; });
  }
  // Waits until the thread, if there is one, has done the work of all streams of a device, or of all devices.
  void AwaitIdle(int device = kAllDevices) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!gpu_.joinable()) return;
    done_.wait(lock, [this, device] {
      for (const auto& [handle, stream] : streams_) {
        if ((device == kAllDevices || stream.device == device) && !stream.work.empty()) return false;
      }
      return true;
    });
  }

 private:
  static constexpr int kAllDevices = -1;

  struct Work {
    std::function<void()> run;
    std::function<bool()> ready;
  };
  struct State {
    int device = 0;
    uint64_t id = 0;
    bool held = false;
    bool blocked = false;
    std::deque<Work> work;  // The first is under way until it is popped.
  };

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

  std::mutex mutex_;
  std::condition_variable done_;
  std::thread gpu_;
  bool stopping_ = false;
  bool deferred_ = false;
  uint64_t streams_made_ = 0;
  std::map<Stream, State> streams_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_GPU_FAKE_GPU_H_
