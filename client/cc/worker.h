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

// A round that has begun. Copies stand for the same round. One thread at a time.
class Round {
 public:
  Round() = default;
  explicit Round(std::shared_ptr<RoundImpl> impl) : impl_(std::move(impl)) {}

  uint64_t sequence() const;
  // Waits for the outcome, for at most `timeout`. OK: result() is there. A status that IsPending recognizes: ask
  // again. Any other status is the round's outcome, and stays; CANCELLED with reason INTERRUPTED excepted. A wait ends
  // even if the master has stopped: with UNAVAILABLE (UNREACHABLE), naming the layer, 2 to 5 seconds after the group's
  // round_timeout. That ends the worker.
  //
  // A thread that waits for 20 ms or more promises that this worker does nothing else until then, if no other thread
  // has used the worker: that is how the master finds deadlocks at once. (The promise takes 200 ms before a worker's
  // first round has completed, so that threads may start one after the other.)
  absl::Status Wait(absl::Duration timeout = absl::InfiniteDuration());
  // Of a round that was waited for successfully.
  const RoundResult& result() const;
  // Whether a Wait would return the outcome at once.
  bool HasOutcome() const;

 private:
  friend class Worker;
  friend struct WorkerInternal;
  std::shared_ptr<RoundImpl> impl_;
};

// Whether a Wait ended because its time was up, the round still going on.
bool IsPending(const absl::Status& status);

// Thread safety: any thread may call any method. Waiting threads drive the connection; a worker has no thread of its
// own, but for the one that its first stream-ordered pass starts (batch_norm_pass.h).
class Worker {
 public:
  struct TlsOptions {
    std::string trusted_ca_file;
    std::string cert_file;
    std::string key_file;
    bool enabled() const { return !trusted_ca_file.empty() || !cert_file.empty() || !key_file.empty(); }
  };

  struct Options {
    // One, or several separated by commas, which are tried in turn: HOST:PORT, unix:PATH, or another name of gRPC's. A
    // host's addresses are asked for at each attempt to connect.
    std::string target;
    // If not null, asked at each attempt to connect for what takes the place of `target`. A failure counts as a failed
    // attempt. Called by a thread that is within a call of this worker, with no lock held; the worker cannot be used
    // from within, and what takes long keeps its threads from hearing interrupts.
    std::function<absl::StatusOr<std::string>()> find_target;
    std::string job;    // Empty: "default".
    std::string group;  // Empty: "default".
    uint32_t rank = 0;
    uint32_t world_size = 1;
    uint64_t generation = 0;
    // The same for all workers of the group. Absent: the master's defaults (10 min, 50 ms).
    std::optional<absl::Duration> round_timeout;
    std::optional<absl::Duration> rejoin_grace;
    MissingPolicy missing_policy = MissingPolicy::kFail;
    uint32_t min_workers = 0;
    // How long to try to reach the master, at first and after a break. So long, too, is waited for a rank that another
    // worker holds, with a warning in the log that says which.
    absl::Duration join_timeout = absl::Seconds(30);
    // If not empty, the complete set of layers, compared with the other workers' at once.
    std::vector<LayerOptions> layers;
    std::string description;  // Empty: library, host and process id.
    TlsOptions tls;
  };

  static constexpr uint64_t kNextSequence = syncbn::kNextSequence;  // No sequence: the worker counts.
  static constexpr uint64_t kGreatestSequence = syncbn::kGreatestSequence;

  // Connects and joins. Errors: those of Synchronize in statistics.proto; UNAVAILABLE (UNREACHABLE) if the master did
  // not answer in time; UNAUTHENTICATED if TLS fails; INVALID_ARGUMENT for options that cannot be used;
  // RESOURCE_EXHAUSTED without free file descriptors; FAILED_PRECONDITION (FORKED) in a process
  // that was forked from one that has or had a worker or master, directly or further up.
  //
  // The first join of a process turns off Abseil's search for locks that are taken in different orders
  // (absl::SetMutexDeadlockDetectionMode), and, if the process has no second thread yet, asks gRPC for larger read
  // buffers through the environment variable GRPC_EXPERIMENTS, unless it is set. Each saves CPU time in every round.
  static absl::StatusOr<std::unique_ptr<Worker>> Join(Options options);

