// A round whose contribution a GPU computes: it begins once the GPU has raised the flag of its slot.
//
// Host-driven: the caller waits for the round and then enqueues the kernels that need its result.
//
// Stream-ordered: those kernels are enqueued first, behind a wait of the stream for the slot's release, and the caller
// runs ahead. The worker's background thread completes the round, writes the result to the slot and releases the
// stream. It releases the stream after a failure as well; the kernels find the failure in the slot.
//
// A stream that waits is always released, because
//  - the background thread makes no call to CUDA, and takes no lock under which another thread makes one: cudaFree and
//    its like wait for streams, which may wait for this thread. Callers drop the leases that the thread is done with.
//  - a stream is made to wait for a round only after that round has started. So a reduction waits on the GPU only for
//    rounds that started before its own, and a round holds back only later rounds of its own layer.
//  - every round that has begun ends, by its deadline at the latest, and a close or an interrupt ends all at once.
//
// Lock order: DeviceRounds::ending_, then DeviceRounds::mutex_, then the worker's own lock. The worker calls `woken` of
// WaitForAny with its lock held, which therefore takes none.

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
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "client/cc/device_memory.h"
#include "client/cc/worker.h"
#include "client/cc/worker_internal.h"
#include "plumbing/monotonic_condition.h"

namespace syncbn {

class DeviceRounds;

// A waiting thread watches the flag in host memory, and asks CUDA for errors once a millisecond. It watches for all
// rounds of its worker, and begins those of one layer in the order of their starts: sequences are counted as on a CPU,
// and no worker waits for one round while it holds another back.
//
// *Thread safety*: one thread at a time, besides the worker's own.
class DeviceRound {
 public:
  // A layer's rounds of one phase, which begin in the order of their starts.
  struct Key {
    std::string layer;
    Phase phase = Phase::kForward;

    friend bool operator==(const Key& a, const Key& b) { return a.layer == b.layer && a.phase == b.phase; }
  };
  // Begins the round with the slot's two local vectors.
  using Begin = std::function<absl::StatusOr<Round>(Worker& worker, const double* first, const double* second)>;
  // Starts a host-driven round, whose reduction into the lease's slot has been enqueued.
  static std::shared_ptr<DeviceRound> Start(Worker& worker, Key key, std::shared_ptr<SlotLease> lease, Begin begin);
  // Starts a stream-ordered round, whose reduction has been enqueued, but nothing yet that waits for the slot's
  // release. *Errors*, with which the round has not started: those of DeviceRounds::Check; CANCELLED (CLOSED);
  // RESOURCE_EXHAUSTED if no thread can be started.
  static absl::StatusOr<std::shared_ptr<DeviceRound>> StartStreamOrdered(Worker& worker, Key key,
                                                                         std::shared_ptr<SlotLease> lease, Begin begin);

  // Waits as Round::Wait. *Errors*: INTERNAL if CUDA reports an error, or if the stream has ended its work and the flag
  // is not up.
  absl::Status Wait(absl::Duration timeout);

  // After a successful Wait.
  const RoundResult& result() const { return round_->result(); }
  uint64_t sequence() const { return round_->sequence(); }
  // Returns why a stream-ordered round failed, as far as is known.
  absl::Status failure() const;
  // Returns the sequence of a stream-ordered round, or why it failed. Only within the Begin of another round of the
  // same worker, whose reduction was enqueued behind this one's release.
  absl::StatusOr<uint64_t> SequenceAtBegin() const;
  bool BelongsTo(Worker& worker) const;

 private:
  friend class DeviceRounds;

  bool stream_ordered() const { return stream_ordered_; }

