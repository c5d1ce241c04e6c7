#include "client/cc/device_round.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cc/clock.h"
#include "client/cc/errors.h"

namespace syncbn {

namespace {

// A reduction takes microseconds once the stream has reached it: this long the thread only looks at the flag.
constexpr absl::Duration kSpinning = absl::Microseconds(200);
// Then it lets others run between two looks; and if the stream has much to do before, it sleeps.
constexpr absl::Duration kYielding = absl::Milliseconds(2);
constexpr absl::Duration kSleep = absl::Microseconds(50);
constexpr absl::Duration kBetweenQueries = absl::Milliseconds(1);

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

// The rounds that have a thread. A process that exits without closing its workers releases their streams all the same:
// CUDA's own end may wait for them.
class Threads {
 public:
  // Never destroyed: the end of the process uses it.
  static Threads& Get() {
    static Threads* const threads = new Threads;
    return *threads;
  }

  void Add(std::weak_ptr<DeviceRounds> rounds) {
    absl::MutexLock lock(&mutex_);
    if (pid_.exchange(getpid()) != getpid()) {  // The first of a process, a forked one or not.
      rounds_.clear();
      // After CUDA's own, hence before it in the order of the end: there has been a pass on a GPU.
      std::atexit([] { Get().CloseAll(); });
    }
    rounds_.erase(std::remove_if(rounds_.begin(), rounds_.end(), [](const auto& other) { return other.expired(); }),
                  rounds_.end());
    rounds_.push_back(std::move(rounds));
  }

 private:
  void CloseAll() {
    if (pid_ != getpid()) return;  // The threads are not in this process, and the lock may never open.
    std::vector<std::weak_ptr<DeviceRounds>> rounds;
    {
      absl::MutexLock lock(&mutex_);
      rounds.swap(rounds_);
    }
    for (const std::weak_ptr<DeviceRounds>& weak : rounds) {
      if (const auto open = weak.lock()) {
        open->OnClose();
        open->OnClosed();
      }
    }
  }

