#include "server/rpc/inspection.h"

#include <cstdint>
#include <string>
#include <utility>

#include "grpcpp/support/async_stream.h"
#include "server/core/error.h"
#include "server/rpc/convert.h"
#include "server/rpc/status.h"
#include "server/rpc/stream_call.h"
#include "server/rpc/unary_call.h"

namespace syncbn::rpc {

// One WatchRounds call. Holds at most a thousand events for a watcher that does not read, then drops the newest.
class InspectionService::Watcher final
    : public StreamCall<grpc::ServerAsyncWriter<v1::WatchRoundsResponse>, v1::WatchRoundsResponse> {
 public:
  explicit Watcher(InspectionService* owner) : owner_(owner) {
    Await([this](auto* context, auto* stream, void* tag) {
      owner_->service_.RequestWatchRounds(context, &request_, stream, owner_->queue_, owner_->queue_, tag);
    });
  }

  // Returns whether the call has come and asks for the group's rounds.
  bool Watches(const core::GroupId& group) const { return called_ && group_ == group; }
  const core::GroupId& group() const { return group_; }
  const std::string& layer() const { return request_.layer(); }

  void Tell(const v1::WatchRoundsResponse& event) {
    constexpr size_t kMaxEvents = 1000;
    if (!open()) return;
    if (queued() >= kMaxEvents) {
      ++dropped_;
      return;
    }
    v1::WatchRoundsResponse told = event;
    told.set_dropped(std::exchange(dropped_, 0));
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
  bool called_ = false;
};

InspectionService::InspectionService(const core::Coordinator& coordinator, const Clock& clock, size_t max_watchers,
                                     const state::Writer* state_writer)
    : coordinator_(coordinator), clock_(clock), max_watchers_(max_watchers), state_writer_(state_writer) {}

InspectionService::~InspectionService() = default;

void InspectionService::Serve(grpc::ServerCompletionQueue* queue, int* live_calls) {
  queue_ = queue;
  const auto serve = [&](auto method, auto answer) {
    ServeUnary(&service_, method, queue, live_calls,
               [this, answer](const auto& request, auto* response) { return (this->*answer)(request, response); });
  };
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

void InspectionService::Admit(Watcher& watcher) {
  const size_t watching = watchers_.size();
  AwaitWatcher();
  if (absl::Status found = coordinator_.GetGroup(watcher.group(), clock_.Now()).status(); !found.ok()) {
    watcher.Close(ToGrpc(found, core::kGroupUnknown));
  } else if (watching > max_watchers_) {
    watcher.Close(ToGrpc(core::LimitError(watching, "watchers", "max_watchers", max_watchers_)));
  }
}

void InspectionService::OnRoundEnded(const core::RoundEnded& ended, absl::Time now) {
  if (watchers_.size() <= 1) return;  // The one that waits for its call.
  v1::WatchRoundsResponse event;
  ToProto(ended, now, &event);
  for (auto& [address, watcher] : watchers_) {
    if (!watcher->Watches(ended.group)) continue;
    if (watcher->layer().empty() || watcher->layer() == event.key().layer()) watcher->Tell(event);
  }
}

void InspectionService::OnGroupEnded(const core::GroupEnded& ended) {
  for (auto& [address, watcher] : watchers_) {
    if (watcher->Watches(ended.group)) watcher->Close(grpc::Status::OK);
  }
}

grpc::Status InspectionService::ListGroups(const v1::ListGroupsRequest&, v1::ListGroupsResponse* response) const {
  for (const core::GroupSummary& group : coordinator_.ListGroups()) ToProto(group, response->add_groups());
  if (state_writer_ != nullptr) {
    const bool pending = coordinator_.journal().has_changes() || !state_writer_->idle();
    ToProto(state_writer_->status(), pending, response->mutable_state());
  }
  return grpc::Status::OK;
}

grpc::Status InspectionService::GetGroup(const v1::GetGroupRequest& request, v1::GetGroupResponse* response) const {
  const auto view = coordinator_.GetGroup(ToGroupId(request.job(), request.group()), clock_.Now());
  if (!view.ok()) return ToGrpc(view.status(), core::kGroupUnknown);
  ToProto(*view, response);
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
