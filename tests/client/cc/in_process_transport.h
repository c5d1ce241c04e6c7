// A transport without a network, whose other end is a function of the test's.

#ifndef SYNCBN_TESTS_CLIENT_CC_IN_PROCESS_TRANSPORT_H_
#define SYNCBN_TESTS_CLIENT_CC_IN_PROCESS_TRANSPORT_H_

#include <algorithm>
#include <cstddef>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/optional.h"
#include "client/cc/clock.h"
#include "client/cc/transport.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::testing {

// The other end calls Send and Break, from any thread.
class InProcessTransport final : public Transport {
 public:
  // Called with each frame of the worker's, before its Write returns.
  using Master = std::function<void(InProcessTransport*, const v1::WorkerFrame&)>;

  // `part_bytes`: frames arrive in parts of this length.
  explicit InProcessTransport(Master master, size_t part_bytes = 1 << 20)
      : master_(std::move(master)), part_bytes_(part_bytes) {}

  // ---- The master's end

  void Send(const v1::MasterFrame& frame) { SendBytes(frame.SerializeAsString()); }
  void SendBytes(std::string bytes) {
    absl::MutexLock lock(&mutex_);
    if (up_) events_.push_back({Event::Kind::kFrame, std::move(bytes)});
    changed_.Signal();
  }
  // Breaks the stream, or the attempt to open one.
  void Break(absl::Status why) {
    absl::MutexLock lock(&mutex_);
    BreakLocked(std::move(why));
  }
  // Lets the attempts to connect that come now fail.
  void SetReachable(bool reachable) {
    absl::MutexLock lock(&mutex_);
    reachable_ = reachable;
  }
  // From now on, the news that a frame has been written arrives in the Wait of this number after it, 0 for the next.
  void SetWrittenAfter(int waits) {
    absl::MutexLock lock(&mutex_);
    written_after_ = waits;
  }
  int opened() const {
    absl::MutexLock lock(&mutex_);
    return opened_;
  }

  // ---- The worker's end

  void Open(const std::string&, absl::Duration) override {
    absl::MutexLock lock(&mutex_);
    EXPECT_FALSE(open_) << "a second stream";
    open_ = true;
    ++opened_;
    events_.clear();
    if (!reachable_) return BreakLocked(absl::UnavailableError("nobody listens"));
    up_ = true;
    events_.push_back({Event::Kind::kUp});
  }
  void Close() override { Break(absl::CancelledError("closed by the worker")); }
  bool IsUp() const override {
    absl::MutexLock lock(&mutex_);
    return up_;
  }
  bool Write(absl::Span<const Buffer> parts) override {
    std::string bytes;
    for (const Buffer& part : parts) bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
    v1::WorkerFrame frame;
    EXPECT_TRUE(frame.ParseFromString(bytes));
    master_(this, frame);
    absl::MutexLock lock(&mutex_);
    if (up_) events_.push_back({Event::Kind::kWritten, "", {}, waits_ + 1 + written_after_});
    return false;
  }
  void Read() override {
    absl::MutexLock lock(&mutex_);
    reading_ = up_;
  }
  void Wait(absl::Time deadline) override {
    absl::MutexLock lock(&mutex_);
    ++waits_;
    while (!Next().has_value() && !std::exchange(woken_, false)) {
      if (changed_.WaitWithTimeout(&mutex_, deadline - Now())) return;
    }
  }
  void Take(absl::FunctionRef<void(const Event&)> handle) override {
    Arrival arrival;
    {
      absl::MutexLock lock(&mutex_);
      const auto next = Next();
      if (!next.has_value()) return;
      arrival = std::move(events_[*next]);
      events_.erase(events_.begin() + static_cast<ptrdiff_t>(*next));
      if (arrival.kind == Event::Kind::kFrame) reading_ = false;
      if (arrival.kind == Event::Kind::kBroken) open_ = false;
    }
    std::vector<absl::string_view> parts;
    for (size_t begin = 0; begin < arrival.bytes.size(); begin += part_bytes_) {
      parts.push_back(absl::string_view(arrival.bytes).substr(begin, part_bytes_));
    }
    handle({arrival.kind, parts, {std::move(arrival.why)}});
  }
  void Wake() override {
    absl::MutexLock lock(&mutex_);
    woken_ = true;
    changed_.Signal();
  }

 private:
  struct Arrival {
    Event::Kind kind;
    std::string bytes = {};
    absl::Status why = {};
    int in_wait = 0;  // The first Wait that may find it.
  };

  void BreakLocked(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!open_ || broken_by_ == opened_) return;
    broken_by_ = opened_;
    up_ = reading_ = false;
    events_.clear();  // Events that are on their way do not arrive.
    events_.push_back({Event::Kind::kBroken, "", std::move(why)});
    changed_.Signal();
  }
  // Returns the first event that can arrive: frames arrive when they are asked for, others in their Wait.
  absl::optional<size_t> Next() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (size_t i = 0; i < events_.size(); ++i) {
      if (events_[i].in_wait <= waits_ && (events_[i].kind != Event::Kind::kFrame || reading_)) return i;
    }
    return absl::nullopt;
  }

  const Master master_;
  const size_t part_bytes_;
  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  std::deque<Arrival> events_ ABSL_GUARDED_BY(mutex_);
  bool reachable_ ABSL_GUARDED_BY(mutex_) = true;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;  // Until kBroken has been taken.
  bool up_ ABSL_GUARDED_BY(mutex_) = false;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;
  int waits_ ABSL_GUARDED_BY(mutex_) = 0;
  int written_after_ ABSL_GUARDED_BY(mutex_) = 0;
  int opened_ ABSL_GUARDED_BY(mutex_) = 0;
  int broken_by_ ABSL_GUARDED_BY(mutex_) = 0;  // The number of the stream that was broken last.
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_IN_PROCESS_TRANSPORT_H_
