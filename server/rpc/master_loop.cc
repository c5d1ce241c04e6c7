#include "server/rpc/master_loop.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/alarm.h"
#include "plumbing/clock.h"
#include "plumbing/messages.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "server/rpc/call.h"
#include "server/rpc/convert.h"
#include "server/rpc/event_log.h"
#include "server/rpc/frame_reader.h"
#include "server/rpc/health.h"
#include "server/rpc/status.h"
#include "server/rpc/worker_stream.h"

namespace syncbn::rpc {
namespace {

// A worker that has promised silence is read from again after this long, should its promise not hold.
constexpr absl::Duration kLongestSilence = absl::Milliseconds(20);
// Time within which a worker that lags, and makes its group wait for it, must read something.
constexpr absl::Duration kLagTimeout = absl::Seconds(5);
// Results are put into one frame up to this size; a longer one has a frame of its own. It bounds what a worker must be
// ready to receive, and lets a slow reader show that it reads.
constexpr size_t kMostResultBytes = size_t{1} << 20;
// Beside its vectors.
constexpr size_t kResultOverhead = 512;
// A frame that is handled in slices gets its turn when the queue has had nothing for so many polls (each of which sees
// to one socket alone), and at least this often, though other events are waiting.
constexpr int kQuietPolls = 8;
constexpr absl::Duration kLongestBacklogPause = absl::Milliseconds(10);
// What a closed stream's last frames and status may take to be read.
constexpr absl::Duration kCloseTimeout = absl::Seconds(5);

size_t ResultBytes(const core::RoundOutcome& outcome) {
  const size_t error = outcome.error.has_value() ? outcome.error->message.size() : 0;
  return (outcome.first.size() + outcome.second.size()) * sizeof(double) + outcome.key.layer.size() + error +
         outcome.missing_ranks.size() * 2 + kResultOverhead;
}

// An event brings forth far less than a reader may leave unread before its group waits for it: 2 MiB by default, which
// take a few milliseconds.
LoopOptions Fitting(LoopOptions options) {
  options.limits.max_turn_bytes = std::min(options.limits.max_turn_bytes, options.max_unread_bytes / 32);
  options.limits.max_turn_bytes = std::max<size_t>(options.limits.max_turn_bytes, 1);
  return options;
}

size_t Fingerprint(const core::RoundKey& key) {
  return absl::Hash<std::tuple<const std::string&, uint64_t, core::Phase>>()({key.layer, key.sequence, key.phase});
}

}  // namespace

class MasterLoop::Impl final : public WorkerStream::Handler, public Watcher::Handler {
 public:
  explicit Impl(LoopOptions options)
      : options_(Fitting(std::move(options))),
        coordinator_(options_.limits),
        shutdown_tag_(this, &Impl::OnShutdown),
        stop_tag_(this, &Impl::OnStop),
        listening_tag_(this, &Impl::OnListening) {}

  void Register(grpc::ServerBuilder* builder) {
    builder->RegisterService(&statistics_);
    builder->RegisterService(&inspection_);
    health_.Register(builder);
    queue_ = builder->AddCompletionQueue();
  }

  // Before Run, and before anyone may shut the queue down: what is asked of a queue afterwards aborts the process.
  void AwaitCalls() {
    AcceptStream();
    AcceptWatcher();
    ServeInspection();
    health_.Serve(queue_.get(), &unary_calls_);
  }

  void Run() {
    void* tag = nullptr;
    bool ok = false;
    while (true) {
      const auto event = queue_->AsyncNext(&tag, &ok, clock_.QueueDeadline(turns_.empty() ? NextWakeUp() : now_));
      if (event == grpc::CompletionQueue::SHUTDOWN) return;
      now_ = clock_.Now();
      if (event == grpc::CompletionQueue::GOT_EVENT) static_cast<Tag*>(tag)->Proceed(ok);
      RunTimers();
      quiet_polls_ = event == grpc::CompletionQueue::TIMEOUT ? quiet_polls_ + 1 : 0;
      if (quiet_polls_ >= kQuietPolls || now_ - backlog_served_ > kLongestBacklogPause) ServeBacklog();
      EndIfIdle();
    }
  }

