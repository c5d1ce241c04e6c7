// Unary calls on a completion queue, answered at once.

#ifndef SYNCBN_SERVER_RPC_UNARY_CALL_H_
#define SYNCBN_SERVER_RPC_UNARY_CALL_H_

#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#include "grpcpp/completion_queue.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/async_unary_call.h"
#include "server/rpc/connections.h"
#include "server/rpc/event_loop.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/unary_calls.h"

namespace syncbn::rpc {

template <typename Service, typename Request, typename Response>
using UnaryMethod = void (Service::*)(grpc::ServerContext*, Request*, grpc::ServerAsyncResponseWriter<Response>*,
                                      grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*);

// One call, and the wait for it. Deletes itself.
template <typename Service, typename Request, typename Response>
class UnaryCall final : public Tag, public UnaryCalls::Call {
 public:
  using Method = UnaryMethod<Service, Request, Response>;
  using Answer = std::function<grpc::Status(const grpc::ServerContext&, const Request&, Response*)>;

  static void Await(Service* service, Method method, grpc::ServerCompletionQueue* queue, UnaryCalls* calls,
                    Answer answer) {
    auto* const call = new UnaryCall(service, method, queue, calls, std::move(answer));
    (service->*method)(&call->context_, &call->request_, &call->writer_, queue, queue, static_cast<Tag*>(call));
  }

  void Proceed(bool ok) override {
    if (!ok || answered_) {
      delete this;
      return;
    }
    calls_->Take([service = service_, method = method_, queue = queue_, calls = calls_, answer = answer_] {
      Await(service, method, queue, calls, answer);
    });
    answered_ = true;
    calls_->NoteRequest(PeerName(context_.peer()), request_.ByteSizeLong());
    Response response;
    grpc::Status status = calls_->CheckRoom(Address());
    if (status.ok()) status = answer_(context_, request_, &response);
    if (status.ok()) status = calls_->Admit(this, Address(), response.ByteSizeLong());
    if (status.ok()) {
      writer_.Finish(response, status, static_cast<Tag*>(this));
    } else {
      writer_.FinishWithError(status, static_cast<Tag*>(this));
    }
  }

  void Cancel() override { context_.TryCancel(); }

 private:
  UnaryCall(Service* service, Method method, grpc::ServerCompletionQueue* queue, UnaryCalls* calls, Answer answer)
      : service_(service),
        method_(method),
        queue_(queue),
        calls_(calls),
        answer_(std::move(answer)),
        writer_(&context_) {
    calls_->Begin();
  }
  ~UnaryCall() override {
    calls_->Forget(this);
    calls_->End();
  }

  // The caller's, without its port; empty for a unix socket.
  std::string Address() const { return WithoutPort(PeerName(context_.peer())); }

  Service* const service_;
  const Method method_;
  grpc::ServerCompletionQueue* const queue_;
  UnaryCalls* const calls_;
  const Answer answer_;
  grpc::ServerContext context_;
  Request request_;
  grpc::ServerAsyncResponseWriter<Response> writer_;
  bool answered_ = false;
};

// Serves one method for as long as the queue lives: `answer` (const ServerContext&, const Request&, Response*) returns
// a grpc::Status, on the queue's thread. `calls` keeps account of its calls, and must outlive them.
template <typename Service, typename Request, typename Response, typename Answer>
void ServeUnary(std::common_type_t<Service>* service, UnaryMethod<Service, Request, Response> method,
                grpc::ServerCompletionQueue* queue, UnaryCalls* calls, Answer answer) {
  UnaryCall<Service, Request, Response>::Await(service, method, queue, calls, std::move(answer));
}

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_UNARY_CALL_H_
