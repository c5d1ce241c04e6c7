// How a worker works: its connection, its rounds, and the threads that wait for them.

#ifndef SYNCBN_CLIENT_CC_WORKER_IMPL_H_
#define SYNCBN_CLIENT_CC_WORKER_IMPL_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cc/connection.h"
#include "client/cc/contribution.h"
#include "client/cc/targets.h"
#include "client/cc/worker.h"
#include "grpcpp/alarm.h"
#include "grpcpp/support/slice.h"
#include "plumbing/forked.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {

// A declaration of a layer by this worker, valid from one point on in the order of all that it begins.
struct DeclaredLayer {
  LayerOptions options;
  uint64_t order = 0;
};
using DeclaredLayerPtr = std::shared_ptr<const DeclaredLayer>;

struct KnownLayer {
  DeclaredLayerPtr now;   // As it was declared last.
  DeclaredLayerPtr said;  // What the master knows from this stream: null, or `now`, or an earlier one.
};

// One key's contribution and what became of it. A Round is one of them, or several: the pieces of a long vector.
struct Piece {
  v1::RoundKey key;
  grpc::Slice encoded;  // A WorkerFrame with this contribution alone; frames are such encodings one after the other.
  uint64_t order = 0;   // Of all that this worker has begun.
  size_t length = 0;    // Of the result's vectors; 0 if only the master knows.
  bool finite = false;  // The layer's policy refuses NaN and infinity.
  // The declaration that the master must have been told last of the layer when this arrives. Null for a backward round,
  // which belongs to its forward round.
  DeclaredLayerPtr declared;
  KnownLayer* layer = nullptr;
  bool sent = false;
  absl::Time first_sent_at, sent_at;
  // Of a piece of a long vector: how many of its pieces are on their way, this one among them.
  std::shared_ptr<size_t> siblings_under_way;
  bool under_way = false;
  bool done = false;
  absl::Status status;
  RoundResult result;
};

// The waiting thread drives the completion queue, so that an answer wakes no thread but the one that wants it; where
// several wait, one drives and the others sleep until it has something for them.
class WorkerImpl : public std::enable_shared_from_this<WorkerImpl> {
 public:
  WorkerImpl(Worker::Options options, ChannelMaker channels);
  // Not to be called in a forked child: see Abandon.
  ~WorkerImpl();
  // For std::shared_ptr: deletes, but in a forked child leaves all as it is.
  static void Abandon(WorkerImpl* impl);

  absl::Status Join();
  // Breaks the stream off: what is pending ends with CANCELLED.
  void Close();
  absl::Status Leave(absl::string_view reason);
  absl::Status WaitForMembers(absl::Duration timeout);
  absl::Status ResumeAt(uint64_t sequence);
  void Interrupt();
  absl::Status DeclareLayer(const LayerOptions& layer);
  std::optional<LayerOptions> FindLayer(absl::string_view name) const;
  absl::StatusOr<Round> Begin(OutgoingContribution contribution);
  absl::StatusOr<Round> BeginSum(absl::string_view name, uint64_t wanted, absl::Span<const double> value);
  absl::Status Flush();
  absl::Status WaitFor(const std::vector<std::shared_ptr<Piece>>& pieces, absl::Duration timeout);
  bool HasOutcome(const std::vector<std::shared_ptr<Piece>>& pieces) const;
  // As in worker.h, a round being its pieces.
  void WaitForAny(const std::vector<const std::vector<std::shared_ptr<Piece>>*>& rounds,
                  const std::function<bool()>& woken, absl::Duration timeout);
  void Wake();

  const Worker::Options& options() const { return options_; }
  uint64_t incarnation() const { return incarnation_; }
  uint64_t run_id() const { return run_id_; }
  // In a child of the process that joined, nothing of the connection may be touched.
  bool forked() const { return open_.forked(); }
  // OK, or FAILED_PRECONDITION (FORKED).
  absl::Status CheckProcess() const;

