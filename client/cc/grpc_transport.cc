#include "client/cc/grpc_transport.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/time/time.h"
#include "client/cc/clock.h"
#include "client/cc/credentials.h"
#include "client/cc/errors.h"
#include "plumbing/buffer_pieces.h"

namespace syncbn {
namespace {

// Finds out why a call ended. gRPC tells some causes by its text alone.
session::Break BreakOf(const grpc::Status& status) {
  using Cause = session::Break::Cause;
  const std::string& text = status.error_message();
  session::Break why;
  if (!status.error_details().empty()) {
    why.status = FromSerializedStatus(status.error_details());
  } else {
    why.status = absl::Status(static_cast<absl::StatusCode>(status.error_code()), text);
  }
  if (status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED && absl::StrContains(text, "larger than max")) {
    why.cause = Cause::kFrameTooLong;
  } else if (IsTlsRefusal(text)) {
    why.cause = Cause::kRefusedByTls;
  } else if (absl::StrContains(text, "Socket closed") || absl::StrContains(text, "reset by peer")) {
    why.cause = Cause::kClosedByPeer;
  }
  return why;
}

}  // namespace

GrpcTransport::~GrpcTransport() {
  Retire();
  if (alarm_pending_) alarm_.Cancel();
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

void GrpcTransport::Open(const std::string& target, absl::Duration connect_timeout, absl::Span<const Header> metadata) {
  Retire();
  started_ = false;
  connection_ = std::make_unique<Connection>(channels_.Open(target, connect_timeout), &queue_);
  for (const auto& [name, value] : metadata) connection_->AddMetadata(name, value);
  connection_->Start();
}

void GrpcTransport::Retire() {
  if (connection_ == nullptr) return;
  connection_->Cancel();
  if (!connection_->finishing()) connection_->Finish();
  retired_.push_back(std::move(connection_));
}

void GrpcTransport::Close() {
  if (connection_ != nullptr) connection_->Cancel();
}

bool GrpcTransport::IsUp() const { return connection_ != nullptr && started_ && !connection_->finishing(); }

bool GrpcTransport::Write(absl::Span<const Buffer> parts) {
  for (const Buffer& part : parts) {
    outgoing_.emplace_back(const_cast<uint8_t*>(part.data()), part.size(), Buffer::Drop, part.Share());
  }
  connection_->Write(grpc::ByteBuffer(outgoing_.data(), outgoing_.size()));
  outgoing_.clear();
  return false;
}

void GrpcTransport::Read() {
  if (IsUp() && !connection_->reading()) connection_->Read();
}

void GrpcTransport::Wait(absl::Time deadline) {
  if (queue_.AsyncNext(&tag_, &ok_, QueueDeadline(deadline)) != grpc::CompletionQueue::GOT_EVENT) tag_ = nullptr;
}

void GrpcTransport::Take(absl::FunctionRef<void(const Event&)> handle) {
  void* const tag = std::exchange(tag_, nullptr);
  if (tag == &alarm_) alarm_pending_ = false;
  if (tag == nullptr || tag == &alarm_) return;
  auto* const operation = static_cast<Connection::Operation*>(tag);
  Connection* const connection = operation->connection;
  connection->Ended(operation->kind);
  if (connection == connection_.get()) {
    HandleOperation(operation->kind, ok_, handle);
  } else if (connection->outstanding() == 0) {
    retired_.erase(std::find_if(retired_.begin(), retired_.end(),
                                [connection](const auto& retired) { return retired.get() == connection; }));
  }
}

void GrpcTransport::HandleOperation(Connection::Kind kind, bool ok, absl::FunctionRef<void(const Event&)> handle) {
  if (kind == Connection::Kind::kFinish) {
    const Event event{Event::Kind::kBroken, {}, BreakOf(connection_->status())};
    started_ = false;
    if (connection_->outstanding() != 0) retired_.push_back(std::move(connection_));
    connection_.reset();
    handle(event);
  } else if (!ok) {
    if (!connection_->finishing()) connection_->Finish();
    // A read fails because the call has ended. If a write fails, nobody has promised that it will: so it is ended,
    // after Finish has taken the master's status if there is one.
    if (kind == Connection::Kind::kWrite) connection_->Cancel();
  } else if (kind == Connection::Kind::kRead) {
    HandleFrame(handle);
  } else {
    started_ = true;
    handle({kind == Connection::Kind::kStart ? Event::Kind::kUp : Event::Kind::kWritten});
  }
}

void GrpcTransport::HandleFrame(absl::FunctionRef<void(const Event&)> handle) {
  grpc::ByteBuffer frame;
  frame.Swap(connection_->incoming());
  const BufferPieces parts(&frame);
  handle({Event::Kind::kFrame, parts.pieces()});
}

void GrpcTransport::Wake() {
  if (alarm_pending_) return;
  alarm_pending_ = true;
  alarm_.Set(&queue_, absl::ToChronoTime(absl::UnixEpoch()), &alarm_);
}

}  // namespace syncbn
