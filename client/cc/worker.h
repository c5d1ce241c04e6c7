// A member of a group: rounds over per-channel vectors.

#ifndef SYNCBN_CLIENT_CC_WORKER_H_
#define SYNCBN_CLIENT_CC_WORKER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/session/types.h"

namespace syncbn {

class RoundImpl;
class WorkerAttachment;
class WorkerImpl;
struct Payload;

// A round that has begun. Copies refer to the same round.
//
// *Thread safety*: one thread at a time.
class Round {
 public:
  Round() = default;
  explicit Round(std::shared_ptr<RoundImpl> impl) : impl_(std::move(impl)) {}

  uint64_t sequence() const;

  // Waits for the outcome, for at most `timeout`. The waiting thread drives the worker's connection. It sends the round
  // even if the time is up, for which it may take 100 ms longer if an earlier frame is still being written. Without a
  // connection, a later wait sends it.
  //
  // *Returns* OK if the round has completed: result() is there. A status that IsPending recognizes if the time is up
  // and the round goes on. Any other status is why the round failed, and every later Wait returns it again.
  //
  // *Errors*: those of RoundResult in statistics.proto; CANCELLED (INTERRUPTED) after an interrupt, which is not the
  // round's outcome: it may be waited for again; UNAVAILABLE (UNREACHABLE), naming the layer, if the master has
  // stopped, 2 to 5 seconds after the group's round_timeout. That ends the worker.
  //
  // *Deadlock detection*: a wait of 20 ms or more tells the master that this worker is blocked, if no other thread has
  // used the worker. (It tells so after 200 ms if no round of this worker has completed yet, so that threads may start
  // one after the other.) If all workers are blocked on different rounds, these fail at once.
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());

  // Returns the result, after a Wait that returned OK.
  const RoundResult& result() const;
  // Returns true if a Wait would return the outcome at once.
  bool HasOutcome() const;

 private:
  friend class Worker;
  friend struct WorkerInternal;
  std::shared_ptr<RoundImpl> impl_;
};

// Returns true for the status of a wait whose time is up while the round goes on.
bool IsPending(const absl::Status& status);

// A member of a group.
//
// *Thread safety*: any thread may call any method. Waiting threads drive the connection. A worker has no thread of its
// own, except for one that its first stream-ordered pass starts (batch_norm_pass.h).
class Worker {
 public:
  struct TlsOptions {
    std::string trusted_ca_file;
    std::string cert_file;
    std::string key_file;
    bool enabled() const { return !trusted_ca_file.empty() || !cert_file.empty() || !key_file.empty(); }
  };

  struct Options {
    // The master's address, or several separated by commas, which are tried in turn: HOST:PORT, unix:PATH, or another
    // name of gRPC's. Each attempt to connect looks the host up again.
    std::string target;
    // Returns a list that replaces `target`, for each attempt to connect; may be null. A failure counts as a failed
    // attempt. The thread that calls it is within a call of this worker and holds no lock. The function must not use
    // the worker, and a slow one delays interrupts.
    std::function<absl::StatusOr<std::string>()> find_target;
    // Returns whether Join is to end with CANCELLED (INTERRUPTED); may be null. Join asks it ten times a second, with a
    // lock held. It must return at once, and not use the worker.
    std::function<bool()> join_is_cancelled;
    std::string job;    // Empty: "default".
    std::string group;  // Empty: "default".
    uint32_t rank = 0;
    uint32_t world_size = 1;
    uint64_t generation = 0;
    // The same for all workers of the group, as is the policy. Absent: the master's defaults (10 min, 50 ms).
    std::optional<absl::Duration> round_timeout;
    std::optional<absl::Duration> rejoin_grace;
    // kWait: rounds wait for a worker that restarts, for rejoin_grace, whose default is then half of round_timeout.
    MissingPolicy missing_policy = MissingPolicy::kFail;
    uint32_t min_workers = 0;
    // Time to try to reach the master, at first and after a break. Also the time to wait for a rank that another
    // worker holds; a warning in the log names that worker.
    absl::Duration join_timeout = absl::Seconds(30);
    // The complete set of layers, which the master compares with the other workers' at the join. Empty: layers are
    // declared later, one by one.
    std::vector<LayerOptions> layers;
    std::string description;  // Empty: library, host and process id.
    // The job's secret, the same for all its workers: 1 to 1024 printable ASCII characters without spaces. Empty: none.
    // No error, log line or view shows it. Without TLS it crosses the network as it is.
    std::string token;
    TlsOptions tls;
  };

