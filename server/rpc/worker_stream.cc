#include "server/rpc/worker_stream.h"

#include <optional>
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
  peer_ = PeerName(context().peer());
  handler_->OnAccepted(this);
  ReadNext();
}

void WorkerStream::OnRead(bool ok) {
  if (ok) {
    grpc::ByteBuffer frame;
    frame.Swap(&incoming_);
    handler_->OnFrame(this, std::move(frame));
  } else {
    handler_->OnHalfClosed(this);
  }
}

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

void WorkerStream::Send(std::shared_ptr<const grpc::ByteBuffer> frame, UnreadBytes::Charge charge) {
  unread_bytes_ += frame->Length();
  if (segment_ == nullptr || !std::exchange(answered_, true)) {
    charges_.push_back(std::move(charge));
    return Queue(std::move(frame));
  }
  shared_charges_.push_back(std::move(charge));
  segment_->Queue(std::move(frame));
  SendShared();
}

void WorkerStream::OnClosing() {
  if (segment_ != nullptr) segment_->AnnounceEnd();
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

std::string WorkerStream::offer() const {
  const auto& metadata = context().client_metadata();
  const auto found = metadata.find(kSharedMemoryHeader);
  return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
}

void WorkerStream::Share(std::unique_ptr<SharedSegment> segment, const std::string& answer) {
  segment_ = std::move(segment);
  AddHeader(kSharedMemoryHeader, answer);
}

void WorkerStream::ReadNext() {
  if (segment_ == nullptr) return Read(&incoming_);
  reading_ = true;
  if (segment_->HasBytes()) segment_->RingMaster();
}

bool WorkerStream::SendShared() {
  if (segment_->queued() == 0) return false;
  const uint64_t before = written_;
  while (segment_->queued() != 0) {
    const std::optional<size_t> sent = segment_->Send();
    if (!sent.has_value()) break;
    unread_bytes_ -= *sent;
    shared_charges_.pop_front();
    ++written_;
  }
  segment_->RingWorker();
  if (!segment_->fault().empty() && !fault_told_) segment_->RingMaster();  // For Poll to tell.
  return written_ != before;
}

bool WorkerStream::Poll() {
  const bool sent = segment_->HasRoom() && SendShared();
  if (sent) handler_->OnWritten(this);
  if (sent && closed()) EndIfDue();
  if (!open()) return sent;
  grpc::ByteBuffer frame;
  const bool received = reading_ && segment_->Receive(&frame);
  if (!segment_->fault().empty()) {
    if (std::exchange(fault_told_, true)) return sent;
    handler_->OnFault(this, segment_->fault());
    return true;
  }
  if (!received) return sent;
  reading_ = false;
  handler_->OnFrame(this, std::move(frame));
  return true;
}

// ---- Ends -----------------------------------------------------------------------------------------------------------

void WorkerStream::OnWritten() {
  ++written_;
  handler_->OnWritten(this);
}

void WorkerStream::OnEnded() {
  if (!closed()) handler_->OnBroken(this);
}

}  // namespace syncbn::rpc
