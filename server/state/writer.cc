#include "server/state/writer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "plumbing/check.h"
#include "plumbing/log.h"
#include "plumbing/start_thread.h"

namespace syncbn::state {
namespace {

constexpr absl::Duration kFirstPause = absl::Milliseconds(100);
constexpr absl::Duration kLongestPause = absl::Seconds(5);
// After each success the thread rests for this many times as long as the work took, a second at most: where the cores
// are busy, storing takes 2% of one from the rounds.
constexpr int kRest = 49;
constexpr absl::Duration kLongestRest = absl::Seconds(1);

}  // namespace

absl::StatusOr<std::unique_ptr<Writer>> Writer::Start(std::unique_ptr<Store> store, std::string where) {
  std::unique_ptr<Writer> writer(new Writer(std::move(store), std::move(where)));
  absl::Status started = StartThread(
      "storing the state", [w = writer.get()] { w->Run(); }, &writer->thread_);
  if (!started.ok()) return started;
  return writer;
}

Writer::~Writer() { Close(); }

bool Writer::idle() const {
  const absl::MutexLock lock(&mutex_);
  return queue_.empty();
}

void Writer::Write(core::StateChanges changes) {
  const absl::MutexLock lock(&mutex_);
  SYNCBN_CHECK(!closing_);
  queue_.push_back(std::move(changes));
  changed_.SignalAll();
}

void Writer::Close() {
  {
    const absl::MutexLock lock(&mutex_);
    closing_ = true;
    changed_.SignalAll();
  }
  if (thread_.joinable()) thread_.join();
}

Writer::Status Writer::status() const {
  const absl::MutexLock lock(&mutex_);
  return status_;
}

void Writer::Run() {
  absl::Duration pause = kFirstPause;
  absl::MutexLock lock(&mutex_);
  while (true) {
    while (!closing_ && queue_.empty()) changed_.Wait(&mutex_);
    if (queue_.empty()) return;
    // Elements of a deque stay where they are while others are added behind them.
    const core::StateChanges& changes = queue_.front();
    mutex_.Unlock();
    const absl::Time begun = clock_.Now();
    const absl::Status saved = store_->Save(changes);
    const absl::Duration rest = std::min(kRest * (clock_.Now() - begun), kLongestRest);
    Report(saved);
    mutex_.Lock();
    if (saved.ok()) {
      pause = kFirstPause;
      changed_.SleepUnless(&mutex_, closing_, rest);
      queue_.pop_front();
    } else if (closing_) {
      return;
    } else {
      changed_.SleepUnless(&mutex_, closing_, pause);
      pause = std::min(2 * pause, kLongestPause);
    }
  }
}

void Writer::Report(const absl::Status& saved) {
  Status before;
  {
    const absl::MutexLock lock(&mutex_);
    before = status_;
    status_.error = std::string(saved.message());
    if (saved.ok()) status_.saved_at = absl::Now();
  }
  if (!saved.ok()) {
    throttle_.Log(LogLevel::kError, "state", clock_.Now(),
                  absl::StrCat("the running statistics cannot be stored in ", where_, ": ", saved.message(),
                               "; training goes on, and if the master ends, they are as they were when last stored"));
  } else if (!before.error.empty()) {
    Log(LogLevel::kInfo, absl::StrCat("the running statistics are stored in ", where_, " again"));
  }
}

}  // namespace syncbn::state
