// grpc.health.v1.Health on the loop's own queue. gRPC's implementation would start threads that poll every connection
// beside the loop, and each frame would then pass from one thread to another.

#ifndef SYNCBN_SERVER_RPC_HEALTH_H_
#define SYNCBN_SERVER_RPC_HEALTH_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_builder.h"
#include "server/rpc/unary_calls.h"

namespace syncbn::rpc {

// Thread safety: none; it lives on the thread that drives the queue, once Serve was called.
class HealthService {
 public:
  // Reports SERVING for the whole server, whose name is "", and for `services`, until EndServing. Others are unknown.
  // `max_watches` may call Watch at a time.
  HealthService(std::vector<std::string> services, size_t max_watches);
  ~HealthService();

  void Register(grpc::ServerBuilder* builder);
  // Waits for calls. `calls` keeps account of them.
  void Serve(grpc::ServerCompletionQueue* queue, UnaryCalls* calls);
  // Returns whether no Watch call is being served or waited for.
  bool idle() const { return watches_.empty(); }
  // Reports NOT_SERVING, to watchers too, while nobody can connect.
  void SetListening(bool listening);
  // Reports NOT_SERVING from now on; watchers are told, and their calls end.
  void EndServing();

 private:
  class Watch;

  // Returns SERVICE_UNKNOWN if there is no such service.
  grpc::health::v1::HealthCheckResponse::ServingStatus StatusOf(const std::string& service) const;
  void AwaitWatch();

  const size_t max_watches_;
  absl::flat_hash_set<std::string> services_;
  grpc::health::v1::Health::AsyncService service_;
  grpc::ServerCompletionQueue* queue_ = nullptr;
  UnaryCalls* calls_ = nullptr;
  absl::flat_hash_map<Watch*, std::unique_ptr<Watch>> watches_;  // One of them may wait for its call.
  bool serving_ = true;
  bool listening_ = true;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_HEALTH_H_
