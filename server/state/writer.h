// Stores a master's state behind its back: on a thread of its own.

#ifndef SYNCBN_SERVER_STATE_WRITER_H_
#define SYNCBN_SERVER_STATE_WRITER_H_

#include <deque>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/clock.h"
#include "plumbing/monotonic_condition.h"
#include "server/core/state.h"
#include "server/log/throttle.h"
#include "server/state/store.h"

namespace syncbn::state {

// Nothing but this object's thread waits for the disk. Changes that cannot be stored are tried again until they can;
// meanwhile the writer is busy, and the newer changes stay with whoever has them. The log tells when this begins, goes
// on and ends.
//
// Thread safety: all methods may be called from any thread.
class Writer {
 public:
  struct Status {
    absl::Time saved_at = absl::InfinitePast();  // When changes were last stored.
    std::string error;                           // Why the newest changes are not stored; empty if all went well.
  };

  // `where` names the store in the log.
  // Errors: RESOURCE_EXHAUSTED if the system grants no thread.
  static absl::StatusOr<std::unique_ptr<Writer>> Start(std::unique_ptr<Store> store, std::string where);
  // As Close().
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  // Returns whether all that was handed over is stored.
  bool idle() const;
  // Hands changes over, which are stored in order. Does not wait. Where memory counts, only while idle.
  void Write(core::StateChanges changes);
  // Stores what was handed over, gives up what cannot be stored at the first failure, and ends the thread. Idempotent;
  // nothing may be written afterwards.
  void Close();

  Status status() const;

 private:
  Writer(std::unique_ptr<Store> store, std::string where) : store_(std::move(store)), where_(std::move(where)) {}

  void Run();
  // Reports the outcome of an attempt.
  void Report(const absl::Status& saved);

  const std::unique_ptr<Store> store_;  // Used by the thread alone.
  const std::string where_;
  Throttle throttle_;  // Likewise.
  const Clock clock_;
  mutable absl::Mutex mutex_;
  MonotonicCondition changed_;
  std::deque<core::StateChanges> queue_ ABSL_GUARDED_BY(mutex_);  // The first one is being stored.
  Status status_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace syncbn::state

#endif  // SYNCBN_SERVER_STATE_WRITER_H_
