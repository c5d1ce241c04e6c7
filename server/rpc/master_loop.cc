#include "server/rpc/master_loop.h"

#include <algorithm>
#include <atomic>
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
#include "google/protobuf/arena.h"
#include "grpc/slice.h"
#include "grpcpp/alarm.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "server/rpc/call.h"
#include "server/rpc/clock.h"
#include "server/rpc/convert.h"
#include "server/rpc/event_log.h"
#include "server/rpc/health.h"
#include "server/rpc/status.h"
#include "server/rpc/worker_stream.h"

namespace syncbn::rpc {
namespace {

// A worker that has promised silence is read from again after this long, should its promise not hold.
constexpr absl::Duration kLongestSilence = absl::Milliseconds(20);
// What a worker that must read before it is read from may take to read anything.
constexpr absl::Duration kCongestionTimeout = absl::Seconds(5);
// What a closed stream's last frames and status may take to be read.
constexpr absl::Duration kCloseTimeout = absl::Seconds(5);

// A frame of few channels needs nothing from the heap.
constexpr size_t kArenaBlockBytes = 4096;

grpc::ByteBuffer Serialize(const v1::MasterFrame& frame) {
  const size_t bytes = frame.ByteSizeLong();
  const grpc::Slice slice(grpc_slice_malloc(bytes), grpc::Slice::STEAL_REF);
  frame.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

size_t Fingerprint(const core::RoundKey& key) {
  return absl::Hash<std::tuple<const std::string&, uint64_t, core::Phase>>()({key.layer, key.sequence, key.phase});
}

}  // namespace

class MasterLoop::Impl final : public WorkerStream::Handler, public Watcher::Handler {
 public:
  explicit Impl(LoopOptions options)
      : options_(std::move(options)),
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
      const auto event = queue_->AsyncNext(&tag, &ok, clock_.Deadline(NextWakeUp()));
      if (event == grpc::CompletionQueue::SHUTDOWN) return;
      now_ = clock_.Now();
      if (event == grpc::CompletionQueue::GOT_EVENT) static_cast<Tag*>(tag)->Proceed(ok);
      RunTimers();
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
    alignas(8) char block[kArenaBlockBytes];
    google::protobuf::Arena arena(block, sizeof(block));
    auto* const frame = google::protobuf::Arena::CreateMessage<v1::WorkerFrame>(&arena);
    core::FrameReceived event;
    event.stream = stream->id();
    const grpc::Status parsed = grpc::SerializationTraits<v1::WorkerFrame>::Deserialize(&buffer, frame);
    std::optional<core::Error> error;
    if (!parsed.ok()) {
      error = core::MakeError(absl::StatusCode::kInvalidArgument, core::kMalformedFrame,
                              "the frame is not a syncbn.v1.WorkerFrame");
    } else {
      error = FromProto(*frame, &event);
    }
    if (error.has_value()) {
      log_.OnStreamClosed(*error, now_);
      Deliver(core::StreamClosed{stream->id()});
      CloseStream(stream, ToGrpc(*error));
      return;
    }
    Session& session = sessions_[stream->id()];
    session.joined = session.joined || event.join.has_value();
    for (const core::Contribution& contribution : event.contributions) {
      session.unanswered.insert(Fingerprint(contribution.key));
    }
    const bool silent = !event.blocked_on.empty();
    session.answered_since_read = false;
    Deliver(event);
    // Writing before reading spares the transport a packet (a window update of its own), so the read of a worker that
    // waits for an answer waits for it too.
    if (silent && !session.answered_since_read) {
      session.silent = true;
      session.silent_until = now_ + kLongestSilence;
      SetSilenceTimer(stream->id(), session);
    } else {
      ReadNext(session);
    }
  }

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

  void OnBroken(WorkerStream* stream) override { Deliver(core::StreamClosed{stream->id()}); }

  void OnGone(WorkerStream* stream) override { sessions_.erase(stream->id()); }

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
  enum class TimerKind { kJoin, kSilence, kCongestion, kClose };

  struct Session {
    std::unique_ptr<WorkerStream> stream;
    // Fingerprints of the rounds that it has contributed to and that have no outcome yet. A set, not a count: what is
    // contributed twice is answered once.
    absl::flat_hash_set<size_t> unanswered;
    bool joined = false;
    bool silent = false;  // Its next read waits for an answer, or until:
    absl::Time silent_until;
    bool silence_timer_set = false;
    bool answered_since_read = false;
    bool half_closed = false;
    bool congestion_timer_set = false;
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
    alignas(8) char block[kArenaBlockBytes];
    google::protobuf::Arena arena(block, sizeof(block));
    auto* const frame = google::protobuf::Arena::CreateMessage<v1::MasterFrame>(&arena);
    std::vector<size_t> answered;
    for (const auto& outcome : results.outcomes) {
      ToProto(*outcome, frame->add_results());
      answered.push_back(Fingerprint(outcome->key));
    }
    Send(results.streams, *frame, answered);
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
    const grpc::ByteBuffer bytes = Serialize(frame);
    // All are written to before the first is read from: the last worker waits for what is done before its write.
    for (const core::StreamId id : streams) {
      if (WorkerStream* const stream = Find(id)) stream->Send(bytes);
    }
    if (answered.empty()) return;
    for (const core::StreamId id : streams) {
      const auto it = sessions_.find(id);
      if (it == sessions_.end()) continue;
      Session& session = it->second;
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
    session.stream->ReadNext();
    if (session.stream->congested()) SetCongestionTimer(session);
  }

  void SetCongestionTimer(Session& session) {
    if (std::exchange(session.congestion_timer_set, true)) return;
    session.written_then = session.stream->written();
    timers_.insert({now_ + kCongestionTimeout, TimerKind::kCongestion, session.stream->id()});
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
      case TimerKind::kCongestion:
        session.congestion_timer_set = false;
        if (!session.stream->congested()) return;
        if (session.stream->written() == session.written_then) return session.stream->Cancel();
        SetCongestionTimer(session);
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
