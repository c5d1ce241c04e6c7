#include "server/rpc/worker_stream.h"

#include <utility>

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

bool WorkerStream::Admits(size_t bytes) {
  cut_off_ = cut_off_ || unread_bytes_ + bytes > max_unread_bytes_;
  return open() && !cut_off_;
}

void WorkerStream::Send(const grpc::ByteBuffer& frame) {
  unread_bytes_ += frame.Length();
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
