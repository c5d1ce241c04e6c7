// Calls on the completion queue: one answer, or InspectionService's stream of events.

#ifndef SYNCBN_SERVER_RPC_CALL_H_
#define SYNCBN_SERVER_RPC_CALL_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "grpcpp/completion_queue.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/async_stream.h"
#include "grpcpp/support/async_unary_call.h"
#include "server/core/types.h"
#include "server/rpc/event_loop.h"
#include "syncbn/v1/inspection.grpc.pb.h"

namespace syncbn::rpc {

using InspectionAsyncService = v1::InspectionService::AsyncService;

// Serves one method for as long as the queue lives: each call is answered at once by `answer`, on the queue's thread.
// Deletes itself.
template <typename Service, typename Request, typename Response>
class UnaryCall final : public Tag {
 public:
  using Method = void (Service::*)(grpc::ServerContext*, Request*, grpc::ServerAsyncResponseWriter<Response>*,
                                   grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*);
  using Answer = std::function<grpc::Status(const Request&, Response*)>;

  // `live` counts the calls that exist.
  static void Serve(Service* service, Method method, grpc::ServerCompletionQueue* queue, int* live, Answer answer) {
    auto* const call = new UnaryCall(service, method, queue, live, std::move(answer));
    (service->*method)(&call->context_, &call->request_, &call->writer_, queue, queue, call);
  }

  void Proceed(bool ok) override {
    if (!ok || answered_) {
      delete this;
      return;
    }
    Serve(service_, method_, queue_, live_, answer_);
    answered_ = true;
    Response response;
    const grpc::Status status = answer_(request_, &response);
    if (status.ok()) {
      writer_.Finish(response, status, this);
    } else {
      writer_.FinishWithError(status, this);
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

// One WatchRounds call. Holds at most a thousand events for a watcher that does not read, then drops the newest.
class Watcher {
 public:
  class Handler {
   public:
    virtual ~Handler() = default;
    // Someone wants to watch: the handler waits for the next watcher, and closes this one if it may not.
    virtual void OnWatch(Watcher* watcher) = 0;
    // The watcher may and should be deleted.
    virtual void OnGone(Watcher* watcher) = 0;
  };

  explicit Watcher(Handler* handler);

  void Accept(InspectionAsyncService* service, grpc::ServerCompletionQueue* queue);

  // Valid once OnWatch was called.
  const core::GroupId& group() const { return group_; }
  const std::string& layer() const { return request_.layer(); }

  void Send(const v1::WatchRoundsResponse& event);
  void Close(const grpc::Status& status);

 private:
  void OnStart(bool ok);
  void Greet();
  void OnGreeted(bool ok);
  void OnWrite(bool ok);
  void OnFinish(bool ok);
  void OnDone(bool ok);
  void WriteNext();
  void Settle();

  Handler* const handler_;
  grpc::ServerContext context_;
  v1::WatchRoundsRequest request_;
  grpc::ServerAsyncWriter<v1::WatchRoundsResponse> writer_;
  MethodTag<Watcher> start_tag_, greet_tag_, write_tag_, finish_tag_, done_tag_;
  core::GroupId group_;
  std::deque<v1::WatchRoundsResponse> events_;
  uint64_t dropped_ = 0;
  std::optional<grpc::Status> closing_;
  int outstanding_ = 0;
  bool writing_ = false;
  bool finishing_ = false;
  bool done_ = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CALL_H_
