#include "server/rpc/health.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/async_stream.h"
#include "server/rpc/call.h"
#include "server/rpc/event_loop.h"
#include "server/rpc/status.h"

namespace syncbn::rpc {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

// One Watch call: the status when it comes, and NOT_SERVING at the end.
class HealthService::Watch {
 public:
  explicit Watch(HealthService* owner)
      : owner_(owner),
        writer_(&context_),
        start_tag_(this, &Watch::OnStart),
        write_tag_(this, &Watch::OnWrite),
        finish_tag_(this, &Watch::OnFinish),
        done_tag_(this, &Watch::OnDone) {}

  void Accept() {
    context_.AsyncNotifyWhenDone(&done_tag_);
    outstanding_ = 1;
    owner_->service_.RequestWatch(&context_, &request_, &writer_, owner_->queue_, owner_->queue_, &start_tag_);
  }

  // Brings the caller up to date.
  void Update() {
    if (!started_ || writing_ || finishing_ || done_) return;
    HealthCheckResponse response;
    response.set_status(owner_->StatusOf(request_.service()));
    if (owner_->serving_ && response.status() == told_) return;
    ++outstanding_;
    if (owner_->serving_) {
      writing_ = true;
      told_ = response.status();
      writer_.Write(response, &write_tag_);
    } else {
      finishing_ = true;
      writer_.WriteAndFinish(response, grpc::WriteOptions(),
                             grpc::Status(grpc::StatusCode::UNAVAILABLE, "the master is shutting down"), &finish_tag_);
    }
  }

 private:
  void OnStart(bool ok) {
    --outstanding_;
    started_ = ok;
    done_ = !ok;  // No call came, so its end will not be told either.
    if (ok) owner_->AcceptWatch();
    Update();
    Settle();
  }

  void OnWrite(bool) {
    --outstanding_;
    writing_ = false;
    Update();
    Settle();
  }

  void OnFinish(bool) {
    --outstanding_;
    Settle();
  }

  void OnDone(bool) {
    done_ = true;
    Settle();
  }

  void Settle() {
    if (done_ && outstanding_ == 0) owner_->watches_.erase(this);
  }

  HealthService* const owner_;
  grpc::ServerContext context_;
  HealthCheckRequest request_;
  grpc::ServerAsyncWriter<HealthCheckResponse> writer_;
  MethodTag<Watch> start_tag_, write_tag_, finish_tag_, done_tag_;
  int outstanding_ = 0;  // Operations, done_tag_ excepted.
  HealthCheckResponse::ServingStatus told_ = HealthCheckResponse::UNKNOWN;
  bool started_ = false;
  bool writing_ = false;
  bool finishing_ = false;
  bool done_ = false;
};

HealthService::HealthService(std::vector<std::string> services) : services_(services.begin(), services.end()) {
  services_.insert("");
}

HealthService::~HealthService() = default;

void HealthService::Register(grpc::ServerBuilder* builder) { builder->RegisterService(&service_); }

void HealthService::Serve(grpc::ServerCompletionQueue* queue, int* live_calls) {
  queue_ = queue;
  using Service = grpc::health::v1::Health::AsyncService;
  UnaryCall<Service, HealthCheckRequest, HealthCheckResponse>::Serve(
      &service_, &Service::RequestCheck, queue_, live_calls, [this](const auto& request, auto* response) {
        response->set_status(StatusOf(request.service()));
        if (response->status() != HealthCheckResponse::SERVICE_UNKNOWN) return grpc::Status::OK;
        return grpc::Status(grpc::StatusCode::NOT_FOUND, Brief(absl::StrCat("no service \"", request.service(), "\"")));
      });
  AcceptWatch();
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

void HealthService::AcceptWatch() {
  if (!serving_) return;
  auto watch = std::make_unique<Watch>(this);
  Watch* const address = watch.get();
  watches_.emplace(address, std::move(watch));
  address->Accept();
}

}  // namespace syncbn::rpc
