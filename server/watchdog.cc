#include "server/watchdog.h"

#include <utility>

#include "plumbing/start_thread.h"

namespace syncbn {

absl::StatusOr<std::unique_ptr<Watchdog>> Watchdog::Start(absl::Duration patience, std::function<bool()> probe,
                                                          std::function<void()> on_dead) {
  std::unique_ptr<Watchdog> watchdog(new Watchdog(patience, std::move(probe), std::move(on_dead)));
  absl::Status started = StartThread(
      "the watchdog", [dog = watchdog.get()] { dog->Run(); }, &watchdog->thread_);
  if (!started.ok()) return started;
  return watchdog;
}

Watchdog::Watchdog(absl::Duration patience, std::function<bool()> probe, std::function<void()> on_dead)
    : interval_(patience / kProbes), probe_(std::move(probe)), on_dead_(std::move(on_dead)) {}

Watchdog::~Watchdog() {
  if (!thread_.joinable()) return;
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void Watchdog::Run() {
  int unanswered = 0;
  while (Sleep()) {
    unanswered = probe_() ? 0 : unanswered + 1;
    if (unanswered < kProbes) continue;
    on_dead_();
    return;
  }
}

bool Watchdog::Sleep() {
  const absl::MutexLock lock(&mutex_);
  return !changed_.SleepUnless(&mutex_, stopping_, interval_);
}

}  // namespace syncbn
