#include "client/cc/device_round.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cc/clock.h"
#include "client/cc/errors.h"
#include "plumbing/check.h"
#include "plumbing/spin.h"
#include "plumbing/start_thread.h"

namespace syncbn {

namespace {

// A reduction takes microseconds once the stream has reached it: this long the thread only looks at the flag.
constexpr absl::Duration kSpinning = absl::Microseconds(200);
// Then it lets others run between two looks; and if the stream has much to do before, it sleeps.
constexpr absl::Duration kYielding = absl::Milliseconds(2);
constexpr absl::Duration kSleep = absl::Microseconds(50);
constexpr absl::Duration kBetweenQueries = absl::Milliseconds(1);

// Makes the calling thread's sleeps last as long as they are meant to, for as long as this lives. A thread otherwise
// wakes up to 50 microseconds late, twice what a round's watcher means to sleep, so that the system can wake several.
class PreciseSleeps {
 public:
  PreciseSleeps() { prctl(PR_SET_TIMERSLACK, 1UL); }
  ~PreciseSleeps() {
    if (before_ > 0) prctl(PR_SET_TIMERSLACK, static_cast<size_t>(before_));
  }
  PreciseSleeps(const PreciseSleeps&) = delete;
  PreciseSleeps& operator=(const PreciseSleeps&) = delete;

 private:
  const int before_ = prctl(PR_GET_TIMERSLACK);
};

void PauseAfter(absl::Duration waited) {
  if (waited < kSpinning) {
    for (int i = 0; i < 8; ++i) SpinSystem::Relax();
  } else if (waited < kYielding) {
    sched_yield();
  } else {
    absl::SleepFor(kSleep);
  }
}

// Closes the rounds that have a thread when the process exits. Streams are released even if the program has not closed
// its workers: CUDA's own end may wait for them.
class OpenRoundsAtExit {
 public:
  // A leak: the end of the process uses it.
  static OpenRoundsAtExit& Get() {
    static OpenRoundsAtExit* const open = new OpenRoundsAtExit;
    return *open;
  }

