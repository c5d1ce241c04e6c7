// A worker's side of the protocol, as a function of what happens: the mirror of the master's core::Coordinator.

#ifndef SYNCBN_CLIENT_CC_SESSION_SESSION_H_
#define SYNCBN_CLIENT_CC_SESSION_SESSION_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/errors.h"
#include "client/cc/session/attempts.h"
#include "client/cc/session/chunks.h"
#include "client/cc/session/declarations.h"
#include "client/cc/session/frame.h"
#include "client/cc/session/round_log.h"
#include "client/cc/session/types.h"

namespace syncbn::session {

// ---- What the driver has to do, in this order -----------------------------------------------------------------------

// Find out where the master is, and answer with OnMasterFound.
struct FindMaster {};

// Open a stream, and answer with OnStreamUp or OnStreamBroken. Events of earlier streams must not arrive any more.
struct Connect {
  std::string target;
  absl::Duration timeout;  // For one address.
};

// Write a frame to the stream, and answer with OnWritten, unless the stream breaks first.
struct Write {
  ClientFrame frame;
};

// Break the stream off.
struct CloseStream {};

// A round has ended. Each contribution ends once. `status` is what its caller is told; `result` counts if it is OK.
struct Complete {
  std::shared_ptr<Contribution> contribution;
  absl::Status status;
  RoundResult result;
};

// The master has let this worker into the group, at first or again.
struct JoinedGroup {
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
};

// Log a warning.
struct Notice {
  std::string text;
};

// The session is over for good, and `why` is the answer to every later call. Every pending round has its Complete
// before this.
struct Ended {
  absl::Status why;
};

using Effect = std::variant<FindMaster, Connect, Write, CloseStream, Complete, JoinedGroup, Notice, Ended>;
using Effects = absl::InlinedVector<Effect, 2>;

// ---- The session ----------------------------------------------------------------------------------------------------

struct Options {
  uint32_t rank = 0;
  absl::Duration join_timeout = absl::Seconds(30);
  // The complete set of layers, or empty.
  std::vector<LayerOptions> layers;
  // Streams are encrypted. Only error texts depend on it.
  bool tls = false;
  ChunkLimits chunks;
  LogLimits log;
};

// One worker's membership in its group: when and where to connect, what to declare and to send and when, which rounds
// are pending, and when a silent master is to be given up. It has no thread, no lock, no clock and no socket: the same
// calls at the same times give the same effects. `now` must not go backwards.
//
// A driver around it owns the lock, the transport and the waiting threads. It calls OnTime when NextTimer() has come,
// the On... functions when something happens, and Send when a caller waits or flushes, and applies what they return.
//
// *Thread safety*: none; the driver serializes.
class Session {
 public:
  enum class State {
    kConnecting,  // A stream is being opened, or its join is on the way.
    kJoined,
    kWaiting,  // For the next attempt to connect.
    kEnded,
  };

  // The first OnTime, which is due at `now`, begins to connect.
  Session(Options options, absl::Time now);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  State state() const { return state_; }
  // Returns the error that the session has ended with; OK before.
  const absl::Status& end() const { return end_; }
  // The stream has broken without a word, so that the same master or another may soon be there. False once a master has
  // said that another worker has the rank, or that it goes away. But if this worker was leaving then, it has to leave
  // at the next master, which would wait for it.
  bool may_come_back() const {
    return (state_ == State::kWaiting || state_ == State::kConnecting) && run_id_ != 0 && !dismissed_;
  }
  // The members of the group with a live stream, as far as is known.
  size_t present_ranks() const { return present_ranks_; }
  // The group's progress when this worker joined it: the completed round of the greatest sequence for each layer and
  // phase, by layer. Empty in a group that began then.
  const std::vector<RoundKey>& newest_rounds() const { return newest_rounds_; }
  // A frame is being written. Send does nothing until OnWritten.
  bool writing() const { return writing_; }
  // The stream is joined, and contributions wait to be sent by it.
  bool HasUnsent() const { return state_ == State::kJoined && !unsent_.empty(); }

  // ---- What has happened

  // Runs the timers that are due. Harmless when early.
  Effects OnTime(absl::Time now);
  // Returns the time at which OnTime is next due; InfiniteFuture if nothing waits for time to pass.
  absl::Time NextTimer() const;

  // The answer to FindMaster: a list of targets separated by commas, or why there is none, which counts as a failed
  // attempt.
  Effects OnMasterFound(const absl::StatusOr<std::string>& targets, absl::Time now);
  // The stream can be written to.
  Effects OnStreamUp();
  Effects OnFrame(ServerFrame frame, absl::Time now);
  // The frame of the last Write has been written.
  void OnWritten() { writing_ = false; }
  // The stream has ended, or could not be opened.
  Effects OnStreamBroken(Break why, absl::Time now);
  // The driver looks at the stream, for which it had planned to wait until `planned`. After a long pause, answers may
  // still wait to be read, and the master is given more time.
  void OnAttended(absl::Time planned, absl::Time now);

