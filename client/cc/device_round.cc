#include "client/cc/device_round.h"

#include <sched.h>

#include <utility>

#include "absl/time/clock.h"
#include "client/cc/errors.h"

namespace syncbn {

// In worker.cc.
absl::Status PendingStatus();

namespace {

// A reduction takes microseconds once the stream has reached it: this long the thread only looks at the flag.
constexpr absl::Duration kSpinning = absl::Microseconds(200);
// Then it lets others run between two looks; and if the stream has much to do before, it sleeps.
constexpr absl::Duration kYielding = absl::Milliseconds(2);
constexpr absl::Duration kSleep = absl::Microseconds(50);
constexpr absl::Duration kBetweenQueries = absl::Milliseconds(1);

absl::Status ClosedStatus() {
  return MakeStatus(absl::StatusCode::kCancelled, "this worker has been closed", {"CLOSED", "", {}});
}

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

void PauseAfter(absl::Duration waited) {
  if (waited < kSpinning) {
    for (int i = 0; i < 8; ++i) Pause();
  } else if (waited < kYielding) {
    sched_yield();
  } else {
    absl::SleepFor(kSleep);
  }
}

}  // namespace

std::shared_ptr<DeviceRound> DeviceRound::Start(Worker& worker, std::shared_ptr<SlotLease> lease, Begin begin) {
  auto round = std::make_shared<DeviceRound>();
  round->begin_ = std::move(begin);
  round->lease_ = std::move(lease);
  round->rounds_ = std::static_pointer_cast<DeviceRounds>(
      worker.Attach([&worker] { return std::make_shared<DeviceRounds>(&worker); }));
  round->rounds_->Add(round);
  return round;
}

absl::Status DeviceRound::Wait(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  if (absl::Status status = rounds_->WaitUntilBegun(*this, deadline); !status.ok()) return status;
  return round_->Wait(timeout == absl::InfiniteDuration() ? timeout : deadline - absl::Now());
}

void DeviceRounds::Add(std::shared_ptr<DeviceRound> round) {
  absl::MutexLock lock(&mutex_);
  if (worker_ == nullptr) {
    round->status_ = ClosedStatus();
    round->lease_ = nullptr;
    return;
  }
  waiting_.push_back(std::move(round));
}

absl::Status DeviceRounds::WaitUntilBegun(const DeviceRound& round, absl::Time deadline) {
  const uint64_t interrupts = interrupts_.load();
  const absl::Time begin = absl::Now();
  absl::Time next_query = begin + kBetweenQueries;
  for (absl::Time now = begin;; now = absl::Now()) {
    {
      absl::MutexLock lock(&mutex_);
      BeginReady();
      if (now >= next_query) {
        LookForErrors();
        next_query = now + kBetweenQueries;
      }
      if (round.round_.has_value()) return absl::OkStatus();
      if (!round.status_.ok()) return round.status_;
    }
    if (interrupts_.load() != interrupts) {
      return MakeStatus(absl::StatusCode::kCancelled, "the wait was interrupted", {"INTERRUPTED", "", {}});
    }
    if (now >= deadline) return PendingStatus();
    PauseAfter(now - begin);
  }
}

void DeviceRounds::BeginReady() {
  while (!waiting_.empty() && waiting_.front()->lease_->slot().Raised()) {
    const std::shared_ptr<DeviceRound> round = std::move(waiting_.front());
    waiting_.pop_front();
    const DeviceSlot& slot = round->lease_->slot();
    absl::StatusOr<Round> begun = round->begin_(*worker_, slot.local[0], slot.local[1]);
    if (begun.ok()) {
      round->round_ = *std::move(begun);
    } else {
      round->status_ = begun.status();
    }
    round->lease_ = nullptr;
  }
}

void DeviceRounds::LookForErrors() {
  if (waiting_.empty()) return;
  const SlotLease& lease = *waiting_.front()->lease_;
  const DeviceScope scope(lease.runtime(), lease.memory().device());
  if (!scope.status().ok()) return FailFirst(scope.status());
  const DeviceRuntime::Error state = lease.runtime()->StreamState(lease.memory().stream());
  if (state == DeviceRuntime::kNotReady || lease.slot().Raised()) return;
  if (state == DeviceRuntime::kSuccess) {
    return FailFirst(absl::InternalError("the CUDA stream has ended its work, and the statistics are not there"));
  }
  FailFirst(DeviceStatus(lease.runtime(), state, "statistics"));
}

void DeviceRounds::FailFirst(absl::Status why) {
  waiting_.front()->status_ = std::move(why);
  waiting_.front()->lease_ = nullptr;
  waiting_.pop_front();
}

void DeviceRounds::OnFlush() {
  absl::MutexLock lock(&mutex_);
  BeginReady();
}

void DeviceRounds::OnClose() {
  absl::MutexLock lock(&mutex_);
  worker_ = nullptr;
  while (!waiting_.empty()) FailFirst(ClosedStatus());
}

}  // namespace syncbn