  static constexpr uint64_t kNextSequence = syncbn::kNextSequence;  // No sequence: the worker counts.
  static constexpr uint64_t kGreatestSequence = syncbn::kGreatestSequence;

  // Connects and joins. *Errors*: those of Synchronize in statistics.proto; UNAVAILABLE (UNREACHABLE) if the master did
  // not answer in time; UNAUTHENTICATED if TLS fails, or (TOKEN_MISMATCH) the token is not the job's; INVALID_ARGUMENT
  // for options that cannot be used; RESOURCE_EXHAUSTED without free file descriptors; FAILED_PRECONDITION (FORKED) in
  // a process that was forked, directly or further up, from one that has or had a worker or master.
  //
  // The first join prepares the process for gRPC (plumbing/grpc_process.h): it turns off Abseil's search for locks that
  // are taken in different orders (absl::SetMutexDeadlockDetectionMode), and, if the process has no second thread yet,
  // asks gRPC for larger read buffers through the environment variable GRPC_EXPERIMENTS, unless that is set. Each saves
  // CPU time in every round.
  static absl::StatusOr<std::unique_ptr<Worker>> Join(Options options);

  // Closes the worker, unless it is closed already.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Returns OK, or FAILED_PRECONDITION (FORKED) in a child that was forked from the process that joined. In such a
  // child every method that can fail returns that error, and the others do nothing. Destroying the worker there leaks
  // it.
  absl::Status CheckProcess() const;

  // Leaves the group: other workers stop waiting for this rank. First sends the rounds that were begun and waits for
  // stream-ordered passes. The master acknowledges the leave once the others have read of it, and with it all that they
  // were sent before, or after a second; this waits for that, 2 seconds at most. *Returns* the error of such a pass if
  // no call has returned it yet; the worker has left nevertheless. INVALID_ARGUMENT, with which it has not left, for a
  // reason that is not UTF-8. Afterwards every call fails with FAILED_PRECONDITION (LEFT). Idempotent.
  absl::Status Leave(absl::string_view reason);

  // Breaks the stream off without a leave: the other workers learn at once that this one is lost. Every wait and every
  // later call fails with CANCELLED (CLOSED), and no CUDA stream waits any longer. Idempotent.
  void Close();

  uint32_t rank() const;
  uint32_t world_size() const;
  MissingPolicy missing_policy() const;
  uint64_t incarnation() const;
  uint64_t run_id() const;
  // *Returns* true if frames go through memory that the master shares, at this moment, and not by gRPC.
  bool shares_memory() const;

  // Waits until every rank is present. *Returns* a pending status (IsPending) if `timeout` passes before.
  absl::Status WaitForMembers(absl::Duration timeout);

  // Sets the next automatic sequence of every layer, in every phase. *Errors*: INVALID_ARGUMENT beyond
  // kGreatestSequence.
  absl::Status ResumeAt(uint64_t sequence);
  // Sets the next automatic sequence of the layer in this phase to `key.sequence`. *Errors*: as of ResumeAt;
  // INVALID_ARGUMENT for a name of other than 1 to 255 bytes.
  absl::Status ResumeLayerAt(const RoundKey& key);
  // *Returns* the rounds that kNextSequence begins next, by layer: what ResumeLayerAt takes. The first has an empty
  // name and stands for all layers that are not listed: what ResumeAt takes.
  absl::StatusOr<std::vector<RoundKey>> NextRounds() const;
  // *Returns* where the group stood when this worker joined it: the completed round of the greatest sequence for each
  // layer and phase, by layer. Empty in a group that began then.
  absl::StatusOr<std::vector<RoundKey>> NewestRounds() const;

  // Ends every wait of a thread or CUDA stream with CANCELLED (INTERRUPTED), at once. The worker stays usable.
  void Interrupt();

