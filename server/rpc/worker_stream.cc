#include "server/rpc/worker_stream.h"

#include <utility>

namespace syncbn::rpc {

WorkerStream::WorkerStream(uint64_t id, Handler* handler, size_t max_unread_bytes)
    : id_(id),
      handler_(handler),
      max_unread_bytes_(max_unread_bytes),
      call_(&context_),
      start_tag_(this, &WorkerStream::OnStart),
      read_tag_(this, &WorkerStream::OnRead),
      write_tag_(this, &WorkerStream::OnWrite),
      finish_tag_(this, &WorkerStream::OnFinish),
      done_tag_(this, &WorkerStream::OnDone) {}

void WorkerStream::Accept(StatisticsAsyncService* service, grpc::ServerCompletionQueue* queue) {
  context_.AsyncNotifyWhenDone(&done_tag_);
  ++outstanding_;
  service->RequestSynchronize(&context_, &call_, queue, queue, &start_tag_);
}

void WorkerStream::OnStart(bool ok) {
  --outstanding_;
  if (!ok) {
    done_ = true;  // No call came, so its end will not be told either.
    Settle();
    return;
  }
  handler_->OnAccepted(this);
  ReadNext();
}

void WorkerStream::ReadNext() {
  if (reading_ || broken_ || done_ || closing_.has_value()) return;
  reading_ = true;
  ++outstanding_;
  call_.Read(&incoming_, &read_tag_);
}

void WorkerStream::OnRead(bool ok) {
  --outstanding_;
  reading_ = false;
  if (closing_.has_value() || broken_ || done_) {
    Settle();
  } else if (!ok) {
    handler_->OnHalfClosed(this);
  } else {
    handler_->OnFrame(this, std::exchange(incoming_, grpc::ByteBuffer()));
  }
}

bool WorkerStream::Admits(size_t bytes) {
  if (broken_ || done_ || cut_off_ || closing_.has_value()) return false;
  cut_off_ = unread_bytes_ + bytes > max_unread_bytes_;
  if (cut_off_) Cancel();
  return !cut_off_;
}

void WorkerStream::Send(const grpc::ByteBuffer& frame) {
  outgoing_.push_back(frame);
  unread_bytes_ += frame.Length();
  WriteNext();
}

void WorkerStream::WriteNext() {
  if (writing_ || finishing_ || broken_ || done_) return;
  if (!outgoing_.empty()) {
    writing_ = true;
    ++outstanding_;
    call_.Write(outgoing_.front(), &write_tag_);
  } else if (closing_.has_value()) {
    finishing_ = true;
    ++outstanding_;
    call_.Finish(*closing_, &finish_tag_);
  }
}

void WorkerStream::OnWrite(bool ok) {
  --outstanding_;
  writing_ = false;
  unread_bytes_ -= outgoing_.front().Length();
  outgoing_.pop_front();
  ++written_;
  if (ok) {
    WriteNext();
    handler_->OnWritten(this);
  } else {
    broken_ = true;
  }
  Settle();
}

void WorkerStream::Close(const grpc::Status& status) {
  if (closing_.has_value()) return;
  closing_ = status;
  WriteNext();
}

void WorkerStream::OnFinish(bool) {
  --outstanding_;
  Settle();
}

void WorkerStream::OnDone(bool) {
  done_ = true;
  if (!closing_.has_value()) handler_->OnBroken(this);
  Settle();
}

void WorkerStream::Settle() {
  if (done_ && outstanding_ == 0) handler_->OnGone(this);
}

}  // namespace syncbn::rpc