  absl::Mutex mutex_;
  std::atomic<pid_t> pid_{0};
  std::vector<std::weak_ptr<DeviceRounds>> rounds_ ABSL_GUARDED_BY(mutex_);
};

// A thread that takes no signals: they are for the program's own.
std::thread StartThread(std::function<void()> run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  try {
    thread = std::thread(std::move(run));
  } catch (const std::system_error&) {  // The caller finds it not joinable.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace

// ---- One round ------------------------------------------------------------------------------------------------------

std::shared_ptr<DeviceRound> DeviceRound::Start(Worker& worker, std::string layer, std::shared_ptr<SlotLease> lease,
                                                Begin begin) {
  auto round = std::make_shared<DeviceRound>();
  round->layer_ = std::move(layer);
  round->begin_ = std::move(begin);
  round->lease_ = std::move(lease);
  round->rounds_ = DeviceRounds::Of(worker);
  round->rounds_->Add(round);
  return round;
}

absl::StatusOr<std::shared_ptr<DeviceRound>> DeviceRound::StartStreamOrdered(Worker& worker, std::string layer,
                                                                             std::shared_ptr<SlotLease> lease,
                                                                             Begin begin, Deliver deliver) {
  auto round = std::make_shared<DeviceRound>();
  round->layer_ = std::move(layer);
  round->begin_ = std::move(begin);
  round->deliver_ = std::move(deliver);
  round->lease_ = std::move(lease);
  round->rounds_ = DeviceRounds::Of(worker);
  if (absl::Status status = round->rounds_->AddStreamOrdered(round); !status.ok()) return status;
  return round;
}

absl::Status DeviceRound::Wait(absl::Duration timeout) {
  const absl::Time deadline = Now() + timeout;
  if (stream_ordered()) return rounds_->WaitUntilEnded(*this, deadline);
  if (absl::Status status = rounds_->WaitUntilBegun(*this, deadline); !status.ok()) return status;
  return round_->Wait(timeout == absl::InfiniteDuration() ? timeout : deadline - Now());
}

absl::Status DeviceRound::failure() const {
  absl::MutexLock lock(&rounds_->mutex_);
  return status_;
}

absl::StatusOr<uint64_t> DeviceRound::SequenceAtBegin() const {
  if (!status_.ok()) return status_;
  if (!ended_) return absl::InternalError("a backward pass came before the end of its forward pass");
  return round_->sequence();
}

bool DeviceRound::BelongsTo(Worker& worker) const { return rounds_ == DeviceRounds::Of(worker); }

// ---- Starting and waiting -------------------------------------------------------------------------------------------

std::shared_ptr<DeviceRounds> DeviceRounds::Of(Worker& worker) {
  return std::static_pointer_cast<DeviceRounds>(
      WorkerInternal::Attach(worker, [&worker] { return std::make_shared<DeviceRounds>(&worker); }));
}

absl::Status DeviceRounds::Check() {
  DropRetired();
  absl::MutexLock lock(&mutex_);
  return TakeFailure();
}

void DeviceRounds::Add(std::shared_ptr<DeviceRound> round) {
  absl::MutexLock lock(&mutex_);
  if (worker_ == nullptr) {
    round->status_ = ClosedError();
    retired_.push_back(std::move(round->lease_));
    return;
  }
  waiting_.push_back(std::move(round));
}

absl::Status DeviceRounds::AddStreamOrdered(std::shared_ptr<DeviceRound> round) {
  {
    absl::MutexLock lock(&mutex_);
    if (worker_ == nullptr) return ClosedError();
    // One that came between the caller's check and now: what is to be enqueued would be ahead of a failure.
    if (!failure_.ok()) return TakeFailure();
    if (!has_thread_) {
      thread_ = StartThread([this] { Run(); });
      if (!thread_.joinable())
        return absl::ResourceExhaustedError("no thread can be started for stream-ordered passes");
      has_thread_ = true;
      Threads::Get().Add(weak_from_this());
    }
    ++stream_ordered_;
    const bool held_back = IsHeldBack(*round);
    waiting_.push_back(std::move(round));
    changed_.SignalAll();
    if (held_back) return absl::OkStatus();  // The thread looks when it has released the stream.
  }
  WakeThread();
  return absl::OkStatus();
}

absl::Status DeviceRounds::WaitUntilBegun(const DeviceRound& round, absl::Time deadline) {
  const uint64_t interrupts = interrupts_.load();
  const absl::Time begin = Now();
  absl::Time next_query = begin + kBetweenQueries;
  for (absl::Time now = begin;; now = Now()) {
    if (now >= next_query) {
      LookForErrors();
      next_query = now + kBetweenQueries;
    }
    bool begun = false;
    {
      absl::MutexLock lock(&mutex_);
      BeginReady();
      begun = round.round_.has_value();
      if (!begun && !round.status_.ok()) return round.status_;
    }
    if (begun) {
      DropRetired();
      return absl::OkStatus();
    }
    if (interrupts_.load() != interrupts) return InterruptedError();
    if (now >= deadline) return PendingStatus();
    PauseAfter(now - begin);
  }
}

absl::Status DeviceRounds::WaitUntilEnded(const DeviceRound& round, absl::Time deadline) {
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      const absl::Time now = Now();
      if (!round.ended_ && now < deadline) {
        changed_.WaitWithTimeout(&mutex_, std::min(deadline - now, kBetweenQueries));
      }
      if (round.ended_) {
        if (!round.status_.ok()) TakeFailure().IgnoreError();  // The caller learns of it, or of what followed from it.
        return round.status_;
      }
      if (now >= deadline) return PendingStatus();
    }
    LookForErrors();
  }
}

absl::Status DeviceRounds::OnSettle(absl::Time deadline) {
  DropRetired();
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      const absl::Time now = Now();
      if (failure_.ok() && stream_ordered_ > 0 && now < deadline) {
        changed_.WaitWithTimeout(&mutex_, std::min(deadline - now, kBetweenQueries));
      }
      if (!failure_.ok() || stream_ordered_ == 0) return TakeFailure();
      if (now >= deadline) return PendingStatus();
    }
    LookForErrors();
  }
}