  void BeginShutdown() { shutdown_alarm_.Set(queue_.get(), absl::ToChronoTime(absl::UnixEpoch()), &shutdown_tag_); }
  void SetListening(bool listening) {
    listening_ = listening;
    if (listening_told_.exchange(false)) {
      listening_alarm_.Set(queue_.get(), absl::ToChronoTime(absl::UnixEpoch()), &listening_tag_);
    }
  }
  void BeginStop() { stop_alarm_.Set(queue_.get(), absl::ToChronoTime(absl::UnixEpoch()), &stop_tag_); }

  // ---- Streams
  void OnAccepted(WorkerStream* stream) override {
    timers_.insert({now_ + options_.join_timeout, TimerKind::kJoin, stream->id()});
    if (!shutting_down_) AcceptStream();
  }

  void OnFrame(WorkerStream* stream, grpc::ByteBuffer buffer) override {
    Session& session = sessions_[stream->id()];
    const size_t bytes = buffer.Length();
    if (!session.joined && bytes > options_.limits.max_first_frame_bytes) {
      return Refuse(stream, core::LimitError(bytes, "bytes of a first frame", "max_first_frame_bytes",
                                             options_.limits.max_first_frame_bytes));
    }
    session.frame = std::make_unique<FrameReader>(std::move(buffer), options_.limits);
    if (auto error = session.frame->Open()) return Refuse(stream, *error);
    const core::FrameReceived& head = session.frame->head();
    if (head.join.has_value() && !session.joined) {
      session.joined = true;
      EnterLane(session, head.join->id);
    }
    session.slice = SliceOf(session);
    session.answered_since_read = false;
    HandleSlice(stream);
  }

  void OnWritten(WorkerStream* stream) override { NoteLag(sessions_[stream->id()]); }

  void OnHalfClosed(WorkerStream* stream) override {
    // It may still wait for answers, as grpcurl does at the end of its input.
    Session& session = sessions_[stream->id()];
    session.half_closed = true;
    if (!session.joined) {
      CloseStream(stream, ToGrpc(core::MakeError(absl::StatusCode::kInvalidArgument, core::kJoinRequired,
                                                 "the stream ended before its first frame")));
    } else if (session.unanswered.empty()) {
      Retire(stream);
    }
  }

  void OnBroken(WorkerStream* stream) override {
    sessions_[stream->id()].frame.reset();
    Deliver(core::StreamClosed{stream->id()});
  }

  void OnGone(WorkerStream* stream) override {
    const auto it = sessions_.find(stream->id());
    LeaveLane(it->second);
    sessions_.erase(it);
  }

  // ---- Watchers
  void OnWatch(Watcher* watcher) override {
    if (!shutting_down_) AcceptWatcher();
    if (absl::Status found = coordinator_.GetGroup(watcher->group(), now_).status(); !found.ok()) {
      watcher->Close(ToGrpc(found, core::kGroupUnknown));
    } else if (watchers_.size() > options_.max_watchers + 1) {  // One of them is waiting for its call.
      watcher->Close(ToGrpc(core::LimitError(watchers_.size() - 1, "watchers", "max_watchers", options_.max_watchers)));
    }
  }

  void OnGone(Watcher* watcher) override { watchers_.erase(watcher); }

 private:
  enum class TimerKind { kJoin, kSilence, kLag, kClose };

  // The streams of a group, which wait for those among them that lag.
  struct Lane {
    core::GroupId id;
    size_t sessions = 0;
    size_t lagging = 0;
    std::vector<core::StreamId> waiting;  // To be read from, or to have their frames handled.
    std::deque<core::StreamId> backlog;   // Their frames have more slices.
  };

  struct Session {
    std::unique_ptr<WorkerStream> stream;
    Lane* lane = nullptr;                // Once it has joined.
    std::unique_ptr<FrameReader> frame;  // While it is being handled.
    SliceLimits slice;
    bool lags = false;  // It leaves much unread.
    // Fingerprints of the rounds that it has contributed to and that have no outcome yet. A set, not a count: what is
    // contributed twice is answered once.
    absl::flat_hash_set<size_t> unanswered;
    bool joined = false;
    bool silent = false;  // Its next read waits for an answer, or until:
    absl::Time silent_until;
    bool silence_timer_set = false;
    bool answered_since_read = false;
    bool half_closed = false;
    bool lag_timer_set = false;
    uint64_t written_then = 0;  // When the timer was set.
  };

  // ---- Waiting for calls
  void AcceptStream() {
    const uint64_t id = next_stream_++;
    Session& session = sessions_[id];
    session.stream = std::make_unique<WorkerStream>(id, this, options_.max_unread_bytes);
    session.stream->Accept(&statistics_, queue_.get());
  }

