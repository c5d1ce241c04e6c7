// The workers' streams: when each is read from, how its frames reach the engine, and what becomes of those that lag.

#ifndef SYNCBN_SERVER_RPC_SESSIONS_H_
#define SYNCBN_SERVER_RPC_SESSIONS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_builder.h"
#include "server/core/coordinator.h"
#include "server/log/narrator.h"
#include "server/rpc/burst.h"
#include "server/rpc/connections.h"
#include "server/rpc/frame_reader.h"
#include "server/rpc/lanes.h"
#include "server/rpc/loop_options.h"
#include "server/rpc/shared_memory.h"
#include "server/rpc/unread_bytes.h"
#include "server/rpc/worker_stream.h"

namespace syncbn::rpc {

size_t Fingerprint(const core::RoundKey& key);

// A worker that sends faster than it reads, or than another of its group does, waits: no stream of a group is read from
// while one of them has much unread. One that then reads nothing for seconds is cut off. Streams of one connection, as
// workers of one process have it, share what it may leave unread.
//
// Thread safety: none but for joined(); the caller serializes.
class Sessions final : public WorkerStream::Handler {
 public:
  // Hands an event to the engine, and applies its effects before it returns.
  using Deliver = std::function<void(const core::Event&)>;

  // `now` is the time of the event that is being handled. What is pointed or referred to must outlive the object.
  Sessions(const LoopOptions& options, const core::Coordinator& coordinator, Deliver deliver, Narrator* log,
           const absl::Time* now);
  Sessions(const Sessions&) = delete;
  Sessions& operator=(const Sessions&) = delete;

  void Register(grpc::ServerBuilder* builder) { builder->RegisterService(&service_); }
  // Waits for workers' calls.
  void Serve(grpc::ServerCompletionQueue* queue);
  // Returns whether the next call may come, or no more are served.
  bool awaits_call() const { return awaiting_ || !serving_; }
  // Waits for the next call, unless many have come in a row: calls that come in thousands at once leave turns to those
  // that are being served. To be called at the end of each turn; `quiet`: there was no event, `idle`: nor in the turns
  // before, so that every socket has been looked at.
  void EndTurn(bool quiet, bool idle);
  // Waits for no further calls.
  void EndServing() { serving_ = false; }
  // Returns whether no call is being served or waited for.
  bool idle() const { return sessions_.empty(); }
  // Returns the number of streams that have asked to join and have not ended. Any thread.
  size_t joined() const { return joined_.load(std::memory_order_relaxed); }

  // Returns the address of the stream's worker, or "a unix socket", which has none; "" if the stream has gone.
  std::string PeerOf(core::StreamId id) const;
  // The calls that are being served, and the most bytes that one of them leaves unread.
  size_t streams() const { return sessions_.size() - (awaiting_ ? 1 : 0); }
  size_t most_unread_bytes() const;
  // The calls that came, and those that have been closed, by gRPC's code, since the start.
  uint64_t started() const { return started_; }
  const std::array<uint64_t, 17>& handled() const { return handled_; }
  // The streams that were closed with an error, or cut off.
  const core::ReasonCounts& closed() const { return closed_; }

  // Sends the frame to those of the streams that are still there. `answered` has the fingerprints of the rounds whose
  // outcomes are in it.
  void Send(const std::vector<core::StreamId>& streams, const v1::MasterFrame& frame,
            const std::vector<size_t>& answered = {});
  // The engine has let the stream's worker in. Accepts the memory that it offers, if `start_reading` returns true:
  // someone reads what comes through it (PollShared).
  void NoteMember(core::StreamId id, absl::FunctionRef<bool()> start_reading);
  // Ends the stream's call after what was sent to it before.
  void Close(core::StreamId id, const std::optional<core::Error>& error);

  // Returns when RunTimers is next due; InfiniteFuture if nothing waits for time to pass.
  absl::Time NextTimer() const;
  void RunTimers();

  // Null as long as no worker shares memory; then the doorbell of all that do, until the end.
  Doorbell* bell() const { return memory_.bell(); }
  // Takes the doorbell's name away, once there are no streams any more.
  void HideBell() { memory_.HideBell(); }
  // Returns the number of streams that share memory.
  size_t sharing() const { return sharing_.size(); }
  // Looks at the memory of every stream that shares it. Returns whether there was anything to do.
  bool PollShared();

  // Frames of many contributions are handled in slices. Returns whether there are more.
  bool has_backlog() const { return lanes_.has_backlog(); }
  // Handles the next slice.
  void ServeBacklog();

 private:
  enum class TimerKind { kJoin, kRead, kLag, kClose };