  // Ends the session if the master has owed an answer for too long. Part of OnTime; a thread that does not drive the
  // stream calls it alone.
  Effects CheckMaster(absl::Time now);
  // Returns the time at which CheckMaster is next due; InfiniteFuture if nothing is unanswered.
  absl::Time NextCheck() const { return state_ == State::kJoined ? check_at_ : absl::InfiniteFuture(); }

  // Returns INTERNAL for a frame of so many bytes that the outcomes of all pending rounds cannot fill it: it is not
  // worth reading.
  absl::Status CheckFrameLength(size_t bytes) const;
  // The master sent something that cannot be read. Ends the session with `why`.
  Effects OnBadFrame(absl::Status why) { return End(std::move(why)); }

  // ---- What the program wants

  // Makes the layer known with the next frame, and again on every new stream. *Errors*: INVALID_ARGUMENT for a name of
  // other than 1 to 255 bytes or that is not UTF-8, and for 0 channels.
  absl::Status Declare(const LayerOptions& layer);
  // Returns the newest declaration under this name, or null.
  std::shared_ptr<const LayerOptions> FindLayer(absl::string_view name) const;

  // Makes the contribution with this key from elements `begin` to `begin + length` of the caller's vectors.
  using MakeContribution = absl::FunctionRef<std::shared_ptr<Contribution>(RoundKey key, size_t begin, size_t length)>;

  // Begins a round, to be sent by a later Send. `key.sequence` may be kNextSequence. `length` is that of the caller's
  // vectors. A sum declares itself, and a long one goes in chunks (chunks.h), whose names are NAME#0, NAME#1 and so on:
  // `make` is called for each, in order; once for every other round. *Errors*, with which nothing has begun:
  // FAILED_PRECONDITION if the layer was not declared; OUT_OF_RANGE if kGreatestSequence has been used and
  // kNextSequence is asked for; ALREADY_EXISTS if a round of this key is pending; INVALID_ARGUMENT for an empty sum,
  // and for a sum whose name could not be declared.
  absl::Status Begin(RoundKey key, size_t length, MakeContribution make);

  // Every layer's next sequence, in every phase, becomes `sequence`. *Errors*: INVALID_ARGUMENT beyond
  // kGreatestSequence.
  absl::Status ResumeAt(uint64_t sequence);
  // A caller has been told this error of a round. Begins the next round of every layer and phase at the sequence that
  // the error names, or later; an error without a sequence changes nothing. Workers whose programs are alike call this
  // at the same place in their programs, and so begin the same rounds.
  void ResumeAfter(const absl::Status& error);
  // The layer's next sequence in this phase becomes `key.sequence`. *Errors*: as of ResumeAt; INVALID_ARGUMENT for a
  // name of other than 1 to 255 bytes.
  absl::Status ResumeLayerAt(const RoundKey& key);
  // Returns the rounds that come next where kNextSequence is asked for, by layer and phase. The first has an empty
  // name, and stands for all layers that are not listed.
  std::vector<RoundKey> NextRounds() const;

  // Returns the frame that is due, if a stream is joined and not being written to: what was declared and begun, as far
  // as one frame should hold; that the worker is blocked; that it leaves.
  Effects Send(absl::Time now);

  // The worker does nothing else until the contribution's round has ended. The master is told so with the next frame,
  // or in a frame of its own after a short while. `sure`: earlier rounds have shown that one thread alone uses the
  // worker; otherwise the while is longer. Holds until another round begins or a layer is declared.
  void Blocked(const ContributionPtr& contribution, bool sure, absl::Time now);
  // The worker may do something else. `retract`: a master that has been told otherwise is told that, too.
  void Unblocked(bool retract);

  // Sends what was begun, and then that the worker leaves. The master ends the stream; then the session ends with
  // FAILED_PRECONDITION (LEFT).
  void Leave(absl::string_view reason);
  // Ends the session as Leave does, without waiting for the master any longer.
  Effects FinishLeave() { return End(LeftError()); }
  // Ends the session with CANCELLED (CLOSED), and breaks the stream off.
  Effects Close() { return End(ClosedError()); }

 private:
  using ContributionRef = std::shared_ptr<Contribution>;
  // Finds contributions by their keys.
  struct KeyHash {
    using is_transparent = void;
    size_t operator()(const RoundKey& key) const { return absl::Hash<RoundKey>()(key); }
    size_t operator()(const ContributionRef& contribution) const { return (*this)(contribution->key()); }
  };
  struct KeyEqual {
    using is_transparent = void;
    static const RoundKey& KeyOf(const RoundKey& key) { return key; }
    static const RoundKey& KeyOf(const ContributionRef& contribution) { return contribution->key(); }
    template <typename A, typename B>
    bool operator()(const A& a, const B& b) const {
      return KeyOf(a) == KeyOf(b);
    }
  };

