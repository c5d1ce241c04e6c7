#include "server/rpc/health.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/support/async_stream.h"
#include "server/core/error.h"
#include "server/rpc/status.h"
#include "server/rpc/stream_call.h"
#include "server/rpc/unary_call.h"

namespace syncbn::rpc {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

// One Watch call: the status when it comes, each change, and NOT_SERVING at the end.
class HealthService::Watch final
    : public StreamCall<grpc::ServerAsyncWriter<HealthCheckResponse>, HealthCheckResponse> {
 public:
  explicit Watch(HealthService* owner) : owner_(owner) {
    Await([this](auto* context, auto* stream, void* tag) {
      owner_->service_.RequestWatch(context, &request_, stream, owner_->queue_, owner_->queue_, tag);
    });
  }

  // Tells the caller the status, unless it knows it or still has to read the one before.
  void Update() {
    if (!called_ || !open() || queued() != 0) return;
    HealthCheckResponse response;
    response.set_status(owner_->StatusOf(request_.service()));
    if (owner_->serving_ && response.status() == told_) return;
    told_ = response.status();
    Queue(std::move(response));
    if (!owner_->serving_) Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the master is shutting down"));
  }

 private:
  void OnStart() override {
    called_ = true;
    const size_t watching = owner_->watches_.size();
    owner_->calls_->Take([owner = owner_] { owner->AwaitWatch(); });
    Update();
    if (watching <= owner_->max_watches_) return;
    Close(ToGrpc(core::LimitError(watching, "watchers of health", "max_watchers", owner_->max_watches_)));
  }
  void OnWritten() override { Update(); }
  void OnGone() override { owner_->watches_.erase(this); }

  HealthService* const owner_;
  HealthCheckRequest request_;
  HealthCheckResponse::ServingStatus told_ = HealthCheckResponse::UNKNOWN;
  bool called_ = false;
};

HealthService::HealthService(std::vector<std::string> services, size_t max_watches)
    : max_watches_(max_watches), services_(services.begin(), services.end()) {
  services_.insert("");
}

HealthService::~HealthService() = default;

void HealthService::Register(grpc::ServerBuilder* builder) { builder->RegisterService(&service_); }

void HealthService::Serve(grpc::ServerCompletionQueue* queue, UnaryCalls* calls) {
  queue_ = queue;
  calls_ = calls;
  ServeUnary(&service_, &grpc::health::v1::Health::AsyncService::RequestCheck, queue, calls,
             [this](const grpc::ServerContext&, const HealthCheckRequest& request, HealthCheckResponse* response) {
               response->set_status(StatusOf(request.service()));
               if (response->status() != HealthCheckResponse::SERVICE_UNKNOWN) return grpc::Status::OK;
               return grpc::Status(grpc::StatusCode::NOT_FOUND,
                                   Brief(absl::StrCat("no service \"", request.service(), "\"")));
             });
  AwaitWatch();
}

void HealthService::SetListening(bool listening) {
  listening_ = listening;
  for (auto& [address, watch] : watches_) watch->Update();
}

void HealthService::EndServing() {
  serving_ = false;
  for (auto& [address, watch] : watches_) watch->Update();
}

HealthCheckResponse::ServingStatus HealthService::StatusOf(const std::string& service) const {
  if (!services_.contains(service)) return HealthCheckResponse::SERVICE_UNKNOWN;
  return serving_ && listening_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
}

void HealthService::AwaitWatch() {
  if (!serving_) return;
  auto watch = std::make_unique<Watch>(this);
  Watch* const address = watch.get();
  watches_.emplace(address, std::move(watch));
}

}  // namespace syncbn::rpc
