#include "server/rpc/connection_watch.h"

#include <time.h>

#include <utility>

#include "plumbing/check.h"
#include "plumbing/start_thread.h"

namespace syncbn::rpc {
namespace {

// Returns the CPU time of this thread.
absl::Duration CpuTime() {
  timespec cpu = {};
  SYNCBN_CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu) == 0, "a thread has no clock");
  return absl::DurationFromTimespec(cpu);
}

}  // namespace

ConnectionWatch::ConnectionWatch(Connections* connections, std::function<LoopProgress()> progress,
                                 std::function<void(bool add)> relieve, std::function<Handover()> handover)
    : connections_(connections),
      progress_(std::move(progress)),
      relief_watch_(std::move(relieve)),
      flood_watch_(connections),
      handover_watch_(connections, std::move(handover)) {}

absl::Status ConnectionWatch::Start() {
  return StartThread(
      "watching connections", [this] { Run(); }, &thread_);
}

void ConnectionWatch::Stop() {
  if (!thread_.joinable()) return;
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void ConnectionWatch::Wake() {
  const absl::MutexLock lock(&mutex_);
  if (!std::exchange(woken_, true)) changed_.SignalAll();
}

void ConnectionWatch::Run() {
  while (true) {
    {
      const absl::MutexLock lock(&mutex_);
      if (connections_->any() || connections_->flooded()) {
        changed_.SleepUnless(&mutex_, stopping_, kInterval);
      } else {
        while (!stopping_ && !woken_) changed_.Wait(&mutex_);
      }
      woken_ = false;
      if (stopping_) return;
    }
    Look();
  }
}

void ConnectionWatch::Look() {
  handover_watch_.Look();
  LoopProgress progress = progress_();
  progress.executors = executor_threads_.turns();
  relief_watch_.Look(progress);
  flood_watch_.Look(progress);
  const absl::Time now = clock_.Now();
  if (!check_schedule_.IsDue(now, resident_memory_.bytes())) return;
  const absl::Duration before = CpuTime();
  connections_->Check();
  check_schedule_.Checked(now, CpuTime() - before);
}

}  // namespace syncbn::rpc
