// grpc.health.v1.Health on the loop's own queue. gRPC's own implementation would start threads that poll every
// connection beside the loop, and each frame would then pass from one thread to another.

#ifndef SYNCBN_SERVER_RPC_HEALTH_H_
#define SYNCBN_SERVER_RPC_HEALTH_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_builder.h"

namespace syncbn::rpc {

// Lives on the thread that drives the queue, once Serve was called.
class HealthService {
 public:
  // The whole server, whose name is "", and `services` are serving until EndServing. Others are unknown.
  explicit HealthService(std::vector<std::string> services);
  ~HealthService();

  void Register(grpc::ServerBuilder* builder);
  // `live_calls` counts the calls that exist, those of Watch excepted.
  void Serve(grpc::ServerCompletionQueue* queue, int* live_calls);
  // No Watch call is being served or waited for.
  bool idle() const { return watches_.empty(); }
  // Everything is NOT_SERVING while nobody can connect; those who watch are told.
  void SetListening(bool listening);
  // Everything is NOT_SERVING from now on; those who watch are told, and their calls end.
  void EndServing();

 private:
  class Watch;

  // SERVICE_UNKNOWN where there is no such service.
  grpc::health::v1::HealthCheckResponse::ServingStatus StatusOf(const std::string& service) const;
  void AcceptWatch();

  absl::flat_hash_set<std::string> services_;
  grpc::health::v1::Health::AsyncService service_;
  grpc::ServerCompletionQueue* queue_ = nullptr;
  absl::flat_hash_map<Watch*, std::unique_ptr<Watch>> watches_;  // One of them waits for its call.
  bool serving_ = true;
  bool listening_ = true;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_HEALTH_H_
