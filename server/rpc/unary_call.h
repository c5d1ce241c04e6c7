// Unary calls on a completion queue, answered at once.

#ifndef SYNCBN_SERVER_RPC_UNARY_CALL_H_
#define SYNCBN_SERVER_RPC_UNARY_CALL_H_

#include <functional>
#include <type_traits>
#include <utility>

#include "grpcpp/completion_queue.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/async_unary_call.h"
#include "server/rpc/event_loop.h"

namespace syncbn::rpc {

template <typename Service, typename Request, typename Response>
using UnaryMethod = void (Service::*)(grpc::ServerContext*, Request*, grpc::ServerAsyncResponseWriter<Response>*,
                                      grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*);

// One call, and the wait for it. Deletes itself.
template <typename Service, typename Request, typename Response>
class UnaryCall final : public Tag {
 public:
  using Method = UnaryMethod<Service, Request, Response>;
  using Answer = std::function<grpc::Status(const Request&, Response*)>;

  static void Await(Service* service, Method method, grpc::ServerCompletionQueue* queue, int* live, Answer answer) {
    auto* const call = new UnaryCall(service, method, queue, live, std::move(answer));
    (service->*method)(&call->context_, &call->request_, &call->writer_, queue, queue, static_cast<Tag*>(call));
  }

  void Proceed(bool ok) override {
    if (!ok || answered_) {
      delete this;
      return;
    }
    Await(service_, method_, queue_, live_, answer_);
    answered_ = true;
    Response response;
    const grpc::Status status = answer_(request_, &response);
    if (status.ok()) {
      writer_.Finish(response, status, static_cast<Tag*>(this));
    } else {
      writer_.FinishWithError(status, static_cast<Tag*>(this));
    }
  }

 private:
  UnaryCall(Service* service, Method method, grpc::ServerCompletionQueue* queue, int* live, Answer answer)
      : service_(service), method_(method), queue_(queue), live_(live), answer_(std::move(answer)), writer_(&context_) {
    ++*live_;
  }
  ~UnaryCall() override { --*live_; }

  Service* const service_;
  const Method method_;
  grpc::ServerCompletionQueue* const queue_;
  int* const live_;
  const Answer answer_;
  grpc::ServerContext context_;
  Request request_;
  grpc::ServerAsyncResponseWriter<Response> writer_;
  bool answered_ = false;
};

// Serves one method for as long as the queue lives: `answer` (const Request&, Response*) returns a grpc::Status, on the
// queue's thread. `live` counts the calls that exist, the one that is waited for among them.
template <typename Service, typename Request, typename Response, typename Answer>
void ServeUnary(std::common_type_t<Service>* service, UnaryMethod<Service, Request, Response> method,
                grpc::ServerCompletionQueue* queue, int* live, Answer answer) {
  UnaryCall<Service, Request, Response>::Await(service, method, queue, live, std::move(answer));
}

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_UNARY_CALL_H_
