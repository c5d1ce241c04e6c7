// The operations on a worker that the rest of the client needs beyond worker.h. Not for programs.

#ifndef SYNCBN_CLIENT_CC_WORKER_INTERNAL_H_
#define SYNCBN_CLIENT_CC_WORKER_INTERNAL_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/transport.h"
#include "client/cc/worker.h"

namespace syncbn {

// Something that lives as long as a worker and takes part in its calls. Any thread may call any method.
class WorkerAttachment {
 public:
  virtual ~WorkerAttachment() = default;
  virtual void OnFlush() = 0;
  virtual void OnInterrupt() = 0;
  // The worker is closing: it must not be used from here on. May be called more than once.
  virtual void OnClose() = 0;
  // The connection has ended, and nothing waits for it any more: time to end threads. May be called more than once.
  virtual void OnClosed() = 0;
  // See Worker::Settle; `deadline` is a time of clock.h.
  virtual absl::Status OnSettle(absl::Time deadline) = 0;
};

struct WorkerInternal {
  // Joins over a transport of the caller's. The options' `tls` is not used.
  static absl::StatusOr<std::unique_ptr<Worker>> Join(Worker::Options options, std::unique_ptr<Transport> transport);

  // Returns the worker's one attachment, made by `make` at the first call. It is told of flushes, interrupts and the
  // close.
  static std::shared_ptr<WorkerAttachment> Attach(Worker& worker,
                                                  const std::function<std::shared_ptr<WorkerAttachment>()>& make);

  // For a thread of the attachment's: drives the connection, for at most `timeout` (zero: looks at what has arrived),
  // until one of `rounds` has its outcome, `woken` returns true, or an interrupt. The caller finds out which of them it
  // was. `woken` is called with the worker's lock held and must not call the worker; Wake must follow what makes it
  // true.
  static void WaitForAny(Worker& worker, absl::Span<const Round> rounds, const std::function<bool()>& woken,
                         absl::Duration timeout);
  static void Wake(Worker& worker);
};

// The status of a wait whose time was up, the round still going on; see IsPending.
absl::Status PendingStatus();

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_WORKER_INTERNAL_H_
