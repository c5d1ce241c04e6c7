#include "server/rpc/inspection.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/support/async_stream.h"
#include "plumbing/duration.h"
#include "server/core/error.h"
#include "server/rpc/convert.h"
#include "server/rpc/secrets.h"
#include "server/rpc/status.h"
#include "server/rpc/stream_call.h"
#include "server/rpc/unary_call.h"
#include "vocabulary/protocol_version.h"
#include "vocabulary/version.h"

namespace syncbn::rpc {
namespace {

using syncbn::ToProto;

// Returns why the mask cannot be used; nothing if it can.
std::optional<core::Error> ReadMask(const google::protobuf::FieldMask& mask, core::GroupParts* parts) {
  if (mask.paths().empty()) return std::nullopt;
  *parts = {false, false, false};
  for (const std::string& path : mask.paths()) {
    if (path == "members") {
      parts->members = true;
    } else if (path == "pending") {
      parts->pending = true;
    } else if (path == "recent" || path == "failures") {
      parts->recent = true;
    } else if (path != "summary" && path != "config" && path != "statistics") {
      return core::MalformedError(absl::StrCat("read_mask names \"", Brief(path), "\"; a group has summary, config, ",
                                               "statistics, members, pending, recent and failures"));
    }
  }
  return std::nullopt;
}

}  // namespace

// One WatchRounds call. Holds at most a thousand events for a watcher that does not read, then drops the newest. All
// watchers hold the same messages: copies for each of them take rounds of others a hundred milliseconds to delete.
class InspectionService::Watcher final : public StreamCall<grpc::ServerAsyncWriter<v1::WatchRoundsResponse>,
                                                           std::shared_ptr<const v1::WatchRoundsResponse>> {
 public:
  using Event = std::shared_ptr<const v1::WatchRoundsResponse>;

  explicit Watcher(InspectionService* owner) : owner_(owner) {
    Await([this](auto* context, auto* stream, void* tag) {
      owner_->service_.RequestWatchRounds(context, &request_, stream, owner_->queue_, owner_->queue_, tag);
    });
  }

  // Returns whether the call has come and asks for the group's rounds.
  bool Watches(const core::GroupId& group) const { return called_ && group_ == group; }
  const core::GroupId& group() const { return group_; }
  const grpc::ServerContext& caller() const { return context(); }
  const std::string& layer() const { return request_.layer(); }

  void Tell(const Event& event, absl::Time now) {
    constexpr size_t kMaxEvents = 1000;
    constexpr absl::Duration kPatience = absl::Seconds(5);
    if (!open()) return;
    if (queued() >= kMaxEvents) {
      if (dropped_++ == 0) dropping_since_ = now;
      if (now - dropping_since_ > kPatience) Cancel();
      return;
    }
    if (dropped_ == 0) {
      Queue(event);
      return;
    }
    auto told = std::make_shared<v1::WatchRoundsResponse>(*event);
    told->set_dropped(std::exchange(dropped_, 0));
    Queue(std::move(told));
  }

 private:
  void OnStart() override {
    called_ = true;
    group_ = ToGroupId(request_.job(), request_.group());
    owner_->Admit(*this);
    SendHeaders();  // They tell the watcher that it misses nothing from here on.
  }
  void OnGone() override { owner_->watchers_.erase(this); }

  InspectionService* const owner_;
  v1::WatchRoundsRequest request_;
  core::GroupId group_;
  uint64_t dropped_ = 0;
  absl::Time dropping_since_;
  bool called_ = false;
};

InspectionService::InspectionService(const core::Coordinator& coordinator, const Sessions& sessions, const Clock& clock,
                                     const LoopOptions& options)
    : coordinator_(coordinator), sessions_(sessions), clock_(clock), options_(options) {}

InspectionService::~InspectionService() = default;

void InspectionService::Serve(grpc::ServerCompletionQueue* queue, UnaryCalls* calls) {
  queue_ = queue;
  calls_ = calls;
  const auto serve = [&](auto method, auto answer) {
    ServeUnary(&service_, method, queue, calls,
               [this, answer](const grpc::ServerContext& context, const auto& request, auto* response) {
                 const grpc::Status allowed = CheckCaller(context);
                 return allowed.ok() ? (this->*answer)(request, response) : allowed;
               });
  };
  serve(&AsyncService::RequestGetMaster, &InspectionService::GetMaster);
  serve(&AsyncService::RequestListGroups, &InspectionService::ListGroups);
  serve(&AsyncService::RequestGetGroup, &InspectionService::GetGroup);
  serve(&AsyncService::RequestListLayers, &InspectionService::ListLayers);
  serve(&AsyncService::RequestGetLayer, &InspectionService::GetLayer);
  AwaitWatcher();
}

void InspectionService::AwaitWatcher() {
  if (!serving_) return;
  auto watcher = std::make_unique<Watcher>(this);
  Watcher* const address = watcher.get();
  watchers_.emplace(address, std::move(watcher));
}

grpc::Status InspectionService::CheckCaller(const grpc::ServerContext& context) const {
  const core::Secret bearer = BearerOf(context);
  if (options_.own_token.present() && bearer == options_.own_token) return grpc::Status::OK;
  if (!options_.inspection) {
    return ToGrpc(core::MakeError(absl::StatusCode::kPermissionDenied, core::kInspectionOff,
                                  "inspection is off, as it is by default where other hosts can connect; the master's "
                                  "flag --inspection on turns it on"));
  }
  if (!options_.inspection_token.present() || bearer == options_.inspection_token) return grpc::Status::OK;
  return ToGrpc(
      core::MakeError(absl::StatusCode::kUnauthenticated, core::kTokenMismatch,
                      "inspection needs the master's token in the call's metadata, as \"authorization: Bearer "
                      "TOKEN\""));
}

void InspectionService::Admit(Watcher& watcher) {
  const size_t watching = watchers_.size();
  calls_->Take([this] { AwaitWatcher(); });
  if (grpc::Status allowed = CheckCaller(watcher.caller()); !allowed.ok()) {
    watcher.Close(allowed);
  } else if (absl::Status found = Find(watcher.group()); !found.ok()) {
    watcher.Close(ToGrpc(found, core::kGroupUnknown));
  } else if (watching > options_.max_watchers) {
    watcher.Close(ToGrpc(core::LimitError(watching, "watchers", "max_watchers", options_.max_watchers)));
  }
}

absl::Status InspectionService::Find(const core::GroupId& group) const {
  constexpr core::GroupParts kNone = {false, false, false};
  return coordinator_.GetGroup(group, clock_.Now(), kNone).status();
}

void InspectionService::OnRoundEnded(const core::RoundEnded& ended, absl::Time now) {
  const auto watches = [&ended](const auto& watcher) { return watcher.first->Watches(ended.group); };
  if (std::none_of(watchers_.begin(), watchers_.end(), watches)) return;
  const auto event = std::make_shared<v1::WatchRoundsResponse>();
  ToProto(ended, now, event.get());
  for (auto& [address, watcher] : watchers_) {
    if (!watcher->Watches(ended.group)) continue;
    if (watcher->layer().empty() || watcher->layer() == event->key().layer()) watcher->Tell(event, now);
  }
}

void InspectionService::OnGroupEnded(const core::GroupEnded& ended) {
  for (auto& [address, watcher] : watchers_) {
    if (watcher->Watches(ended.group)) watcher->Close(grpc::Status::OK);
  }
}

grpc::Status InspectionService::GetMaster(const v1::GetMasterRequest&, v1::GetMasterResponse* response) const {
  response->set_version(kVersion);
  response->set_revision(options_.revision);
  response->set_grpc_version(grpc::Version());
  response->set_protocol_version(kProtocolVersion);
  ToProto(started_at_, response->mutable_started_at());
  ToProto(clock_.Now() - started_at_, response->mutable_uptime());
  response->set_listening(listening_);
  response->set_streams(static_cast<uint32_t>(sessions_.streams()));
  response->set_stream_unread_bytes_max(sessions_.most_unread_bytes());
  response->set_streams_started(sessions_.started());
  const std::array<uint64_t, 17>& handled = sessions_.handled();
  for (size_t code = 0; code < handled.size(); ++code) {
    if (handled[code] == 0) continue;
    v1::Count* const count = response->add_streams_ended();
    const std::string name = absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
    count->set_name(name);
    count->set_count(handled[code]);
  }
  ToProto(sessions_.closed(), response->mutable_streams_closed());
  return grpc::Status::OK;
}

grpc::Status InspectionService::ListGroups(const v1::ListGroupsRequest&, v1::ListGroupsResponse* response) const {
  const absl::Time now = clock_.Now();
  for (const core::GroupSummary& group : coordinator_.ListGroups()) ToProto(group, now, response->add_groups());
  if (options_.state_writer != nullptr) {
    const bool pending = coordinator_.journal().has_changes() || !options_.state_writer->idle();
    ToProto(options_.state_writer->status(), pending, response->mutable_state());
  }
  return grpc::Status::OK;
}

grpc::Status InspectionService::GetGroup(const v1::GetGroupRequest& request, v1::GetGroupResponse* response) const {
  core::GroupParts parts;
  if (auto error = ReadMask(request.read_mask(), &parts)) return ToGrpc(*error);
  const absl::Time now = clock_.Now();
  const auto view = coordinator_.GetGroup(ToGroupId(request.job(), request.group()), now, parts);
  if (!view.ok()) return ToGrpc(view.status(), core::kGroupUnknown);
  ToProto(*view, now, response);
  return grpc::Status::OK;
}

grpc::Status InspectionService::ListLayers(const v1::ListLayersRequest& request,
                                           v1::ListLayersResponse* response) const {
  const auto layers = coordinator_.ListLayers(ToGroupId(request.job(), request.group()));
  if (!layers.ok()) return ToGrpc(layers.status(), core::kGroupUnknown);
  for (const core::LayerSummary& layer : *layers) ToProto(layer, response->add_layers());
  return grpc::Status::OK;
}

grpc::Status InspectionService::GetLayer(const v1::GetLayerRequest& request, v1::GetLayerResponse* response) const {
  const core::GroupId id = ToGroupId(request.job(), request.group());
  const auto layer = coordinator_.GetLayer(id, request.layer());
  if (!layer.ok()) {
    const bool group_known = coordinator_.GetGroup(id, clock_.Now()).ok();
    return ToGrpc(layer.status(), group_known ? core::kLayerUnknown : core::kGroupUnknown);
  }
  ToProto(*layer, response);
  return grpc::Status::OK;
}

}  // namespace syncbn::rpc
