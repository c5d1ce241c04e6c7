#include "server/http/inspection_client.h"

#include <chrono>
#include <utility>

#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/client_context.h"

namespace syncbn::http {
namespace {

constexpr std::chrono::seconds kPatience{2};

// Calls `method` (context, request, response), which returns a grpc::Status.
template <typename Response, typename Request, typename Method>
absl::StatusOr<Response> Call(const Request& request, Method method) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  Response response;
  const grpc::Status status = method(&context, request, &response);
  if (status.ok()) return response;
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace

InspectionClient::InspectionClient(std::shared_ptr<grpc::Channel> channel)
    : channel_(std::move(channel)), stub_(v1::InspectionService::NewStub(channel_)) {}

absl::StatusOr<v1::GetMasterResponse> InspectionClient::GetMaster() const {
  return Call<v1::GetMasterResponse>(v1::GetMasterRequest(),
                                     [this](auto* context, const auto& request, auto* response) {
                                       return stub_->GetMaster(context, request, response);
                                     });
}

absl::StatusOr<v1::ListGroupsResponse> InspectionClient::ListGroups() const {
  return Call<v1::ListGroupsResponse>(v1::ListGroupsRequest(),
                                      [this](auto* context, const auto& request, auto* response) {
                                        return stub_->ListGroups(context, request, response);
                                      });
}

absl::StatusOr<v1::GetGroupResponse> InspectionClient::GetGroup(const std::string& job, const std::string& group,
                                                                const ReadMask& mask) const {
  v1::GetGroupRequest request;
  request.set_job(job);
  request.set_group(group);
  request.mutable_read_mask()->add_paths("summary");  // An empty mask stands for all parts.
  for (const std::string& part : mask) request.mutable_read_mask()->add_paths(part);
  return Call<v1::GetGroupResponse>(
      request, [this](auto* context, const auto& r, auto* response) { return stub_->GetGroup(context, r, response); });
}

absl::StatusOr<v1::ListLayersResponse> InspectionClient::ListLayers(const std::string& job,
                                                                    const std::string& group) const {
  v1::ListLayersRequest request;
  request.set_job(job);
  request.set_group(group);
  return Call<v1::ListLayersResponse>(request, [this](auto* context, const auto& r, auto* response) {
    return stub_->ListLayers(context, r, response);
  });
}

absl::StatusOr<v1::GetLayerResponse> InspectionClient::GetLayer(const std::string& job, const std::string& group,
                                                                const std::string& layer) const {
  v1::GetLayerRequest request;
  request.set_job(job);
  request.set_group(group);
  request.set_layer(layer);
  return Call<v1::GetLayerResponse>(
      request, [this](auto* context, const auto& r, auto* response) { return stub_->GetLayer(context, r, response); });
}

absl::Status InspectionClient::CheckReady() const {
  const auto stub = grpc::health::v1::Health::NewStub(channel_);
  const auto answer = Call<grpc::health::v1::HealthCheckResponse>(
      grpc::health::v1::HealthCheckRequest(),
      [&stub](auto* context, const auto& request, auto* response) { return stub->Check(context, request, response); });
  if (!answer.ok()) return answer.status();
  if (answer->status() == grpc::health::v1::HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::FailedPreconditionError("the master is shutting down, or one of its listening sockets does not work");
}

}  // namespace syncbn::http
