#include "server/rpc/queue_threads.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "plumbing/check.h"
#include "plumbing/start_thread.h"

namespace syncbn::rpc {

QueueThreads::QueueThreads(const Clock* clock, Handle handle, std::function<void()> on_leave, absl::Duration linger)
    : clock_(*clock), handle_(std::move(handle)), on_leave_(std::move(on_leave)), linger_(linger) {}

absl::Status QueueThreads::Start(grpc::CompletionQueue* queue) {
  queue_ = queue;
  return StartThread(
      "serving workers", [this] { Drive(&seats_.front(), /*added=*/false); }, &seats_.front().thread);
}

void QueueThreads::Relieve(bool add) {
  const absl::MutexLock lock(&mutex_);
  if (joining_) return;
  leave_at_ = clock_.Now() + linger_;
  if (!add) return;
  for (size_t i = 1; i < seats_.size(); ++i) {
    Seat* const seat = &seats_[i];
    if (seat->there) continue;
    if (seat->thread.joinable()) seat->thread.join();
    seat->there = true;
    const absl::Status started = StartThread(
        "relieving the thread that serves workers", [this, seat] { Drive(seat, /*added=*/true); }, &seat->thread);
    // Without another thread, all wait for as long as gRPC likes.
    if (!started.ok()) seat->there = false;
    return;
  }
}

std::array<LoopTurn, LoopProgress::kMostThreads> QueueThreads::turns() const {
  std::array<LoopTurn, LoopProgress::kMostThreads> turns;
  for (size_t i = 0; i < seats_.size(); ++i) {
    const Seat& seat = seats_[i];
    LoopTurn& turn = turns[i];
    turn.number = seat.turns.load(std::memory_order_relaxed);
    const clockid_t clock = seat.cpu_clock;
    timespec cpu = {};
    // A thread that ends meanwhile has no clock.
    turn.there = seat.there && clock != 0 && clock_gettime(clock, &cpu) == 0;
    turn.in_grpc = turn.there && turn.number % 2 == 0;
    turn.cpu = absl::DurationFromTimespec(cpu);
  }
  return turns;
}

void QueueThreads::Join() {
  {
    const absl::MutexLock lock(&mutex_);
    joining_ = true;
  }
  if (seats_.front().thread.joinable()) {
    seats_.front().thread.join();
  } else if (queue_ != nullptr) {
    Drive(&seats_.front(), /*added=*/false);
  }
  for (Seat& seat : seats_) {
    if (seat.thread.joinable()) seat.thread.join();
  }
}

absl::Time QueueThreads::leave_at() const {
  const absl::MutexLock lock(&mutex_);
  return leave_at_;
}

void QueueThreads::Drive(Seat* seat, bool added) {
  clockid_t cpu_clock = 0;
  SYNCBN_CHECK(pthread_getcpuclockid(pthread_self(), &cpu_clock) == 0, "a thread has no clock");
  seat->cpu_clock = cpu_clock;
  seat->there = true;
  void* tag = nullptr;
  bool ok = false;
  absl::Time deadline = absl::InfinitePast();
  while (true) {
    if (added) {
      const absl::Time end = leave_at();
      if (clock_.Now() >= end) {
        on_leave_();
        break;
      }
      deadline = std::min(deadline, end);
    }
    const auto event = queue_->AsyncNext(&tag, &ok, clock_.QueueDeadline(deadline));
    if (event == grpc::CompletionQueue::SHUTDOWN) break;
    seat->turns.fetch_add(1, std::memory_order_relaxed);
    deadline = handle_(event == grpc::CompletionQueue::GOT_EVENT ? static_cast<Tag*>(tag) : nullptr, ok);
    seat->turns.fetch_add(1, std::memory_order_relaxed);
  }
  seat->cpu_clock = 0;
  seat->there = false;
}

}  // namespace syncbn::rpc