void DeviceRounds::OnFlush() {
  {
    absl::MutexLock lock(&mutex_);
    BeginReady();
  }
  DropRetired();
}

void DeviceRounds::OnInterrupt() {
  interrupts_.fetch_add(1);
  {
    absl::MutexLock lock(&mutex_);
    FailStreamOrdered(InterruptedError(), true);
  }
  WakeThread();
}

void DeviceRounds::OnClose() {
  absl::MutexLock lock(&mutex_);
  if (std::exchange(worker_, nullptr) == nullptr) return;  // The owner may be gone.
  FailStreamOrdered(ClosedError(), true);
  while (!waiting_.empty()) FailFirst(ClosedError());
  changed_.SignalAll();
  WakeThread();
}

void DeviceRounds::OnClosed() {
  {
    absl::MutexLock ending(&ending_);
    bool has_thread = false;
    {
      absl::MutexLock lock(&mutex_);
      has_thread = std::exchange(has_thread_, false);
    }
    if (has_thread) thread_.join();
  }
  DropRetired();
}

// ---- Both kinds -----------------------------------------------------------------------------------------------------

bool DeviceRounds::BeginReady() {
  bool any = false;
  std::vector<const StreamMemory*> held_back;  // Streams that cannot have raised a later flag, or not to the end.
  for (const std::shared_ptr<DeviceRound>& round : in_flight_) held_back.push_back(&round->lease_->memory());
  for (size_t i = 0; i < waiting_.size();) {
    const StreamMemory* const memory = &waiting_[i]->lease_->memory();
    const auto of_layer = [&](const auto& other) { return other->layer_ == waiting_[i]->layer_; };
    const auto here = waiting_.begin() + static_cast<ptrdiff_t>(i);
    if (std::find(held_back.begin(), held_back.end(), memory) != held_back.end()) {
      ++i;
      continue;
    }
    if (!waiting_[i]->lease_->slot().Raised() || std::any_of(waiting_.begin(), here, of_layer)) {
      held_back.push_back(memory);
      ++i;
      continue;
    }
    any = true;
    const std::shared_ptr<DeviceRound> round = std::move(waiting_[i]);
    waiting_.erase(here);
    const DeviceSlot& slot = round->lease_->slot();
    absl::StatusOr<Round> begun = round->begin_(*worker_, slot.local[0], slot.local[1]);
    if (begun.ok()) {
      round->round_ = *std::move(begun);
    } else if (!round->stream_ordered()) {
      round->status_ = begun.status();
    }
    if (!round->stream_ordered()) {
      retired_.push_back(std::move(round->lease_));
    } else if (begun.ok()) {
      in_flight_.push_back(round);
      held_back.push_back(memory);
    } else {
      End(*round, begun.status());
      FailStreamOrdered(begun.status(), false);
      break;
    }
  }
  return any;
}

void DeviceRounds::LookForErrors() {
  std::shared_ptr<DeviceRound> first;
  std::shared_ptr<SlotLease> lease;
  {
    absl::MutexLock lock(&mutex_);
    if (waiting_.empty()) return;
    first = waiting_.front();
    lease = first->lease_;
  }
  // CUDA is asked without the lock, which the thread needs to release streams.
  absl::Status status;
  {
    const DeviceScope scope(lease->runtime(), lease->memory().device());
    status = scope.status();
    if (status.ok()) {
      const DeviceRuntime::Error state = lease->runtime()->StreamState(lease->memory().stream());
      if (state == DeviceRuntime::kNotReady) return;
      status = state == DeviceRuntime::kSuccess
                   ? absl::InternalError("the CUDA stream has ended its work, and the statistics are not there")
                   : DeviceStatus(lease->runtime(), state, "statistics");
    }
  }
  absl::MutexLock lock(&mutex_);
  if (waiting_.empty() || waiting_.front() != first || lease->slot().Raised()) return;
  FailFirst(std::move(status));
}

