// syncbn.v1.InspectionService: what can be seen of the engine from outside.

#ifndef SYNCBN_SERVER_RPC_INSPECTION_H_
#define SYNCBN_SERVER_RPC_INSPECTION_H_

#include <cstddef>
#include <memory>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_builder.h"
#include "plumbing/clock.h"
#include "server/core/coordinator.h"
#include "server/rpc/loop_options.h"
#include "server/rpc/sessions.h"
#include "server/rpc/unary_calls.h"
#include "server/state/writer.h"
#include "syncbn/v1/inspection.grpc.pb.h"

namespace syncbn::rpc {

// Thread safety: none; it lives on the thread that drives the queue, once Serve was called.
class InspectionService {
 public:
  // The coordinator's times are those of `clock`. What is referred to must outlive the object.
  InspectionService(const core::Coordinator& coordinator, const Sessions& sessions, const Clock& clock,
                    const LoopOptions& options);
  ~InspectionService();
  InspectionService(const InspectionService&) = delete;
  InspectionService& operator=(const InspectionService&) = delete;

  void Register(grpc::ServerBuilder* builder) { builder->RegisterService(&service_); }
  // Waits for calls. `calls` keeps account of them.
  void Serve(grpc::ServerCompletionQueue* queue, UnaryCalls* calls);
  // Waits for no further watcher.
  void EndServing() { serving_ = false; }
  // Returns whether no WatchRounds call is being served or waited for.
  bool idle() const { return watchers_.empty(); }

  void SetListening(bool listening) { listening_ = listening; }
  // Tells the watchers of the group and the layer. Ends the calls of those that have lost events for 5 s: others may
  // want their places.
  void OnRoundEnded(const core::RoundEnded& ended, absl::Time now);
  // Ends the calls of the group's watchers.
  void OnGroupEnded(const core::GroupEnded& ended);

 private:
  class Watcher;
  using AsyncService = v1::InspectionService::AsyncService;

  void AwaitWatcher();
  // Returns OK if the caller may see anything.
  grpc::Status CheckCaller(const grpc::ServerContext& context) const;
  // Closes the watcher's call if it may not be served, if there is no such group, or no room.
  void Admit(Watcher& watcher);
  // Returns OK if there is such a group.
  absl::Status Find(const core::GroupId& group) const;

  grpc::Status GetMaster(const v1::GetMasterRequest& request, v1::GetMasterResponse* response) const;
  grpc::Status ListGroups(const v1::ListGroupsRequest& request, v1::ListGroupsResponse* response) const;
  grpc::Status GetGroup(const v1::GetGroupRequest& request, v1::GetGroupResponse* response) const;
  grpc::Status ListLayers(const v1::ListLayersRequest& request, v1::ListLayersResponse* response) const;
  grpc::Status GetLayer(const v1::GetLayerRequest& request, v1::GetLayerResponse* response) const;

  const core::Coordinator& coordinator_;
  const Sessions& sessions_;
  const Clock& clock_;
  const LoopOptions& options_;
  const absl::Time started_at_ = clock_.Now();
  AsyncService service_;
  grpc::ServerCompletionQueue* queue_ = nullptr;
  UnaryCalls* calls_ = nullptr;
  absl::flat_hash_map<Watcher*, std::unique_ptr<Watcher>> watchers_;  // One of them may wait for its call.
  bool serving_ = true;
  bool listening_ = true;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_INSPECTION_H_