  void AcceptWatcher() {
    auto watcher = std::make_unique<Watcher>(this);
    Watcher* const address = watcher.get();
    watchers_.emplace(address, std::move(watcher));
    address->Accept(&inspection_, queue_.get());
  }

  void ServeInspection() {
    using Service = InspectionAsyncService;
    UnaryCall<Service, v1::ListGroupsRequest, v1::ListGroupsResponse>::Serve(
        &inspection_, &Service::RequestListGroups, queue_.get(), &unary_calls_, [this](const auto&, auto* response) {
          for (const core::GroupSummary& group : coordinator_.ListGroups()) ToProto(group, response->add_groups());
          return grpc::Status::OK;
        });
    UnaryCall<Service, v1::GetGroupRequest, v1::GetGroupResponse>::Serve(
        &inspection_, &Service::RequestGetGroup, queue_.get(), &unary_calls_,
        [this](const auto& request, auto* response) {
          const auto view = coordinator_.GetGroup(ToGroupId(request.job(), request.group()), now_);
          if (!view.ok()) return ToGrpc(view.status(), core::kGroupUnknown);
          ToProto(*view, response);
          return grpc::Status::OK;
        });
    UnaryCall<Service, v1::ListLayersRequest, v1::ListLayersResponse>::Serve(
        &inspection_, &Service::RequestListLayers, queue_.get(), &unary_calls_,
        [this](const auto& request, auto* response) {
          const auto layers = coordinator_.ListLayers(ToGroupId(request.job(), request.group()));
          if (!layers.ok()) return ToGrpc(layers.status(), core::kGroupUnknown);
          for (const core::LayerSummary& layer : *layers) ToProto(layer, response->add_layers());
          return grpc::Status::OK;
        });
    UnaryCall<Service, v1::GetLayerRequest, v1::GetLayerResponse>::Serve(
        &inspection_, &Service::RequestGetLayer, queue_.get(), &unary_calls_,
        [this](const auto& request, auto* response) {
          const core::GroupId id = ToGroupId(request.job(), request.group());
          const auto layer = coordinator_.GetLayer(id, request.layer());
          if (!layer.ok()) {
            const bool group_known = coordinator_.GetGroup(id, now_).ok();
            return ToGrpc(layer.status(), group_known ? core::kLayerUnknown : core::kGroupUnknown);
          }
          ToProto(*layer, response);
          return grpc::Status::OK;
        });
  }

  // ---- Frames, slice by slice
  void Refuse(WorkerStream* stream, const core::Error& error) {
    log_.OnStreamClosed(error, now_);
    sessions_[stream->id()].frame.reset();
    Deliver(core::StreamClosed{stream->id()});
    CloseStream(stream, ToGrpc(error));
  }

  // As many contributions as cannot bring forth more than max_turn_bytes of results.
  SliceLimits SliceOf(const Session& session) const {
    const core::FrameReceived& head = session.frame->head();
    size_t longest = session.lane == nullptr ? 0 : coordinator_.LongestResult(session.lane->id);
    for (const core::LayerSpec& layer : head.layers) longest = std::max(longest, core::LongestResult(layer));
    if (head.join.has_value()) {
      for (const core::LayerSpec& layer : head.join->layers) longest = std::max(longest, core::LongestResult(layer));
    }
    // A number may take 9 bytes of a contribution, and 8 of a result; and some bytes more are not yet malformed.
    constexpr size_t kShortest = size_t{64} << 10;
    SliceLimits slice;
    slice.contributions =
        std::clamp<size_t>(options_.limits.max_turn_bytes / std::max<size_t>(longest, 1), 1, slice.contributions);
    slice.longest_contribution = std::max(kShortest, longest / 8 * 9 + kShortest);
    return slice;
  }