  struct Session {
    std::unique_ptr<WorkerStream> stream;
    std::shared_ptr<UnreadBytes> connection;      // Once a worker has called.
    std::shared_ptr<Connections::Frames> frames;  // The connection's; null if its peer has no name.
    Lane* lane = nullptr;                         // Once it has joined.
    std::optional<FrameReader> frame;             // While it is being handled.
    SliceLimits slice;
    // Fingerprints of the rounds that the worker has contributed to and that have no outcome yet. A set, not a count,
    // since a repeated contribution is answered once; no keys, which would copy names. Two of 64 bits that happen to be
    // equal would end a half-closed stream one answer early.
    absl::flat_hash_set<size_t> unanswered;
    bool joined = false;
    bool member = false;  // The engine has let it in.
    bool broken = false;
    bool half_closed = false;
    bool answered_since_read = false;
    bool lags = false;  // It leaves much unread.
    bool lag_timer_set = false;
    bool cut_off = false;
    uint64_t written_then = 0;  // When the lag's timer was set.
    // The worker sends nothing until it is answered, so the next read waits for an answer, at most until read_at.
    bool read_held = false;
    absl::Time read_at;
    bool read_timer_set = false;
  };

  // ---- WorkerStream::Handler
  void OnAccepted(WorkerStream* stream) override;
  void OnFrame(WorkerStream* stream, grpc::ByteBuffer&& frame) override;
  void OnWritten(WorkerStream* stream) override;
  void OnFault(WorkerStream* stream, const std::string& fault) override;
  void OnHalfClosed(WorkerStream* stream) override;
  void OnBroken(WorkerStream* stream) override;
  void OnGone(WorkerStream* stream) override;

  void AwaitStream();
  Session& Of(const WorkerStream* stream);
  // Returns null if the stream has gone.
  Session* Find(core::StreamId id);

  // Returns why the worker may not join as what it says: its token, or its certificate.
  std::optional<core::Error> CheckCredentials(const Session& session, const core::Join& join) const;

  // ---- Frames, slice by slice
  // The length of the longest result that the frame can bring forth.
  size_t LongestResultOf(const Session& session) const;
  // As many contributions as cannot bring forth more than max_turn_bytes of results.
  SliceLimits SliceOf(const Session& session) const;
  // Returns whether a frame that has come should wait for its turn: many results have been made in a row, and it may
  // bring forth more than a few.
  bool HasToWait(const Session& session) const;
  void HandleSlice(Session& session);
  // Returns what the connection of a peer leaves unread, which is shared by its streams.
  std::shared_ptr<UnreadBytes> ConnectionOf(const std::string& peer);
  // Ends a stream whose frame cannot be used.
  void Refuse(Session& session, const core::Error& error);
  // Reads the next frame, now or when no stream of the group lags.
  void ReadNext(Session& session);
  // Reads the next frame after an answer, or after a while.
  void HoldRead(Session& session);
  void SetReadTimer(Session& session);

  // ---- Readers that lag
  // The stream may lag now, or no longer.
  void NoteLag(Session& session);
  void SetLagTimer(Session& session);
  void EndLag(Lane& lane);

  // ---- Ends
  void CloseStream(Session& session, const grpc::Status& status);
  // Counts and logs a stream that is closed with an error.
  void NoteClosed(core::StreamId id, const core::Error& error);
  // Breaks the stream off since its worker does not read.
  void CutOff(Session& session);
  // The worker has had all that it waited for, and will send nothing more.
  void Retire(Session& session);
  void RunTimer(TimerKind kind, Session& session);

  const LoopOptions& options_;
  const core::Coordinator& coordinator_;
  const Deliver deliver_;
  Narrator* const log_;
  const absl::Time* const now_;
  StatisticsAsyncService service_;
  grpc::ServerCompletionQueue* queue_ = nullptr;
  core::StreamId next_stream_ = 1;
  absl::flat_hash_map<core::StreamId, std::unique_ptr<Session>> sessions_;
  absl::flat_hash_map<std::string, std::weak_ptr<UnreadBytes>> connections_;  // By peer.
  absl::btree_set<std::tuple<absl::Time, TimerKind, core::StreamId>> timers_;
  Lanes lanes_;
  std::vector<core::StreamId> retiring_;
  SharedMemory memory_;
  std::vector<WorkerStream*> sharing_;
  bool serving_ = true;
  bool awaiting_ = false;  // One of the sessions waits for its call.
  Burst calls_;            // That have come.
  Burst results_;          // Bytes that were sent.
  std::atomic<size_t> joined_{0};
  uint64_t started_ = 0;
  std::array<uint64_t, 17> handled_ = {};  // By code.
  core::ReasonCounts closed_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_SESSIONS_H_
