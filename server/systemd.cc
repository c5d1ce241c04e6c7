#include "server/systemd.h"

#include <systemd/sd-daemon.h>

#include <cstdint>

namespace syncbn {

void NotifySystemd(const char* state) { sd_notify(/*unset_environment=*/0, state); }

SystemdWatchdog::SystemdWatchdog() {
  uint64_t microseconds = 0;
  // systemd advises to tell it twice in the time after which it would act.
  if (sd_watchdog_enabled(0, &microseconds) > 0) interval_ = absl::Microseconds(microseconds) / 2;
}

void SystemdWatchdog::Poke(const std::function<bool()>& alive) const {
  if (interval_ != absl::InfiniteDuration() && alive()) NotifySystemd("WATCHDOG=1");
}

}  // namespace syncbn
