#include "server/rpc/sessions.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "plumbing/messages.h"
#include "server/core/error.h"
#include "server/rpc/status.h"

namespace syncbn::rpc {
namespace {

// A worker that has promised silence is read from again after this long, should its promise not hold.
constexpr absl::Duration kLongestSilence = absl::Milliseconds(20);
// Time within which a worker that lags, and makes its group wait for it, must read something.
constexpr absl::Duration kLagTimeout = absl::Seconds(5);
// Time within which a closed stream's last frames and status must be read.
constexpr absl::Duration kCloseTimeout = absl::Seconds(5);
// Calls by which nobody has asked to join. Beyond that, further calls come in a row only after a pause: if all of these
// end at once, the queue has several events for each, and gRPC reads no socket until they have been handled. Calls that
// end before they are taken cost nothing here.
constexpr size_t kMostCallers = 64;
// Results that are a few: less than this part of those that one turn may bring forth.
constexpr size_t kPartOfTurn = 4;
// A contribution with so many bytes more than the layers' numbers take is not yet malformed.
constexpr size_t kShortest = size_t{64} << 10;

}  // namespace

size_t Fingerprint(const core::RoundKey& key) {
  return absl::Hash<std::tuple<const std::string&, uint64_t, core::Phase>>()({key.layer, key.sequence, key.phase});
}

Sessions::Sessions(const LoopOptions& options, const core::Coordinator& coordinator, Deliver deliver, Narrator* log,
                   const absl::Time* now)
    : options_(options),
      coordinator_(coordinator),
      deliver_(std::move(deliver)),
      log_(log),
      now_(now),
      memory_(options.memory_sharing, options.memory_directories, options.max_frame_bytes),
      calls_(kMostCallsInARow, kLongestPause),
      results_(options.limits.max_turn_bytes, kLongestPause) {}

void Sessions::Serve(grpc::ServerCompletionQueue* queue) {
  queue_ = queue;
  AwaitStream();
}

void Sessions::AwaitStream() {
  awaiting_ = true;
  const core::StreamId id = next_stream_++;
  auto session = std::make_unique<Session>();
  session->stream = std::make_unique<WorkerStream>(id, this, options_.max_unread_bytes, &service_, queue_);
  sessions_.emplace(id, std::move(session));
}

void Sessions::EndTurn(bool quiet, bool idle) {
  calls_.EndTurn(quiet && streams() < joined() + kMostCallers, *now_);
  results_.EndTurn(idle, *now_);
  if (!awaits_call() && !calls_.spent()) AwaitStream();
}

Sessions::Session& Sessions::Of(const WorkerStream* stream) {
  const auto it = sessions_.find(stream->id());
  SYNCBN_CHECK(it != sessions_.end(), "stream ", stream->id(), " has no session");
  return *it->second;
}

Sessions::Session* Sessions::Find(core::StreamId id) {
  const auto it = sessions_.find(id);
  return it == sessions_.end() ? nullptr : it->second.get();
}

// ---- WorkerStream::Handler ------------------------------------------------------------------------------------------

void Sessions::OnAccepted(WorkerStream* stream) {
  ++started_;
  Of(stream).connection = ConnectionOf(stream->peer());
  Of(stream).frames = options_.connections->FramesOf(stream->peer());
  timers_.insert({*now_ + options_.join_timeout, TimerKind::kJoin, stream->id()});
  awaiting_ = false;
  calls_.Add(1, *now_);
}

// Peers of unix sockets have no names, and so their streams share nothing.
std::shared_ptr<UnreadBytes> Sessions::ConnectionOf(const std::string& peer) {
  if (peer.empty()) return std::make_shared<UnreadBytes>();
  std::weak_ptr<UnreadBytes>& known = connections_[peer];
  std::shared_ptr<UnreadBytes> connection = known.lock();
  if (connection == nullptr) known = connection = std::make_shared<UnreadBytes>();
  return connection;
}

void Sessions::OnFrame(WorkerStream* stream, grpc::ByteBuffer&& frame) {
  Session& session = Of(stream);
  const size_t bytes = frame.Length();
  if (session.frames != nullptr && !stream->shares_memory()) session.frames->Add(bytes);
  if (!session.joined && bytes > options_.limits.max_first_frame_bytes) {
    return Refuse(session, core::LimitError(bytes, "bytes of a first frame", "max_first_frame_bytes",
                                            options_.limits.max_first_frame_bytes));
  }
  session.frame.emplace(std::move(frame), options_.limits);
  if (auto error = session.frame->Open()) return Refuse(session, *error);
  const core::FrameReceived& head = session.frame->head();
  if (head.join.has_value() && !session.joined) {
    if (auto error = CheckCredentials(session, *head.join)) return Refuse(session, *error);
    session.joined = true;
    joined_.fetch_add(1, std::memory_order_relaxed);
    session.lane = lanes_.Enter(head.join->id);
  }
  session.slice = SliceOf(session);
  session.answered_since_read = false;
  if (session.lane != nullptr && HasToWait(session)) return lanes_.AddToBacklog(*session.lane, stream->id());
  HandleSlice(session);
}

std::optional<core::Error> Sessions::CheckCredentials(const Session& session, const core::Join& join) const {
  if (options_.token.present() && join.token != options_.token) return core::TokenError(join);
  if (options_.identity.empty()) return std::nullopt;
  return CheckIdentity(options_.identity, session.stream->names(), join);
}

void Sessions::OnWritten(WorkerStream* stream) { NoteLag(Of(stream)); }

void Sessions::OnFault(WorkerStream* stream, const std::string& fault) {
  Refuse(Of(stream), core::MalformedError(absl::StrCat("the shared memory is against its rules: ", fault)));
}

void Sessions::OnHalfClosed(WorkerStream* stream) {
  Session& session = Of(stream);
  session.half_closed = true;
  if (!session.joined) {
    CloseStream(session, ToGrpc(core::MakeError(absl::StatusCode::kInvalidArgument, core::kJoinRequired,
                                                "the stream ended before its first frame")));
  } else if (session.unanswered.empty()) {
    Retire(session);
  }
  // Otherwise it still waits for answers, as grpcurl does at the end of its input.
}

void Sessions::OnBroken(WorkerStream* stream) {
  ++handled_[static_cast<size_t>(grpc::StatusCode::CANCELLED)];
  Of(stream).frame.reset();
  Of(stream).broken = true;
  deliver_(core::StreamClosed{stream->id()});
}

void Sessions::OnGone(WorkerStream* stream) {
  Session& session = Of(stream);
  if (session.connection == nullptr) awaiting_ = false;  // No call has come.
  if (session.joined) joined_.fetch_sub(1, std::memory_order_relaxed);
  if (Lane* const lane = std::exchange(session.lane, nullptr)) {
    if (std::exchange(session.lags, false)) EndLag(*lane);
    lanes_.Leave(lane);
  }
  if (session.member) {
    options_.connections->Left(stream->peer());
  } else if (session.broken || (session.half_closed && !session.joined)) {
    // A call that was reset may look like one that ended without a frame.
    options_.connections->Strayed(stream->peer());
  }
  sharing_.erase(std::remove(sharing_.begin(), sharing_.end(), stream), sharing_.end());
  const std::string peer = stream->peer();
  sessions_.erase(stream->id());
  const auto connection = connections_.find(peer);
  if (connection != connections_.end() && connection->second.expired()) connections_.erase(connection);
}

bool Sessions::PollShared() {
  bool any = false;
  // A stream is deleted at an event of its call alone, and none is being handled.
  for (WorkerStream* const stream : sharing_) any = stream->Poll() || any;
  return any;
}

// ---- Frames, slice by slice -----------------------------------------------------------------------------------------

size_t Sessions::LongestResultOf(const Session& session) const {
  const core::FrameReceived& head = session.frame->head();
  size_t longest = session.lane == nullptr ? 0 : coordinator_.LongestResult(session.lane->id);
  for (const core::LayerSpec& layer : head.layers) longest = std::max(longest, core::LongestResult(layer));
  if (head.join.has_value()) {
    for (const core::LayerSpec& layer : head.join->layers) longest = std::max(longest, core::LongestResult(layer));
  }
  return longest;
}

bool Sessions::HasToWait(const Session& session) const {
  if (!results_.spent()) return false;
  return session.frame->contributions() * LongestResultOf(session) > options_.limits.max_turn_bytes / kPartOfTurn;
}

SliceLimits Sessions::SliceOf(const Session& session) const {
  // A frame of one short contribution is one slice, whatever the layers are.
  if (session.frame->contributions() <= 1 && session.frame->bytes() <= kShortest) return {};
  const size_t longest = LongestResultOf(session);
  // A number may take 9 bytes of a contribution and takes 8 of a result.
  SliceLimits slice;
  slice.contributions =
      std::clamp<size_t>(options_.limits.max_turn_bytes / std::max<size_t>(longest, 1), 1, slice.contributions);
  slice.longest_contribution = std::max(kShortest, longest / 8 * 9 + kShortest);
  return slice;
}

void Sessions::HandleSlice(Session& session) {
  const core::StreamId id = session.stream->id();
  // A join does not wait: it may take the place of the stream that lags.
  const bool joins = !session.frame->begun() && session.frame->head().join.has_value();
  if (session.lane != nullptr && session.lane->lagging != 0 && !joins) return session.lane->waiting.push_back(id);
  FrameArena arena;
  core::Event event;
  auto& slice = std::get<core::FrameReceived>(event);  // The first of its kinds.
  slice.stream = id;
  if (auto error = session.frame->Next(session.slice, arena.get(), &slice)) return Refuse(session, *error);
  if (slice.join.has_value()) {
    slice.join->connection = session.stream->peer();
    slice.join->address = options_.connections->BoundedAddressOf(session.stream->peer());
  }
  for (const core::Contribution& contribution : slice.contributions) {
    if (!contribution.repeats) session.unanswered.insert(Fingerprint(contribution.key));
  }
  const bool done = session.frame->done();
  const bool blocked = done && !slice.blocked_on.empty();
  if (done) session.frame.reset();
  deliver_(event);
  if (session.stream->closed()) {
    session.frame.reset();
  } else if (!done) {
    SYNCBN_CHECK(session.lane != nullptr, "a stream that has not joined is open after its first frame");
    lanes_.AddToBacklog(*session.lane, id);
  } else if (blocked && !session.answered_since_read && !session.stream->shares_memory()) {
    HoldRead(session);
  } else {
    ReadNext(session);
  }
}

void Sessions::ServeBacklog() {
  Session* const session = Find(lanes_.NextTurn());
  if (session != nullptr && session->frame.has_value() && !session->stream->closed()) HandleSlice(*session);
}

void Sessions::Refuse(Session& session, const core::Error& error) {
  NoteClosed(session.stream->id(), error);
  session.frame.reset();
  deliver_(core::StreamClosed{session.stream->id()});
  CloseStream(session, ToGrpc(error));
}

void Sessions::ReadNext(Session& session) {
  if (session.lane != nullptr && session.lane->lagging != 0) {
    session.lane->waiting.push_back(session.stream->id());
  } else {
    session.stream->ReadNext();
  }
}

// Writing before reading saves the transport a packet, a window update of its own.
void Sessions::HoldRead(Session& session) {
  session.read_held = true;
  session.read_at = *now_ + kLongestSilence;
  SetReadTimer(session);
}

// At most one for each stream. A timer for each frame would wake the loop for every one of them, though hardly any
// read is held as long.
void Sessions::SetReadTimer(Session& session) {
  if (std::exchange(session.read_timer_set, true)) return;
  timers_.insert({session.read_at, TimerKind::kRead, session.stream->id()});
}

// ---- Readers that lag -----------------------------------------------------------------------------------------------

void Sessions::NoteLag(Session& session) {
  if (session.lane == nullptr) return;
  const size_t bound = options_.max_unread_bytes / (session.lags ? 4 : 2);
  const size_t own = session.stream->unread_bytes();
  const bool lags = !session.stream->closed() && own > 0 && std::max(own, session.connection->bytes()) > bound;
  if (lags == session.lags) return;
  session.lags = lags;
  deliver_(core::ReaderLags{session.stream->id(), lags});
  if (lags) {
    ++session.lane->lagging;
    SetLagTimer(session);
  } else {
    EndLag(*session.lane);
  }
}

void Sessions::SetLagTimer(Session& session) {
  if (std::exchange(session.lag_timer_set, true)) return;
  session.written_then = session.stream->written();
  timers_.insert({*now_ + kLagTimeout, TimerKind::kLag, session.stream->id()});
}

void Sessions::EndLag(Lane& lane) {
  for (const core::StreamId id : lanes_.CatchUp(lane)) {
    Session* const session = Find(id);
    if (session == nullptr) continue;
    if (session->frame.has_value()) {
      lanes_.AddToBacklog(lane, id);
    } else {
      session->stream->ReadNext();
    }
  }
}

// ---- Effects --------------------------------------------------------------------------------------------------------

void Sessions::Send(const std::vector<core::StreamId>& streams, const v1::MasterFrame& frame,
                    const std::vector<size_t>& answered) {
  // Write to every stream first, then resume reading; reading in between would delay the last worker.
  std::shared_ptr<grpc::ByteBuffer> bytes;
  const size_t size = frame.ByteSizeLong();
  results_.Add(size, *now_);
  absl::flat_hash_map<UnreadBytes*, UnreadBytes::Charge> charges;
  charges.reserve(streams.size());
  for (const core::StreamId id : streams) {
    Session* const session = Find(id);
    if (session == nullptr || !session->stream->open()) continue;
    if (!session->stream->Admits(size)) {
      CutOff(*session);
      continue;
    }
    UnreadBytes::Charge& charge = charges[session->connection.get()];
    if (charge == nullptr && session->connection->bytes() + size > options_.max_unread_bytes) {
      CutOff(*session);
      options_.connections->End(session->stream->peer(), "its workers leave too much unread");
      continue;
    }
    if (bytes == nullptr) bytes = std::make_shared<grpc::ByteBuffer>(SerializeToBuffer(frame));
    if (charge == nullptr) charge = session->connection->Add(size);
    session->stream->Send(bytes, charge);
  }
  for (const core::StreamId id : streams) {
    Session* const session = Find(id);
    if (session == nullptr) continue;
    NoteLag(*session);
    if (answered.empty()) continue;
    session->answered_since_read = true;
    for (const size_t fingerprint : answered) session->unanswered.erase(fingerprint);
    if (std::exchange(session->read_held, false)) ReadNext(*session);
    if (session->half_closed && session->unanswered.empty()) retiring_.push_back(id);
  }
}

void Sessions::NoteMember(core::StreamId id, absl::FunctionRef<bool()> start_reading) {
  Session* const session = Find(id);
  if (session == nullptr || std::exchange(session->member, true)) return;
  options_.connections->Joined(session->stream->peer());
  // The answer to the join is the first that the worker is sent, and carries the answer to its offer.
  auto segment = memory_.Accept(session->stream->offer());
  if (segment == nullptr || !start_reading()) return;
  session->stream->Share(std::move(segment), memory_.answer());
  sharing_.push_back(session->stream.get());
}

void Sessions::Close(core::StreamId id, const std::optional<core::Error>& error) {
  Session* const session = Find(id);
  if (session == nullptr) return;
  if (error.has_value()) NoteClosed(id, *error);
  CloseStream(*session, error.has_value() ? ToGrpc(*error) : grpc::Status::OK);
}

// ---- Ends and timers ------------------------------------------------------------------------------------------------

void Sessions::CloseStream(Session& session, const grpc::Status& status) {
  if (session.stream->closed()) return;
  timers_.insert({*now_ + kCloseTimeout, TimerKind::kClose, session.stream->id()});
  ++handled_[static_cast<size_t>(status.error_code())];
  session.stream->Close(status);
  NoteLag(session);  // Bytes that it leaves unread from here on hold nobody up.
}

void Sessions::NoteClosed(core::StreamId id, const core::Error& error) {
  closed_.Add(error.reason);
  log_->OnStreamClosed(id, error, *now_);
}

void Sessions::CutOff(Session& session) {
  if (std::exchange(session.cut_off, true)) return;
  closed_.Add("SLOW_READER");
  log_->OnReaderCutOff(session.stream->id(), session.stream->unread_bytes(), *now_);
  session.stream->Cancel();
}

std::string Sessions::PeerOf(core::StreamId id) const {
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) return "";
  const std::string& peer = it->second->stream->peer();
  return peer.empty() ? "a unix socket" : peer;
}

