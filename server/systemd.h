// Notifications of a service to systemd. Do nothing where systemd has not started the process.

#ifndef SYNCBN_SERVER_SYSTEMD_H_
#define SYNCBN_SERVER_SYSTEMD_H_

#include <functional>

#include "absl/time/time.h"

namespace syncbn {

// Sends an assignment such as "READY=1" (sd_notify(3)).
void NotifySystemd(const char* state);

// Keeps systemd's watchdog from restarting the service, for as long as the service is alive (WatchdogSec= of its unit).
class SystemdWatchdog {
 public:
  SystemdWatchdog();

  // Returns: how often Poke is to be called; the infinite duration without a watchdog.
  absl::Duration interval() const { return interval_; }
  // Tells systemd that the service works, if there is a watchdog and `alive` returns true.
  void Poke(const std::function<bool()>& alive) const;

 private:
  absl::Duration interval_ = absl::InfiniteDuration();
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_SYSTEMD_H_