 private:
  enum class State {
    kConnecting,  // A stream is being opened, or its join is on the way.
    kJoined,
    kWaiting,  // For retry_at_, after a broken stream.
    kEnded,    // For good; end_ says why.
  };
  using KeyTuple = std::tuple<std::string, int, uint64_t>;

  static KeyTuple TupleOf(const v1::RoundKey& key) { return {key.layer(), key.phase(), key.sequence()}; }

  // ---- The connection
  // Gives the lock up while it asks where the master is.
  void Connect() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // After a stream that has ended, or could not be opened.
  void ConnectLater(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Reports a rank that another worker holds: a warning, once for each holder.
  void NoteRankTaken(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // A warning for rounds of which the master says that they wait for long.
  void NoteLateRounds(const v1::MasterFrame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Explains what may be behind a connection that the other side has closed before it said a word; or nothing.
  absl::string_view HintOf(const absl::Status& why) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Logs what there is to say, giving up the lock meanwhile.
  void SayNotices() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SendJoin() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnEvent(void* tag, bool ok) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnFrame() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // In bytes, with every outcome that this worker waits for.
  size_t LongestFrame() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnStreamEnded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnResult(v1::RoundResult* result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Every pending round and every later call fails with `why`.
  void End(absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sends what there is to send, then asks for what there is to read.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteFrame() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether a piece of a long vector waits until others have been answered. Without that, results would come faster
  // than they are read, and the master would cut this worker off. One of each vector may always go, since other workers
  // may send vectors in another order.
  bool MustWait(const Piece& piece) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetUnderWay(Piece& piece, bool under_way) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The declarations with which a new stream begins: those under which the oldest unanswered rounds were begun.
  void ChooseDeclarations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Adds to a frame that has the first `taken` of unsent_ what must be declared before all that was begun at `order`,
  // and `declared`, unless it is null. Returns false if that must wait for the next frame, since a frame's declarations
  // count before its contributions.
  bool DeclareBefore(uint64_t order, const DeclaredLayerPtr& declared, size_t taken, v1::WorkerFrame* frame)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool AddDeclaration(const DeclaredLayerPtr& declared, size_t taken, v1::WorkerFrame* frame)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // ---- Waiting
  // Drives the queue, or sleeps while another thread does, until `done` or `deadline`, or an interrupt (CANCELLED).
  // Looks once at what has arrived even if the deadline has passed.
  absl::Status Await(const std::function<bool()>& done, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Notes that the caller will wait for this piece for long, if that means that the worker does nothing else.
  void PromiseSilence(const std::shared_ptr<Piece>& piece, absl::Time now, absl::Duration timeout)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DriveOnce(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes the thread that drives the queue, and those that sleep, look at what they wait for.
  void WakeAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static bool HasEnded(const std::vector<std::shared_ptr<Piece>>& pieces);
  void RunTimers(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Time NextTimer() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // ---- A master that has stopped without closing its connections
  // Notes that something was sent which the master must answer.
  void ExpectAnswer(Piece& piece, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // When the master must have answered: past the deadline that it has itself, by a margin.
  absl::Time AnswerDue(const Piece& piece) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // When to look next whether it has; InfiniteFuture if nothing is unanswered.
  absl::Time NextCheck() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends the worker if the master has not answered in time.
  void CheckMaster(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Someone should have looked at the stream at `planned`. If that is long ago, answers may wait to be read.
  void NoteAbsence(absl::Time planned) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // ---- Calls
  // OK, or why the worker cannot be used; notes which thread calls.
  absl::Status Enter() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<uint64_t> ResolveSequence(const std::string& layer, v1::Phase phase, uint64_t sequence)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // `length`: of the result's vectors.
  absl::StatusOr<std::shared_ptr<Piece>> AddPiece(OutgoingContribution contribution, size_t length, KnownLayer& layer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Returns what is known of the layer. Rounds that were begun before stay what they are.
  KnownLayer& Declare(const LayerOptions& layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const OpenHere open_;  // Until the connection has been taken down.
  const Worker::Options options_;
  const ChannelMaker channels_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;  // Something that a sleeping thread may wait for.
  grpc::CompletionQueue queue_;
  bool driving_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t interrupts_ ABSL_GUARDED_BY(mutex_) = 0;
  grpc::Alarm alarm_;
  bool alarm_pending_ ABSL_GUARDED_BY(mutex_) = false;

  State state_ ABSL_GUARDED_BY(mutex_) = State::kWaiting;
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  TargetTurn targets_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Connection> connection_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Connection>> retired_ ABSL_GUARDED_BY(mutex_);  // Until their last events.
  absl::Time retry_at_ ABSL_GUARDED_BY(mutex_);
  absl::Time give_up_at_ ABSL_GUARDED_BY(mutex_);
  absl::Duration backoff_ ABSL_GUARDED_BY(mutex_);
  absl::Status last_break_ ABSL_GUARDED_BY(mutex_);
  std::string taken_said_ ABSL_GUARDED_BY(mutex_);            // The newest warning of NoteRankTaken.
  std::vector<std::string> notices_ ABSL_GUARDED_BY(mutex_);  // Warnings to be logged without the lock.
  absl::Time joined_at_ ABSL_GUARDED_BY(mutex_);
  bool answered_ ABSL_GUARDED_BY(mutex_) = false;  // This stream has brought an outcome.

  absl::Duration round_timeout_ ABSL_GUARDED_BY(mutex_);  // The group's.
  absl::Time heard_at_ ABSL_GUARDED_BY(mutex_);           // When the newest frame came.
  absl::Time last_look_ ABSL_GUARDED_BY(mutex_);          // When a thread last drove the queue,
  absl::Time attended_since_ ABSL_GUARDED_BY(mutex_);     // and since when without a long pause.
  absl::Time check_master_at_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();

  // Atomic, since a forked child may ask, where the lock may be held for ever.
  std::atomic<uint64_t> incarnation_{0};
  std::atomic<uint64_t> run_id_{0};
  size_t present_ ABSL_GUARDED_BY(mutex_) = 0;

  // A std::map: pieces point into it.
  std::map<std::string, KnownLayer, std::less<>> layers_ ABSL_GUARDED_BY(mutex_);
  std::deque<DeclaredLayerPtr> undeclared_ ABSL_GUARDED_BY(mutex_);  // Not yet said on this stream, by order.

  absl::flat_hash_map<KeyTuple, std::shared_ptr<Piece>> pending_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Piece>> unsent_ ABSL_GUARDED_BY(mutex_);
  uint64_t begun_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;  // Pieces of long vectors that were sent and have no answer.
  absl::flat_hash_map<std::pair<std::string, int>, uint64_t> next_sequence_ ABSL_GUARDED_BY(mutex_);
  uint64_t first_sequence_ ABSL_GUARDED_BY(mutex_) = 0;

  // What the only thread that uses this worker waits for, if it may promise to do nothing else, and when the promise is
  // worth a frame of its own.
  std::optional<std::thread::id> user_ ABSL_GUARDED_BY(mutex_);
  bool several_users_ ABSL_GUARDED_BY(mutex_) = false;
  bool alone_ ABSL_GUARDED_BY(mutex_) = false;    // One thread has used this worker, and brought a round to its end.
  bool retract_ ABSL_GUARDED_BY(mutex_) = false;  // The promise given no longer holds.
  std::shared_ptr<Piece> blocked_on_ ABSL_GUARDED_BY(mutex_);
  bool blocked_said_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time say_blocked_at_ ABSL_GUARDED_BY(mutex_);

  std::optional<std::string> leaving_ ABSL_GUARDED_BY(mutex_);
  bool leave_sent_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_WORKER_IMPL_H_
