// The driver of a worker's session: its lock, its transport, and the threads that wait.

#ifndef SYNCBN_CLIENT_CC_WORKER_IMPL_H_
#define SYNCBN_CLIENT_CC_WORKER_IMPL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/buffer.h"
#include "client/cc/contribution.h"
#include "client/cc/frame_codec.h"
#include "client/cc/session/session.h"
#include "client/cc/transport.h"
#include "client/cc/worker.h"
#include "plumbing/forked.h"
#include "plumbing/monotonic_condition.h"
#include "plumbing/vector_pool.h"

namespace syncbn {

// A contribution and, once `done`, its round's outcome.
struct PendingRound : public EncodedContribution {
  using EncodedContribution::EncodedContribution;

  bool done = false;
  bool dropped = false;  // Nobody will ask for the result.
  absl::Status status;
  RoundResult result;
};
// A Round's contributions: one, or the chunks of a long vector.
using PendingRounds = absl::InlinedVector<std::shared_ptr<PendingRound>, 1>;

// Feeds the session with what happens, and does what it says. A waiting thread drives the transport, so that an answer
// wakes no thread but the one that wants it; where several wait, one drives and the others sleep until it has something
// for them.
//
// *Thread safety*: any thread may call any method.
class WorkerImpl {
 public:
  WorkerImpl(Worker::Options options, std::unique_ptr<Transport> transport);
  // Not to be called in a forked child; see Abandon.
  ~WorkerImpl() = default;
  // For std::shared_ptr: deletes, but leaks in a forked child, where the lock may be held for ever.
  static void Abandon(WorkerImpl* impl);

  // The calls of worker.h.
  absl::Status Join();
  void Close();
  absl::Status Leave(absl::string_view reason);
  absl::Status WaitForMembers(absl::Duration timeout);
  absl::Status ResumeAt(uint64_t sequence);
  absl::Status ResumeLayerAt(const RoundKey& key);
  absl::StatusOr<std::vector<RoundKey>> NextRounds() const;
  absl::StatusOr<std::vector<RoundKey>> NewestRounds() const;
  void Interrupt();
  absl::Status DeclareLayer(const LayerOptions& layer);
  std::shared_ptr<const LayerOptions> FindLayer(absl::string_view name) const;
  absl::Status Flush();

  // Begins a round; see session::Session::Begin.
  absl::StatusOr<PendingRounds> Begin(RoundKey key, const Payload& payload);
  absl::Status WaitFor(const PendingRounds& rounds, absl::Duration timeout);
  bool HasOutcome(const PendingRounds& rounds) const;
  // Frees the results, which nobody will ask for. The session keeps the contributions for longer.
  void Drop(const PendingRounds& rounds);
  // As in worker_internal.h.
  void WaitForAny(absl::Span<const PendingRounds* const> rounds, const std::function<bool()>& woken,
                  absl::Duration timeout);
  void Wake();

  const Worker::Options& options() const { return options_; }
  uint64_t incarnation() const { return incarnation_; }
  uint64_t run_id() const { return run_id_; }
  bool shares_memory() const;
  // In a child of the process that joined, nothing of the connection may be touched.
  bool forked() const { return open_.forked(); }
  // OK, or FAILED_PRECONDITION (FORKED).
  absl::Status CheckProcess() const;

 private:
  using State = session::Session::State;

  // The results of the longest layers that models have, twice.
  static constexpr size_t kMostSpareBytes = size_t{128} << 10;

  // ---- Effects
  void Apply(session::Effects&& effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::FindMaster& find) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // Gives the lock up meanwhile.
  void Apply(session::Connect& connect) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::Write& write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::CloseStream& close) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::Complete& complete) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::JoinedGroup& joined) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::Notice& notice) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Apply(session::Ended& ended) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Logs the notices, giving the lock up meanwhile.
  void LogNotices() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // ---- Waiting
  // Drives the transport, or sleeps while another thread does, until `done` or `deadline`, or an interrupt (CANCELLED).
  // Looks once at what has arrived even if the deadline has passed.
  absl::Status Await(absl::FunctionRef<bool()> done, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DriveOnce(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sleeps while another thread drives.
  void SleepOnce(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnEvent(const Transport::Event& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnFrame(absl::Span<const absl::string_view> bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sends what there is to send, then asks for what there is to read.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sends one frame of what is ready, once the write before it has ended: it has, or is about to, but nobody has looked
  // since. Gives up after kFlushTimeout.
  void SendReady() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes the thread that drives the transport, and those that sleep, look at what they wait for.
  void WakeAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static bool HasEnded(const PendingRounds& rounds);
  // Takes the memory of a result for those that come, as far as there is room for it.
  void KeepMemory(RoundResult* result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // ---- Calls
  // Returns OK, or why the worker cannot be used. Notes which thread calls.
  absl::Status Enter() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Tells the session whether a wait for this round, of this length, means that the worker does nothing else meanwhile.
  void NoteWait(const std::shared_ptr<PendingRound>& round, absl::Time now, absl::Duration timeout)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const OpenHere open_;  // Until the transport has been taken down.
  const Worker::Options options_;
  const std::string life_key_;

  mutable absl::Mutex mutex_;
  MonotonicCondition changed_;  // Something that a sleeping thread may wait for.
  session::Session session_ ABSL_GUARDED_BY(mutex_);
  const std::unique_ptr<Transport> transport_;            // Guarded by mutex_, but for Wait.
  std::vector<Buffer> outgoing_ ABSL_GUARDED_BY(mutex_);  // Empty but within a write.
  bool driving_ ABSL_GUARDED_BY(mutex_) = false;  // A thread is in Transport::Wait, or asks where the master is.
  absl::Time last_look_ ABSL_GUARDED_BY(mutex_);  // When a thread last drove the transport.
  uint64_t interrupts_ ABSL_GUARDED_BY(mutex_) = 0;
  VectorPool spare_ ABSL_GUARDED_BY(mutex_){kMostSpareBytes};
  std::vector<std::string> notices_ ABSL_GUARDED_BY(mutex_);  // To be logged without the lock.

  // Atomic, since a forked child may ask, where the lock may be held for ever.
  std::atomic<uint64_t> incarnation_{0};
  std::atomic<uint64_t> run_id_{0};

  std::optional<std::thread::id> user_ ABSL_GUARDED_BY(mutex_);  // The first thread that has used this worker.
  bool several_users_ ABSL_GUARDED_BY(mutex_) = false;
  bool alone_ ABSL_GUARDED_BY(mutex_) = false;  // One thread has used this worker, and brought a round to its end.
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_WORKER_IMPL_H_