  void Add(std::weak_ptr<DeviceRounds> rounds) {
    absl::MutexLock lock(&mutex_);
    if (pid_.exchange(getpid()) != getpid()) {  // The first of a process, be it a forked one.
      rounds_.clear();
      // A pass on a GPU has registered CUDA's own handler before, so this one runs first.
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

// Starts a thread that takes no signals, which are for the program's own threads. It is not joinable if none can be
// had.
std::thread StartWithoutSignals(std::function<void()> run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  StartThread("a round of the GPU's stream", std::move(run), &thread).IgnoreError();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace

// ---- One round ------------------------------------------------------------------------------------------------------

std::shared_ptr<DeviceRound> DeviceRound::Start(Worker& worker, Key key, std::shared_ptr<SlotLease> lease,
                                                Begin begin) {
  auto round = std::make_shared<DeviceRound>();
  round->key_ = std::move(key);
  round->begin_ = std::move(begin);
  round->lease_ = std::move(lease);
  round->rounds_ = DeviceRounds::Of(worker);
  round->rounds_->Add(round);
  return round;
}

absl::StatusOr<std::shared_ptr<DeviceRound>> DeviceRound::StartStreamOrdered(Worker& worker, Key key,
                                                                             std::shared_ptr<SlotLease> lease,
                                                                             Begin begin) {
  auto round = std::make_shared<DeviceRound>();
  round->key_ = std::move(key);
  round->begin_ = std::move(begin);
  round->stream_ordered_ = true;
  round->lease_ = std::move(lease);
  round->rounds_ = DeviceRounds::Of(worker);
  if (absl::Status status = round->rounds_->AddStreamOrdered(round); !status.ok()) return status;
  return round;
}

absl::Status DeviceRound::Wait(absl::Duration timeout) {
  const absl::Time deadline = Now() + timeout;
  if (stream_ordered()) {
    const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(rounds_->mutex_) -> absl::optional<absl::Status> {
      if (!ended_) return absl::nullopt;
      // The caller learns of this failure, or of one that follows from it.
      if (!status_.ok()) rounds_->ConsumeFailure().IgnoreError();
      return status_;
    };
    return rounds_->Await(DeviceRounds::Watch::kThread, ended, deadline);
  }
  const auto begun = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(rounds_->mutex_) -> absl::optional<absl::Status> {
    if (!round_.has_value() && status_.ok()) return absl::nullopt;
    return status_;
  };
  if (absl::Status status = rounds_->Await(DeviceRounds::Watch::kFlags, begun, deadline); !status.ok()) return status;
  rounds_->DropRetired();
  return round_->Wait(timeout == absl::InfiniteDuration() ? timeout : deadline - Now());
}

absl::Status DeviceRound::failure() const {
  absl::MutexLock lock(&rounds_->mutex_);
  return status_;
}

absl::StatusOr<uint64_t> DeviceRound::SequenceAtBegin() const {
  rounds_->mutex_.AssertHeld();
  if (!status_.ok()) return status_;
  if (!ended_) return absl::InternalError("a backward pass came before the end of its forward pass");
  return round_->sequence();
}

bool DeviceRound::BelongsTo(Worker& worker) const { return rounds_ == DeviceRounds::Of(worker); }

// ---- Starting and waiting -------------------------------------------------------------------------------------------

std::shared_ptr<DeviceRounds> DeviceRounds::Of(Worker& worker) {
  auto rounds = std::dynamic_pointer_cast<DeviceRounds>(
      WorkerInternal::Attach(worker, [&worker] { return std::make_shared<DeviceRounds>(&worker); }));
  SYNCBN_CHECK(rounds != nullptr, "a worker has an attachment of another kind");
  return rounds;
}

absl::Status DeviceRounds::Check() {
  DropRetired();
  absl::MutexLock lock(&mutex_);
  return ConsumeFailure();
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
    // A failure may have come since the caller's check: what the caller enqueues next would be ahead of it.
    if (!failure_.ok()) return ConsumeFailure();
    if (!has_thread_) {
      thread_ = StartWithoutSignals([this] { Run(); });
      if (!thread_.joinable())
        return absl::ResourceExhaustedError("no thread can be started for stream-ordered passes");
      has_thread_ = true;
      OpenRoundsAtExit::Get().Add(weak_from_this());
    }
    ++stream_ordered_;
    const bool held_back = IsHeldBack(*round);
    waiting_.push_back(std::move(round));
    changed_.SignalAll();
    if (held_back) return absl::OkStatus();  // The thread looks once it has released the stream.
  }
  WakeThread();
  return absl::OkStatus();
}

absl::Status DeviceRounds::Await(Watch watch, absl::FunctionRef<absl::optional<absl::Status>()> answer,
                                 absl::Time deadline) {
  const uint64_t interrupts = interrupts_.load();
  const absl::Time begin = Now();
  absl::Time next_query = begin + kBetweenQueries;
  std::optional<PreciseSleeps> precise;  // Of a caller's thread, once it sleeps.
  for (absl::Time now = begin;; now = Now()) {
    if (now >= next_query) {
      LookForErrors();
      next_query = now + kBetweenQueries;
    }
    {
      absl::MutexLock lock(&mutex_);
      if (watch == Watch::kFlags) BeginReady();
      absl::optional<absl::Status> status = answer();
      if (!status.has_value() && watch == Watch::kThread && now < deadline) {
        changed_.WaitFor(&mutex_, std::min(deadline - now, kBetweenQueries));
        status = answer();
      }
      if (status.has_value()) return *std::move(status);
    }
    // An interrupt ends stream-ordered rounds by itself.
    if (watch == Watch::kFlags && interrupts_.load() != interrupts) return InterruptedError();
    if (now >= deadline) return PendingStatus();
    if (watch != Watch::kFlags) continue;
    if (now - begin >= kYielding && !precise.has_value()) precise.emplace();
    PauseAfter(now - begin);
  }
}

absl::Status DeviceRounds::OnSettle(absl::Time deadline) {
  DropRetired();
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) -> absl::optional<absl::Status> {
    if (failure_.ok() && stream_ordered_ > 0) return absl::nullopt;
    return ConsumeFailure();
  };
  return Await(Watch::kThread, settled, deadline);
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
  held_back.reserve(in_flight_.size());
  for (const std::shared_ptr<DeviceRound>& round : in_flight_) held_back.push_back(&round->lease_->memory());
  for (size_t i = 0; i < waiting_.size();) {
    if (!IsReady(i, &held_back)) {
      ++i;
      continue;
    }
    any = true;
    const std::shared_ptr<DeviceRound> round = std::move(waiting_[i]);
    waiting_.erase(waiting_.begin() + static_cast<ptrdiff_t>(i));
    if (!round->stream_ordered()) {
      BeginHostDriven(*round);
    } else if (BeginStreamOrdered(round)) {
      held_back.push_back(&round->lease_->memory());
    } else {
      break;
    }
  }
  return any;
}

bool DeviceRounds::IsReady(size_t index, std::vector<const StreamMemory*>* held_back) {
  const DeviceRound& round = *waiting_[index];
  const StreamMemory* const memory = &round.lease_->memory();
  if (std::find(held_back->begin(), held_back->end(), memory) != held_back->end()) return false;
  const auto of_key = [&round](const auto& other) { return other->key_ == round.key_; };
  const auto here = waiting_.begin() + static_cast<ptrdiff_t>(index);
  if (round.lease_->slot().Raised() && std::none_of(waiting_.begin(), here, of_key)) return true;
  held_back->push_back(memory);
  return false;
}

void DeviceRounds::BeginHostDriven(DeviceRound& round) {
  const DeviceSlot& slot = round.lease_->slot();
  absl::StatusOr<Round> begun = round.begin_(*worker_, slot.local[0], slot.local[1]);
  round.status_ = begun.status();
  if (begun.ok()) round.round_ = *std::move(begun);
  retired_.push_back(std::move(round.lease_));
}

bool DeviceRounds::BeginStreamOrdered(const std::shared_ptr<DeviceRound>& round) {
  const DeviceSlot& slot = round->lease_->slot();
  absl::StatusOr<Round> begun = round->begin_(*worker_, slot.local[0], slot.local[1]);
  if (begun.ok()) {
    round->round_ = *std::move(begun);
    in_flight_.push_back(round);
    return true;
  }
  End(*round, begun.status());
  FailStreamOrdered(begun.status(), false);
  return false;
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
  // Ask CUDA without the lock, which the background thread needs to release streams.
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
  // Recorded before the release, so that a caller who has waited for the stream and then asks learns of it.
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

absl::Status DeviceRounds::ConsumeFailure() { return std::exchange(failure_, absl::OkStatus()); }

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
      slot.Deliver(round->round_->result().first, round->round_->result().second);
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
  const PreciseSleeps precise;
  absl::Time since = Now();  // The time at which something happened last.
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