  void HandleSlice(WorkerStream* stream) {
    Session& session = sessions_[stream->id()];
    // A join does not wait: it may come in place of the stream that lags.
    const bool joins = !session.frame->begun() && session.frame->head().join.has_value();
    if (session.lane != nullptr && session.lane->lagging != 0 && !joins) {
      return session.lane->waiting.push_back(stream->id());
    }
    FrameArena arena;
    core::FrameReceived event;
    event.stream = stream->id();
    if (auto error = session.frame->Next(session.slice, arena.get(), &event)) return Refuse(stream, *error);
    for (const core::Contribution& contribution : event.contributions) {
      session.unanswered.insert(Fingerprint(contribution.key));
    }
    const bool done = session.frame->done();
    const bool silent = done && !event.blocked_on.empty();
    if (done) session.frame.reset();
    Deliver(event);
    if (stream->closed()) {
      session.frame.reset();
    } else if (!done) {
      AddToBacklog(*session.lane, stream->id());  // Without a lane it has not joined, and was closed.
    } else if (silent && !session.answered_since_read) {
      // Writing before reading spares the transport a packet (a window update of its own), so the read of a worker that
      // waits for an answer waits for it too.
      session.silent = true;
      session.silent_until = now_ + kLongestSilence;
      SetSilenceTimer(stream->id(), session);
    } else {
      ReadNext(session);
    }
  }

  void AddToBacklog(Lane& lane, core::StreamId id) {
    if (lane.backlog.empty()) turns_.push_back(&lane);
    lane.backlog.push_back(id);
  }

  // The groups take turns: one slice of a group's, however many streams it has that wait.
  void ServeBacklog() {
    quiet_polls_ = 0;
    if (turns_.empty()) return;
    Lane* const lane = turns_.front();
    turns_.pop_front();
    const core::StreamId id = lane->backlog.front();
    lane->backlog.pop_front();
    if (!lane->backlog.empty()) turns_.push_back(lane);
    const auto it = sessions_.find(id);
    if (it != sessions_.end() && it->second.frame != nullptr && !it->second.stream->closed()) {
      HandleSlice(it->second.stream.get());
    }
    backlog_served_ = clock_.Now();
  }

  // ---- Readers that lag
  void EnterLane(Session& session, const core::GroupId& id) {
    std::unique_ptr<Lane>& lane = lanes_[id];
    if (lane == nullptr) {
      lane = std::make_unique<Lane>();
      lane->id = id;
    }
    ++lane->sessions;
    session.lane = lane.get();
  }

  void LeaveLane(Session& session) {
    Lane* const lane = std::exchange(session.lane, nullptr);
    if (lane == nullptr) return;
    if (std::exchange(session.lags, false)) StopLagging(*lane);
    if (--lane->sessions != 0) return;
    turns_.erase(std::remove(turns_.begin(), turns_.end(), lane), turns_.end());
    lanes_.erase(core::GroupId(lane->id));
  }

  // The stream may lag now, or no longer. A worker that sends faster than it reads, or than another of its group does,
  // waits.
  void NoteLag(Session& session) {
    if (session.lane == nullptr) return;
    const size_t bound = options_.max_unread_bytes / (session.lags ? 4 : 2);
    const bool lags = !session.stream->closed() && session.stream->unread_bytes() > bound;
    if (lags == session.lags) return;
    session.lags = lags;
    Deliver(core::ReaderLags{session.stream->id(), lags});
    if (lags) {
      ++session.lane->lagging;
      SetLagTimer(session);
    } else {
      StopLagging(*session.lane);
    }
  }

  void StopLagging(Lane& lane) {
    if (--lane.lagging != 0) return;
    for (const core::StreamId id : std::exchange(lane.waiting, {})) {
      const auto it = sessions_.find(id);
      if (it == sessions_.end()) continue;
      if (it->second.frame != nullptr) {
        AddToBacklog(lane, id);
      } else {
        it->second.stream->ReadNext();
      }
    }
  }

  // ---- The engine's effects
  void Deliver(const core::Event& event) {
    for (const core::Effect& effect : coordinator_.On(event, now_)) {
      std::visit([this](const auto& e) { Apply(e); }, effect);
    }
  }

  void Apply(const core::SendJoined& joined) {
    v1::MasterFrame frame;
    ToProto(joined, options_.description, frame.mutable_joined());
    Send({joined.stream}, frame);
  }

  void Apply(const core::SendResults& results) {
    for (size_t begin = 0; begin < results.outcomes.size();) {
      FrameArena arena;
      auto* const frame = arena.Create<v1::MasterFrame>();
      std::vector<size_t> answered;
      size_t bytes = 0;
      size_t end = begin;
      do {
        const core::RoundOutcome& outcome = *results.outcomes[end];
        bytes += ResultBytes(outcome);
        ToProto(outcome, frame->add_results());
        answered.push_back(Fingerprint(outcome.key));
        ++end;
      } while (end < results.outcomes.size() && bytes + ResultBytes(*results.outcomes[end]) <= kMostResultBytes);
      Send(results.streams, *frame, answered);
      begin = end;
    }
  }