  // ---- The stream
  // Takes note of a stream that has ended, or could not be opened, and plans the next.
  void Retry(Break why, absl::Time now, Effects* effects);
  void OnJoined(const Joined& joined, absl::Time now);
  Notice LateNotice(const std::vector<LateRound>& rounds) const;
  void OnOutcome(Outcome outcome, Effects* effects);
  // Every pending round and every later call fails with `why`.
  Effects End(absl::Status why);
  // The pending contributions in the order in which they were begun.
  std::vector<ContributionRef> PendingInOrder() const;
  // Those, and the answered ones that are held and were not answered by the master with this memory.
  std::vector<ContributionRef> HeldInOrder(std::optional<uint64_t> memory) const;
  void NoteMembership(Membership membership);
  // Returns whether the master waits to hear that a leave was read, and so what it had sent before.
  bool MustConfirm() const { return membership_read_ != membership_said_ && !left_ranks_->empty() && !leave_sent_; }

  // ---- Rounds
  // The layer's next sequences, by phase.
  std::array<uint64_t, 3>& NextSequences(const std::string& layer);
  absl::StatusOr<uint64_t> ResolveSequence(const std::string& layer, Phase phase, uint64_t sequence);
  absl::Status BeginSum(RoundKey key, size_t length, MakeContribution make);
  void Enqueue(ContributionRef contribution, KnownLayer& layer, size_t length);
  // Keeps a round that has ended for a master that does not know it.
  void Keep(ContributionRef contribution, const Outcome& outcome);
  // Moves what may go now, and what one frame should hold, from unsent_ to the frame, and declarations before it.
  void FillFrame(absl::Time now, ClientFrame* frame);
  // Returns true for a chunk of a long vector that waits until others have been answered. Without that, results would
  // come faster than they are read, and the master would cut this worker off. One of each vector may always go, since
  // other workers may send vectors in another order.
  bool MustWait(const Contribution& contribution) const;
  void NoteResent(Contribution& contribution);
  void SetUnderWay(Contribution& contribution, bool under_way);
  // The worker is blocked, and has sent all that it has begun.
  bool IsBlocked() const;

  // ---- A master that has stopped without closing its connections
  // Notes that the contribution was sent, so that the master must answer it.
  void ExpectAnswer(Contribution& contribution, absl::Time now);
  // Returns when the master must have answered: its own deadline and a margin.
  absl::Time AnswerDue(const Contribution& contribution) const;

  const Options options_;
  State state_ = State::kWaiting;
  absl::Status end_;

  Attempts attempts_;
  bool dismissed_ = false;    // The newest stream ended with a reason for which a worker that leaves seeks no other.
  bool stream_open_ = false;  // From Connect to OnStreamBroken.
  bool writing_ = false;
  uint64_t incarnation_ = 0;
  uint64_t run_id_ = 0;  // 0: no master has let this worker in yet.
  size_t present_ranks_ = 0;
  std::shared_ptr<const std::vector<uint32_t>> left_ranks_ = std::make_shared<const std::vector<uint32_t>>();
  uint64_t membership_read_ = 0;  // The version of the newest,
  uint64_t membership_said_ = 0;  // and of the one that the master of this stream knows to be read.
  std::vector<RoundKey> newest_rounds_;
  uint64_t memory_ = 0;  // Names that of the master that this worker has joined.
  bool had_outcome_ = false;

  absl::Duration round_timeout_;                      // The group's.
  absl::Time heard_at_ = absl::InfinitePast();        // When the newest frame came.
  absl::Time attended_since_ = absl::InfinitePast();  // Since when the stream has been looked at without a long pause.
  absl::Time check_at_ = absl::InfiniteFuture();

  Declarations declarations_;
  absl::flat_hash_set<ContributionRef, KeyHash, KeyEqual> pending_;
  std::vector<ContributionRef> unsent_;
  RoundLog log_;
  bool catching_up_ = false;       // The master of this stream has not been told that all is sent.
  size_t to_resend_ = 0;           // The number of repeats in unsent_, which go before caught_up.
  size_t under_way_ = 0;           // Chunks of long vectors that were sent and have no answer,
  size_t elements_under_way_ = 0;  // and their elements.
  absl::flat_hash_map<std::string, std::array<uint64_t, 3>> next_sequence_;  // By layer and phase.
  uint64_t first_sequence_ = 0;

  ContributionPtr blocked_on_;
  ContributionPtr told_;  // The newest frame has told the master that the worker is blocked on this.
  bool blocked_surely_ = false;
  absl::Time say_blocked_at_;
  bool retract_ = false;  // The worker is no longer blocked on told_.

  std::optional<std::string> leaving_;
  bool leave_sent_ = false;
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_SESSION_H_
