// A round whose contribution a GPU computes: it begins once the GPU has raised the flag of its slot.

#ifndef SYNCBN_CLIENT_CC_DEVICE_ROUND_H_
#define SYNCBN_CLIENT_CC_DEVICE_ROUND_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cc/device_memory.h"
#include "client/cc/worker.h"

namespace syncbn {

class DeviceRounds;

// The waiting thread watches the flag in host memory, without a call to CUDA but for one each millisecond that looks
// for errors. It watches for all rounds of its worker that were started before its own as well, and begins them in the
// order of their starts: sequences are counted as on a CPU, and no worker waits for one round while it holds another
// back.
class DeviceRound {
 public:
  // Begins the round with the slot's two local vectors.
  using Begin = std::function<absl::StatusOr<Round>(Worker& worker, const double* first, const double* second)>;

  // The reduction into the lease's slot has been enqueued.
  static std::shared_ptr<DeviceRound> Start(Worker& worker, std::shared_ptr<SlotLease> lease, Begin begin);

  // As Round::Wait. INTERNAL if CUDA reports an error, or the stream ran out of work and the flag is not up.
  absl::Status Wait(absl::Duration timeout);

  // After a successful Wait.
  const RoundResult& result() const { return round_->result(); }
  uint64_t sequence() const { return round_->sequence(); }

 private:
  friend class DeviceRounds;

  std::shared_ptr<DeviceRounds> rounds_;
  Begin begin_;
  // The rest is guarded by the mutex of rounds_ until the round has begun or failed, and then constant.
  std::shared_ptr<SlotLease> lease_;  // Until then.
  std::optional<Round> round_;
  absl::Status status_;  // Why the round could not begin.
};

// A worker's rounds that have not begun. Thread-safe.
class DeviceRounds : public WorkerAttachment {
 public:
  explicit DeviceRounds(Worker* worker) : worker_(worker) {}

  void Add(std::shared_ptr<DeviceRound> round) ABSL_LOCKS_EXCLUDED(mutex_);
  // Waits until `round` has begun, which is OK, or failed. A pending status if it has not by `deadline`.
  absl::Status WaitUntilBegun(const DeviceRound& round, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);

  void OnFlush() override ABSL_LOCKS_EXCLUDED(mutex_);
  void OnInterrupt() override { interrupts_.fetch_add(1); }
  void OnClose() override ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  // Begins what is ready, in order.
  void BeginReady() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Fails the first round if the GPU will not complete it.
  void LookForErrors() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FailFirst(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::atomic<uint64_t> interrupts_{0};
  absl::Mutex mutex_;
  Worker* worker_ ABSL_GUARDED_BY(mutex_);  // Null once it is closed.
  std::deque<std::shared_ptr<DeviceRound>> waiting_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_ROUND_H_