void DeviceRounds::FailFirst(absl::Status why) {
  const std::shared_ptr<DeviceRound> round = std::move(waiting_.front());
  waiting_.pop_front();
  if (round->stream_ordered()) {
    End(*round, why);
    FailStreamOrdered(why, false);
    return;
  }
  round->status_ = std::move(why);
  retired_.push_back(std::move(round->lease_));
}

void DeviceRounds::DropRetired() {
  std::vector<std::shared_ptr<SlotLease>> retired;
  absl::MutexLock lock(&mutex_);
  retired.swap(retired_);
}

// ---- Stream-ordered -------------------------------------------------------------------------------------------------

void DeviceRounds::End(DeviceRound& round, absl::Status status) {
  // Before the release: whoever has waited for the stream, and then asks, learns of the failure.
  if (!status.ok() && failure_.ok()) failure_ = status;
  round.status_ = std::move(status);
  round.ended_ = true;
  round.lease_->slot().Release();
  retired_.push_back(std::move(round.lease_));
  --stream_ordered_;
  changed_.SignalAll();
}

void DeviceRounds::FailStreamOrdered(const absl::Status& why, bool in_flight_too) {
  std::deque<std::shared_ptr<DeviceRound>> others;
  for (std::shared_ptr<DeviceRound>& round : std::exchange(waiting_, {})) {
    if (round->stream_ordered()) {
      End(*round, why);
    } else {
      others.push_back(std::move(round));
    }
  }
  waiting_ = std::move(others);
  if (!in_flight_too) return;
  for (const std::shared_ptr<DeviceRound>& round : std::exchange(in_flight_, {})) End(*round, why);
}

absl::Status DeviceRounds::TakeFailure() { return std::exchange(failure_, absl::OkStatus()); }

bool DeviceRounds::IsHeldBack(const DeviceRound& round) const {
  const auto holds_back = [&round](const std::shared_ptr<DeviceRound>& other) {
    return &other->lease_->memory() == &round.lease_->memory();
  };
  return std::any_of(in_flight_.begin(), in_flight_.end(), holds_back);
}

void DeviceRounds::WakeThread() {
  changes_.fetch_add(1);
  WorkerInternal::Wake(*owner_);
}

bool DeviceRounds::EndInFlight() {
  bool any = false;
  for (size_t i = 0; i < in_flight_.size();) {
    const std::shared_ptr<DeviceRound> round = in_flight_[i];
    if (!round->round_->HasOutcome()) {
      ++i;
      continue;
    }
    any = true;
    in_flight_.erase(in_flight_.begin() + static_cast<ptrdiff_t>(i));
    absl::Status status = round->round_->Wait();
    const DeviceSlot& slot = round->lease_->slot();
    if (status.ok()) {
      round->deliver_(slot, round->round_->result());
      slot.words->count = round->round_->result().count;
      slot.words->epoch = slot.epoch;
      End(*round, absl::OkStatus());
    } else {
      End(*round, status);
      FailStreamOrdered(status, false);
    }
  }
  return any;
}

void DeviceRounds::Run() {
  absl::Time since = Now();  // When something last happened.
  while (true) {
    const uint64_t changes = changes_.load();
    std::vector<Round> rounds;
    bool watching = false;
    bool any = false;
    {
      absl::MutexLock lock(&mutex_);
      any = BeginReady();
      any = EndInFlight() || any;
      for (; stream_ordered_ == 0; any = true) {
        if (worker_ == nullptr) return;
        changed_.Wait(&mutex_);
      }
      for (const std::shared_ptr<DeviceRound>& round : in_flight_) rounds.push_back(*round->round_);
      watching =
          rounds.size() < stream_ordered_ &&
          std::any_of(waiting_.begin(), waiting_.end(),
                      [this](const auto& round) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !IsHeldBack(*round); });
    }
    const absl::Time now = Now();
    if (any) since = now;
    if (rounds.empty()) {
      PauseAfter(now - since);
      continue;
    }
    WorkerInternal::WaitForAny(
        *owner_, rounds, [&] { return changes_.load() != changes; },
        watching ? absl::ZeroDuration() : absl::InfiniteDuration());
    if (watching) PauseAfter(now - since);
  }
}

}  // namespace syncbn