size_t Sessions::most_unread_bytes() const {
  size_t most = 0;
  for (const auto& [id, session] : sessions_) most = std::max(most, session->stream->unread_bytes());
  return most;
}

void Sessions::Retire(Session& session) {
  deliver_(core::StreamClosed{session.stream->id()});
  CloseStream(session, grpc::Status::OK);
}

absl::Time Sessions::NextTimer() const {
  return timers_.empty() ? absl::InfiniteFuture() : std::get<0>(*timers_.begin());
}

void Sessions::RunTimers() {
  while (NextTimer() <= *now_) {
    const auto [time, kind, id] = *timers_.begin();
    timers_.erase(timers_.begin());
    if (Session* const session = Find(id)) RunTimer(kind, *session);
  }
  for (const core::StreamId id : std::exchange(retiring_, {})) {
    if (Session* const session = Find(id)) Retire(*session);
  }
}

void Sessions::RunTimer(TimerKind kind, Session& session) {
  switch (kind) {
    case TimerKind::kJoin:
      if (session.joined) return;
      CloseStream(session, ToGrpc(core::MakeError(
                               absl::StatusCode::kInvalidArgument, core::kJoinRequired,
                               absl::StrCat("no join arrived within ", absl::FormatDuration(options_.join_timeout)))));
      return;
    case TimerKind::kRead:
      session.read_timer_set = false;
      if (session.read_held && *now_ < session.read_at) {
        SetReadTimer(session);
      } else if (std::exchange(session.read_held, false)) {
        ReadNext(session);
      }
      return;
    case TimerKind::kLag:
      session.lag_timer_set = false;
      if (!session.lags) return;
      if (session.stream->written() == session.written_then) return CutOff(session);
      SetLagTimer(session);
      return;
    case TimerKind::kClose:
      session.stream->Cancel();
      return;
  }
}

}  // namespace syncbn::rpc