  std::shared_ptr<DeviceRounds> rounds_;
  Key key_;
  Begin begin_;
  bool stream_ordered_ = false;  // Else host-driven.
  // The rest is guarded by the mutex of rounds_ until the round has begun (stream-ordered: ended) or failed, and does
  // not change afterwards.
  std::shared_ptr<SlotLease> lease_;  // Null afterwards.
  std::optional<Round> round_;
  absl::Status status_;  // Why the round failed; of host-driven ones, why it could not begin.
  bool ended_ = false;   // Stream-ordered.
};

// A worker's rounds that have not begun, and its stream-ordered rounds that have not ended.
//
// *Thread safety*: any thread may call any method.
class DeviceRounds : public WorkerAttachment, public std::enable_shared_from_this<DeviceRounds> {
 public:
  static std::shared_ptr<DeviceRounds> Of(Worker& worker);

  explicit DeviceRounds(Worker* worker) : owner_(worker), worker_(worker) {}
  ~DeviceRounds() override = default;
  DeviceRounds(const DeviceRounds&) = delete;
  DeviceRounds& operator=(const DeviceRounds&) = delete;

  // Returns OK, or the first failure of a stream-ordered round that no call has returned yet. Such a failure fails
  // every stream-ordered round that has not begun as well: its caller could not know that it computes with NaN.
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
  // The ways in which a caller waits: for flags, which it watches itself, or for the background thread.
  enum class Watch { kFlags, kThread };
  // Waits until `answer`, which is called with the lock held, has a status, and returns that; a pending status at
  // `deadline`. Looks for errors of CUDA meanwhile.
  absl::Status Await(Watch watch, absl::FunctionRef<absl::optional<absl::Status>()> answer, absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Runs on the background thread.
  void Run() ABSL_LOCKS_EXCLUDED(mutex_);
  // Ends the stream-ordered rounds that have an outcome. Returns true if there were any.
  bool EndInFlight() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Begins the rounds that are ready. Returns true if there were any.
  bool BeginReady() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Returns true if the waiting round at `index` is ready. Adds its stream to `held_back` if it is not: later rounds of
  // that stream cannot be ready either.
  bool IsReady(size_t index, std::vector<const StreamMemory*>* held_back) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void BeginHostDriven(DeviceRound& round) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Returns false if the round, and with it all that have not begun, has failed.
  bool BeginStreamOrdered(const std::shared_ptr<DeviceRound>& round) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Returns true if the GPU cannot come to this round's reduction before another round has ended.
  bool IsHeldBack(const DeviceRound& round) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Fails the first round if the GPU will not complete it.
  void LookForErrors() ABSL_LOCKS_EXCLUDED(mutex_);
  void FailFirst(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends a stream-ordered round that is no longer in a list.
  void End(DeviceRound& round, absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FailStreamOrdered(const absl::Status& why, bool in_flight_too) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status ConsumeFailure() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Called by callers, never by the background thread: returning a slot takes a lock under which memory is allocated
  // and freed.
  void DropRetired() ABSL_LOCKS_EXCLUDED(mutex_);
  // May be called with or without the lock held.
  void WakeThread();

  Worker* const owner_;
  std::atomic<uint64_t> interrupts_{0};
  std::atomic<uint64_t> changes_{0};  // Counts the changes that the background thread has to look at.

  mutable absl::Mutex mutex_;
  MonotonicCondition changed_;
  Worker* worker_ ABSL_GUARDED_BY(mutex_);  // Null once it is closed.
  std::deque<std::shared_ptr<DeviceRound>> waiting_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<DeviceRound>> in_flight_ ABSL_GUARDED_BY(mutex_);  // Stream-ordered.
  size_t stream_ordered_ ABSL_GUARDED_BY(mutex_) = 0;                            // In both lists.
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<SlotLease>> retired_ ABSL_GUARDED_BY(mutex_);
  bool has_thread_ ABSL_GUARDED_BY(mutex_) = false;

  absl::Mutex ending_ ABSL_ACQUIRED_BEFORE(mutex_);
  std::thread thread_;  // Written once, before has_thread_; joined with ending_ held.
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_ROUND_H_