  void Apply(const core::SendLayerError& error) {
    v1::MasterFrame frame;
    ToProto(error, frame.add_layer_errors());
    Send(error.streams, frame);
  }

  void Apply(const core::SendMembership& change) {
    v1::MasterFrame frame;
    ToProto(change.membership, frame.mutable_membership());
    Send(change.streams, frame);
  }

  void Apply(const core::SendLateRounds& late) {
    log_.OnLateRounds(late, now_);
    if (late.streams.empty()) return;
    v1::MasterFrame frame;
    for (const core::LateRound& round : late.rounds) ToProto(round, frame.add_late_rounds());
    Send(late.streams, frame);
  }

  void Apply(const core::CloseStream& close) {
    if (WorkerStream* const stream = Find(close.stream)) {
      if (close.error.has_value()) log_.OnStreamClosed(*close.error, now_);
      CloseStream(stream, close.error.has_value() ? ToGrpc(*close.error) : grpc::Status::OK);
    }
  }

  void Apply(const core::RoundEnded& ended) {
    log_.OnRoundEnded(ended, now_);
    if (watchers_.size() <= 1) return;  // The one that waits for its call.
    v1::WatchRoundsResponse event;
    ToProto(ended, now_, &event);
    for (auto& [address, watcher] : watchers_) {
      if (!(watcher->group() == ended.group)) continue;
      if (watcher->layer().empty() || watcher->layer() == event.key().layer()) watcher->Send(event);
    }
  }

  void Apply(const core::GroupEnded& ended) {
    for (auto& [address, watcher] : watchers_) {
      if (watcher->group() == ended.group) watcher->Close(grpc::Status::OK);
    }
  }

  // `answered`: fingerprints of the rounds whose outcomes are in the frame.
  void Send(const std::vector<core::StreamId>& streams, const v1::MasterFrame& frame,
            const std::vector<size_t>& answered = {}) {
    // All are written to before the first is read from: the last worker waits for what is done before its write.
    std::optional<grpc::ByteBuffer> bytes;
    const size_t size = frame.ByteSizeLong();
    for (const core::StreamId id : streams) {
      WorkerStream* const stream = Find(id);
      if (stream == nullptr || !stream->Admits(size)) continue;
      if (!bytes.has_value()) bytes = SerializeToBuffer(frame);
      stream->Send(*bytes);
    }
    for (const core::StreamId id : streams) {
      const auto it = sessions_.find(id);
      if (it == sessions_.end()) continue;
      Session& session = it->second;
      NoteLag(session);
      if (answered.empty()) continue;
      session.answered_since_read = true;
      for (const size_t fingerprint : answered) session.unanswered.erase(fingerprint);
      if (std::exchange(session.silent, false)) ReadNext(session);
      if (session.half_closed && session.unanswered.empty()) retiring_.push_back(id);
    }
  }

  WorkerStream* Find(uint64_t id) {
    const auto it = sessions_.find(id);
    return it == sessions_.end() ? nullptr : it->second.stream.get();
  }

  void CloseStream(WorkerStream* stream, const grpc::Status& status) {
    if (stream->closed()) return;
    timers_.insert({now_ + kCloseTimeout, TimerKind::kClose, stream->id()});
    stream->Close(status);
    NoteLag(sessions_[stream->id()]);  // Nobody waits for what it leaves unread from here on.
  }

  // The worker has had all that it waited for, and will send nothing more.
  void Retire(WorkerStream* stream) {
    Deliver(core::StreamClosed{stream->id()});
    CloseStream(stream, grpc::Status::OK);
  }

  // ---- Time
  absl::Time NextWakeUp() const {
    const absl::Time engine = coordinator_.NextDeadline();
    return timers_.empty() ? engine : std::min(engine, std::get<0>(*timers_.begin()));
  }

  void RunTimers() {
    if (coordinator_.NextDeadline() <= now_) Deliver(core::TimePassed{});
    while (!timers_.empty() && std::get<0>(*timers_.begin()) <= now_) {
      const auto [time, kind, id] = *timers_.begin();
      timers_.erase(timers_.begin());
      if (const auto it = sessions_.find(id); it != sessions_.end()) RunTimer(kind, it->second);
    }
    for (const core::StreamId id : std::exchange(retiring_, {})) {
      if (WorkerStream* const stream = Find(id)) Retire(stream);
    }
  }