  // Closes, if that has not been done.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // OK, or FAILED_PRECONDITION (FORKED) in a child that was forked from the process that joined. There every method
  // that can fail does so; the others do nothing, and destroying the worker leaves what it was made of as it is.
  absl::Status CheckProcess() const;

  // Says goodbye: the worker is not waited for any more. Rounds that it has begun are sent before, and stream-ordered
  // passes are waited for; the error of one that no call has returned yet is returned, the worker having left all the
  // same. Afterwards every call fails with FAILED_PRECONDITION (LEFT). Idempotent.
  absl::Status Leave(absl::string_view reason);

  // Breaks the stream off without a leave: the others learn at once that this worker is lost. Afterwards every call,
  // and whatever is waited for, fails with CANCELLED (CLOSED); no CUDA stream waits any longer. Idempotent.
  void Close();

  uint32_t rank() const;
  uint32_t world_size() const;
  MissingPolicy missing_policy() const;
  uint64_t incarnation() const;
  uint64_t run_id() const;

  // Waits until every rank is present. A pending status (IsPending) if `timeout` passes before.
  absl::Status WaitForMembers(absl::Duration timeout);

  // Every layer's next automatic sequence, in every phase, becomes `sequence`. INVALID_ARGUMENT beyond
  // kGreatestSequence.
  absl::Status ResumeAt(uint64_t sequence);

  // Ends whatever any thread or CUDA stream waits for with CANCELLED (INTERRUPTED), now. The worker stays usable.
  void Interrupt();

  // Waits until every stream-ordered pass that was started has its outcome. Returns the first failure among them that
  // no call has returned yet, as soon as there is one; a pending status (IsPending) if `timeout` passes before; OK if
  // all completed. Does not wait for the streams. StartSum returns such a failure as well, without waiting.
  absl::Status Settle(absl::Duration timeout = absl::InfiniteDuration());

  // Makes the layer known to the master with the next frame, and again after every reconnect.
  //
  // Declaring it differently later (other channels, another eps) changes it for the rounds that this worker begins from
  // then on. Rounds that were begun before keep the declaration that they were begun under, and a backward round has
  // its forward round's. A round under the new declaration waits until every worker has declared the same and
  // contributed, or for the deadline. Contributions to one sequence under different declarations fail that round for
  // all, at once, with LAYER_SPEC_MISMATCH: change a layer at the same sequence everywhere. Before a round of the layer
  // has completed, a first declaration that differs from the others' is told to all with the same reason.
  absl::Status DeclareLayer(const LayerOptions& layer);
  // What was declared under this name.
  std::optional<LayerOptions> FindLayer(absl::string_view name) const;

  // Begin a round; the vectors are copied. Sent with the next wait or flush, in one frame with all that is ready then.
  // `sequence`: kNextSequence counts 0, 1, 2, ... for each layer and phase. Errors: FAILED_PRECONDITION if the layer
  // was not declared; INVALID_ARGUMENT if the vectors differ in length; OUT_OF_RANGE if kGreatestSequence has been used
  // and a sequence after it is asked for.
  absl::StatusOr<Round> StartForward(absl::string_view layer, uint64_t sequence, int64_t count,
                                     absl::Span<const double> mean, absl::Span<const double> m2, BackwardRole role);
  absl::StatusOr<Round> StartBackward(absl::string_view layer, uint64_t sequence, absl::Span<const double> sum_dy,
                                      absl::Span<const double> sum_dy_xmu);
  // The round of a later backward pass through the same forward pass. The protocol has one backward round for each
  // forward round, so these sums travel as one vector named LAYER/retained, in the order of the calls; the result is
  // that of a backward round, bit for bit.
  absl::StatusOr<Round> StartBackwardAgain(absl::string_view layer, absl::Span<const double> sum_dy,
                                           absl::Span<const double> sum_dy_xmu);
  // A vector of any length, summed over all workers. One that is longer than a frame should be goes in pieces, whose
  // names are NAME#0, NAME#1 and so on. Declares itself.
  absl::StatusOr<Round> StartSum(absl::string_view name, uint64_t sequence, absl::Span<const double> value);

  // Sends what is ready, without waiting for answers: one frame of it, if it is more than a frame should hold, the rest
  // with the next wait or flush.
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
