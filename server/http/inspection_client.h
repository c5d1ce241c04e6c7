// A master's answers to InspectionService and health, for the pages about it.

#ifndef SYNCBN_SERVER_HTTP_INSPECTION_CLIENT_H_
#define SYNCBN_SERVER_HTTP_INSPECTION_CLIENT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/channel.h"
#include "syncbn/v1/inspection.grpc.pb.h"

namespace syncbn::http {

// The parts of a group that an answer has beside its summary, config and statistics.
using ReadMask = std::vector<std::string>;

// Each call waits for its answer for two seconds at most.
//
// Errors: DEADLINE_EXCEEDED (the master does not answer), UNAVAILABLE (it is shutting down), and what InspectionService
// says.
// Thread safety: any thread may call any method.
class InspectionClient {
 public:
  explicit InspectionClient(std::shared_ptr<grpc::Channel> channel);

  absl::StatusOr<v1::GetMasterResponse> GetMaster() const;
  absl::StatusOr<v1::ListGroupsResponse> ListGroups() const;
  absl::StatusOr<v1::GetGroupResponse> GetGroup(const std::string& job, const std::string& group,
                                                const ReadMask& mask) const;
  absl::StatusOr<v1::ListLayersResponse> ListLayers(const std::string& job, const std::string& group) const;
  absl::StatusOr<v1::GetLayerResponse> GetLayer(const std::string& job, const std::string& group,
                                                const std::string& layer) const;
  // Returns: OK if workers can connect.
  absl::Status CheckReady() const;

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InspectionService::Stub> stub_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_INSPECTION_CLIENT_H_