  void ReadNext(Session& session) {
    if (session.lane != nullptr && session.lane->lagging != 0) {
      session.lane->waiting.push_back(session.stream->id());
    } else {
      session.stream->ReadNext();
    }
  }

  void SetLagTimer(Session& session) {
    if (std::exchange(session.lag_timer_set, true)) return;
    session.written_then = session.stream->written();
    timers_.insert({now_ + kLagTimeout, TimerKind::kLag, session.stream->id()});
  }

  // At most one for each stream. A timer for each frame would wake the loop for every one of them, though hardly any
  // silence lasts as long.
  void SetSilenceTimer(uint64_t id, Session& session) {
    if (std::exchange(session.silence_timer_set, true)) return;
    timers_.insert({session.silent_until, TimerKind::kSilence, id});
  }

  void RunTimer(TimerKind kind, Session& session) {
    switch (kind) {
      case TimerKind::kJoin:
        if (session.joined) return;
        CloseStream(session.stream.get(),
                    ToGrpc(core::MakeError(
                        absl::StatusCode::kInvalidArgument, core::kJoinRequired,
                        absl::StrCat("no join arrived within ", absl::FormatDuration(options_.join_timeout)))));
        return;
      case TimerKind::kSilence:
        session.silence_timer_set = false;
        if (session.silent && now_ < session.silent_until) {
          SetSilenceTimer(session.stream->id(), session);
        } else if (std::exchange(session.silent, false)) {
          ReadNext(session);
        }
        return;
      case TimerKind::kLag:
        session.lag_timer_set = false;
        if (!session.lags) return;
        if (session.stream->written() == session.written_then) return session.stream->Cancel();
        SetLagTimer(session);
        return;
      case TimerKind::kClose:
        session.stream->Cancel();
        return;
    }
  }

  void OnShutdown(bool) {
    shutting_down_ = true;
    health_.EndServing();
    Deliver(core::Shutdown{});
  }

  void OnStop(bool) { stopping_ = true; }

  void OnListening(bool) {
    listening_told_ = true;
    health_.SetListening(listening_);
  }

  // The server's Shutdown does not wait for calls whose connection has gone: they are still here, and whoever begins an
  // operation on a queue that has been shut down is aborted. So it is shut down here, after the last of them.
  void EndIfIdle() {
    if (!stopping_ || !sessions_.empty() || !watchers_.empty() || !health_.idle() || unary_calls_ != 0) return;
    stopping_ = false;
    queue_->Shutdown();
  }

  const LoopOptions options_;
  StatisticsAsyncService statistics_;
  InspectionAsyncService inspection_;
  HealthService health_{{v1::StatisticsService::service_full_name(), v1::InspectionService::service_full_name()}};
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  core::Coordinator coordinator_;
  EventLog log_;
  const Clock clock_;
  absl::Time now_ = clock_.Now();
  uint64_t next_stream_ = 1;
  absl::flat_hash_map<uint64_t, Session> sessions_;
  absl::flat_hash_map<Watcher*, std::unique_ptr<Watcher>> watchers_;
  absl::btree_set<std::tuple<absl::Time, TimerKind, uint64_t>> timers_;
  absl::flat_hash_map<core::GroupId, std::unique_ptr<Lane>> lanes_;
  std::deque<Lane*> turns_;  // Those with a backlog, each once.
  absl::Time backlog_served_ = now_;
  int quiet_polls_ = 0;
  std::vector<core::StreamId> retiring_;
  int unary_calls_ = 0;  // That are being served or waited for.
  MethodTag<Impl> shutdown_tag_, stop_tag_, listening_tag_;
  grpc::Alarm shutdown_alarm_, stop_alarm_, listening_alarm_;
  std::atomic<bool> listening_{true};
  std::atomic<bool> listening_told_{true};  // No alarm is on its way.
  bool shutting_down_ = false;
  bool stopping_ = false;
};

MasterLoop::MasterLoop(LoopOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
MasterLoop::~MasterLoop() = default;

void MasterLoop::Register(grpc::ServerBuilder* builder) { impl_->Register(builder); }
void MasterLoop::Start() {
  impl_->AwaitCalls();
  thread_ = std::thread([this] { impl_->Run(); });
}
void MasterLoop::SetListening(bool listening) { impl_->SetListening(listening); }
void MasterLoop::BeginShutdown() { impl_->BeginShutdown(); }
void MasterLoop::Stop() {
  impl_->BeginStop();
  thread_.join();
}

}  // namespace syncbn::rpc
