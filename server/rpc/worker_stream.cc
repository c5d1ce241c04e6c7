#include "server/rpc/worker_stream.h"

#include <string>
#include <utility>
#include <vector>

#include "grpc/grpc_security_constants.h"
#include "grpcpp/security/auth_context.h"
#include "server/rpc/connections.h"

namespace syncbn::rpc {

WorkerStream::WorkerStream(core::StreamId id, Handler* handler, size_t max_unread_bytes,
                           StatisticsAsyncService* service, grpc::ServerCompletionQueue* queue)
    : id_(id), handler_(handler), max_unread_bytes_(max_unread_bytes) {
  Await(
      [&](auto* context, auto* stream, void* tag) { service->RequestSynchronize(context, stream, queue, queue, tag); });
}

void WorkerStream::OnStart() {
  handler_->OnAccepted(this);
  ReadNext();
}

void WorkerStream::OnRead(bool ok) {
  if (ok) {
    handler_->OnFrame(this, std::exchange(incoming_, grpc::ByteBuffer()));
  } else {
    handler_->OnHalfClosed(this);
  }
}

std::string WorkerStream::peer() const { return PeerName(context().peer()); }

PeerNames WorkerStream::names() const {
  const auto find = [auth = context().auth_context()](const char* property) {
    std::vector<std::string> values;
    for (const grpc::string_ref& value : auth->FindPropertyValues(property))
      values.emplace_back(value.data(), value.size());
    return values;
  };
  return {find(GRPC_PEER_DNS_PROPERTY_NAME), find(GRPC_PEER_URI_PROPERTY_NAME)};
}

bool WorkerStream::Admits(size_t bytes) {
  cut_off_ = cut_off_ || unread_bytes_ + bytes > max_unread_bytes_;
  return open() && !cut_off_;
}

void WorkerStream::Send(const grpc::ByteBuffer& frame, UnreadBytes::Charge charge) {
  unread_bytes_ += frame.Length();
  charges_.push_back(std::move(charge));
  Queue(frame);
}

void WorkerStream::OnWritten() {
  ++written_;
  handler_->OnWritten(this);
}

void WorkerStream::OnEnded() {
  if (!closed()) handler_->OnBroken(this);
}

}  // namespace syncbn::rpc
