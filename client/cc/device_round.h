// A round whose contribution a GPU computes: it begins once the GPU has raised the flag of its slot.
//
// A *host-driven* round is waited for by a thread of the caller's, which then enqueues what needs the result. Of a
// *stream-ordered* one this is enqueued beforehand, behind a wait for the slot's release, and the caller runs ahead: a
// thread of the worker's sees the round through, writes the result to the slot and releases the stream. It does so
// whatever becomes of the round; a stream goes on after one that failed, and tells from the slot that it did.
//
// Why a stream that waits is always released:
//  - The thread makes no call to CUDA, and takes no lock under which another thread makes one: cudaFree and its like
//    wait for streams, which may wait for this thread. Leases that it is done with are dropped by callers.
//  - A stream is made to wait for a round only after that round has started, so what a reduction waits for on the GPU
//    are rounds that started before its own; and a round holds back, of those that started after it, its own layer's
//    alone.
//  - Every round that has begun ends, by its deadline at the latest, and a close or an interrupt ends all at once.

#ifndef SYNCBN_CLIENT_CC_DEVICE_ROUND_H_
#define SYNCBN_CLIENT_CC_DEVICE_ROUND_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cc/device_memory.h"
#include "client/cc/worker.h"
#include "client/cc/worker_internal.h"

namespace syncbn {

class DeviceRounds;

// The waiting thread watches the flag in host memory, without a call to CUDA but for one each millisecond that looks
// for errors. It watches for all rounds of its worker, and begins those of one layer in the order of their starts:
// sequences are counted as on a CPU, and no worker waits for one round while it holds another back.
class DeviceRound {
 public:
  // Begins the round with the slot's two local vectors.
  using Begin = std::function<absl::StatusOr<Round>(Worker& worker, const double* first, const double* second)>;
  // Writes the result to the slot's merged vectors.
  using Deliver = void (*)(const DeviceSlot& slot, const RoundResult& result);

  // The reduction into the lease's slot has been enqueued.
  static std::shared_ptr<DeviceRound> Start(Worker& worker, std::string layer, std::shared_ptr<SlotLease> lease,
                                            Begin begin);
  // The same, stream-ordered; nothing that waits for the slot's release has been enqueued yet. Errors, with which the
  // round has not started: those of DeviceRounds::Check; CANCELLED (CLOSED); RESOURCE_EXHAUSTED without a thread.
  static absl::StatusOr<std::shared_ptr<DeviceRound>> StartStreamOrdered(Worker& worker, std::string layer,
                                                                         std::shared_ptr<SlotLease> lease, Begin begin,
                                                                         Deliver deliver);

  // As Round::Wait. INTERNAL if CUDA reports an error, or the stream ran out of work and the flag is not up.
  absl::Status Wait(absl::Duration timeout);

  // After a successful Wait.
  const RoundResult& result() const { return round_->result(); }
  uint64_t sequence() const { return round_->sequence(); }
  // Of a stream-ordered round: why it failed, as far as is known.
  absl::Status failure() const;
  // Of a stream-ordered round, within the Begin of another of the same worker whose reduction was enqueued behind this
  // one's release: its sequence, or why it failed.
  absl::StatusOr<uint64_t> SequenceAtBegin() const;
  bool BelongsTo(Worker& worker) const;

 private:
  friend class DeviceRounds;

  bool stream_ordered() const { return deliver_ != nullptr; }

  std::shared_ptr<DeviceRounds> rounds_;
  std::string layer_;
  Begin begin_;
  Deliver deliver_ = nullptr;  // Null: host-driven.
  // The rest is guarded by the mutex of rounds_ until the round has begun (stream-ordered: ended) or failed, and then
  // constant.
  std::shared_ptr<SlotLease> lease_;  // Until then.
  std::optional<Round> round_;
  absl::Status status_;  // Why the round failed; of host-driven ones, why it could not begin.
  bool ended_ = false;   // Stream-ordered.
};

// A worker's rounds that have not begun, and the stream-ordered ones that have not ended. Thread-safe.
class DeviceRounds : public WorkerAttachment, public std::enable_shared_from_this<DeviceRounds> {
 public:
  static std::shared_ptr<DeviceRounds> Of(Worker& worker);

  explicit DeviceRounds(Worker* worker) : owner_(worker), worker_(worker) {}
  ~DeviceRounds() override = default;
  DeviceRounds(const DeviceRounds&) = delete;
  DeviceRounds& operator=(const DeviceRounds&) = delete;

  // OK, or the first failure of a stream-ordered round that no call has returned yet. Such a failure fails every
  // stream-ordered round that has not begun as well: its caller could not know that it computes with NaN.
  absl::Status Check() ABSL_LOCKS_EXCLUDED(mutex_);

  void OnFlush() override ABSL_LOCKS_EXCLUDED(mutex_);
  void OnInterrupt() override ABSL_LOCKS_EXCLUDED(mutex_);
  void OnClose() override ABSL_LOCKS_EXCLUDED(mutex_);
  void OnClosed() override ABSL_LOCKS_EXCLUDED(mutex_, ending_);
  absl::Status OnSettle(absl::Time deadline) override ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  friend class DeviceRound;

  void Add(std::shared_ptr<DeviceRound> round) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status AddStreamOrdered(std::shared_ptr<DeviceRound> round) ABSL_LOCKS_EXCLUDED(mutex_);
  // Waits until `round`, host-driven, has begun, which is OK, or failed. A pending status if it has not by `deadline`.
  absl::Status WaitUntilBegun(const DeviceRound& round, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);
  // The same until it has ended, of a stream-ordered one.
  absl::Status WaitUntilEnded(const DeviceRound& round, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);

  // The thread's.
  void Run() ABSL_LOCKS_EXCLUDED(mutex_);
  // Ends the stream-ordered rounds that have an outcome; whether there were any.
  bool EndInFlight() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Begins what is ready; whether there was anything.
  bool BeginReady() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the GPU cannot come to this round's reduction before another round has ended.
  bool IsHeldBack(const DeviceRound& round) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Fails the first round if the GPU will not complete it.
  void LookForErrors() ABSL_LOCKS_EXCLUDED(mutex_);
  void FailFirst(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends a stream-ordered round, which is in no list any more.
  void End(DeviceRound& round, absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FailStreamOrdered(const absl::Status& why, bool in_flight_too) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status TakeFailure() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Callers do this, never the thread: a slot that returns takes a lock under which memory is allocated and freed.
  void DropRetired() ABSL_LOCKS_EXCLUDED(mutex_);
  // With or without the lock held.
  void WakeThread();

  Worker* const owner_;
  std::atomic<uint64_t> interrupts_{0};
  std::atomic<uint64_t> changes_{0};  // That the thread has to look at.

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  Worker* worker_ ABSL_GUARDED_BY(mutex_);  // Null once it is closed.
  std::deque<std::shared_ptr<DeviceRound>> waiting_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<DeviceRound>> in_flight_ ABSL_GUARDED_BY(mutex_);  // Stream-ordered.
  size_t stream_ordered_ ABSL_GUARDED_BY(mutex_) = 0;                            // In both lists.
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<SlotLease>> retired_ ABSL_GUARDED_BY(mutex_);
  bool has_thread_ ABSL_GUARDED_BY(mutex_) = false;

  absl::Mutex ending_;
  std::thread thread_;  // Written once, before has_thread_; joined with ending_ held.
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_ROUND_H_