  // Waits until every stream-ordered pass that was started has its outcome; does not wait for the streams. *Returns* OK
  // if all have completed; as soon as there is one, the first failure that no call has returned yet; a pending status
  // (IsPending) if `timeout` passes before. StartSum returns such a failure as well, without waiting.
  absl::Status Settle(absl::Duration timeout = absl::InfiniteDuration());

  // Makes the layer known to the master with the next frame, and again after every reconnect.
  //
  // A later declaration of the same name may differ (other channels, another eps). It holds for rounds that this worker
  // begins afterwards. Rounds that were begun before keep theirs, and a backward round has its forward round's. A round
  // under the new declaration waits until every worker has declared the same and contributed, or for the deadline.
  // Change a layer at the same sequence everywhere: contributions to one sequence under different declarations fail
  // that round for all, at once, with LAYER_SPEC_MISMATCH. Until a round of the layer has completed, a first
  // declaration that differs from the others' is reported to all with the same reason.
  //
  // *Errors*: INVALID_ARGUMENT for a name of other than 1 to 255 bytes, and for 0 channels.
  absl::Status DeclareLayer(const LayerOptions& layer);
  // Returns the newest declaration under this name, which stays as it is if the layer is declared anew. Null if there
  // is none.
  std::shared_ptr<const LayerOptions> FindLayer(absl::string_view name) const;

  // The Start methods begin a round and copy the vectors. The next wait or flush sends it, in one frame with all that
  // is ready then. `sequence`: kNextSequence counts 0, 1, 2, ... for each layer and phase.
  //
  // *Errors*: FAILED_PRECONDITION if the layer was not declared; INVALID_ARGUMENT if the vectors differ in length;
  // OUT_OF_RANGE if kGreatestSequence has been used and a sequence after it is asked for; ALREADY_EXISTS if a round
  // with this sequence is pending.
  //
  // After a deadlock, or a round that lacked a worker which waits elsewhere, a wait's error names the sequence at which
  // all workers go on (ErrorDetails::resume_at), and kNextSequence counts from there in every layer and phase. So give
  // a backward round the sequence of its forward round.
  absl::StatusOr<Round> StartForward(absl::string_view layer, uint64_t sequence, int64_t count,
                                     absl::Span<const double> mean, absl::Span<const double> m2, BackwardRole role);
  absl::StatusOr<Round> StartBackward(absl::string_view layer, uint64_t sequence, absl::Span<const double> sum_dy,
                                      absl::Span<const double> sum_dy_xmu);
  // Begins the round of a later backward pass through the same forward pass. The protocol has one backward round for
  // each forward round, so these sums travel as one vector named LAYER/retained (DerivedName), in the order of the
  // calls. The result is that of a backward round, bit for bit.
  absl::StatusOr<Round> StartBackwardAgain(absl::string_view layer, absl::Span<const double> sum_dy,
                                           absl::Span<const double> sum_dy_xmu);
  // Begins the sum of a vector over all workers, of any length but 0. A vector of more than 2^14 elements travels in
  // chunks, which are layers named NAME#0, NAME#1 and so on (PROTOCOL.md, section 4). Needs no declaration.
  absl::StatusOr<Round> StartSum(absl::string_view name, uint64_t sequence, absl::Span<const double> value);

  // Sends one frame of what is ready, without waiting for answers. The next wait or flush sends the rest. What it sends
  // cannot say yet that the worker is blocked (Round::Wait): that follows 20 ms into the wait, and a deadlock is found
  // as much later.
  absl::Status Flush();

 private:
  friend struct WorkerInternal;  // worker_internal.h

  // Null if there is none.
  std::shared_ptr<WorkerAttachment> attachment() const;

  explicit Worker(std::shared_ptr<WorkerImpl> impl);
  absl::StatusOr<Round> Start(RoundKey key, const Payload& payload);

  std::shared_ptr<WorkerImpl> impl_;
  mutable absl::Mutex attachment_mutex_;
  std::shared_ptr<WorkerAttachment> attachment_ ABSL_GUARDED_BY(attachment_mutex_);
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_WORKER_H_
