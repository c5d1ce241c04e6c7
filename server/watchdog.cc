#include "server/watchdog.h"

#include <utility>

namespace syncbn {

Watchdog::Watchdog(absl::Duration patience, std::function<bool()> probe, std::function<void()> on_dead)
    : interval_(patience / kProbes), probe_(std::move(probe)), on_dead_(std::move(on_dead)) {
  thread_ = std::thread([this] { Run(); });
}

Watchdog::~Watchdog() {
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
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
  return !mutex_.AwaitWithTimeout(absl::Condition(&stopping_), interval_);
}

}  // namespace syncbn
