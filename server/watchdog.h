// Ends a process whose master does not answer any more.

#ifndef SYNCBN_SERVER_WATCHDOG_H_
#define SYNCBN_SERVER_WATCHDOG_H_

#include <functional>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/monotonic_condition.h"

namespace syncbn {

// Asks a master for a sign of life, on a thread of its own, again and again. A master can be stopped by what gRPC does
// below it, and then neither its workers nor what supervises it would learn of it: a process that has ended is
// restarted, and its workers go on with the next.
//
// Unanswered probes are counted, not the time: a process that was suspended for an hour has missed one.
//
// Thread safety: from one thread.
class Watchdog {
 public:
  // Begins to call `probe`, at most kProbes times in each `patience`: it returns whether the probe before was answered.
  // Calls `on_dead` once if kProbes in a row were not. Errors: RESOURCE_EXHAUSTED if the system grants no thread.
  static absl::StatusOr<std::unique_ptr<Watchdog>> Start(absl::Duration patience, std::function<bool()> probe,
                                                         std::function<void()> on_dead);
  // Stops it. The thread must not be within `on_dead`.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  static constexpr int kProbes = 6;

 private:
  Watchdog(absl::Duration patience, std::function<bool()> probe, std::function<void()> on_dead);

  void Run();
  // Returns whether the watchdog goes on.
  bool Sleep();

  const absl::Duration interval_;
  const std::function<bool()> probe_;
  const std::function<void()> on_dead_;
  absl::Mutex mutex_;
  MonotonicCondition changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_WATCHDOG_H_
