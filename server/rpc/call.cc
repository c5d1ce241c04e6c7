#include "server/rpc/call.h"

#include "server/rpc/convert.h"

namespace syncbn::rpc {

Watcher::Watcher(Handler* handler)
    : handler_(handler),
      writer_(&context_),
      start_tag_(this, &Watcher::OnStart),
      greet_tag_(this, &Watcher::OnGreeted),
      write_tag_(this, &Watcher::OnWrite),
      finish_tag_(this, &Watcher::OnFinish),
      done_tag_(this, &Watcher::OnDone) {}

void Watcher::Accept(InspectionAsyncService* service, grpc::ServerCompletionQueue* queue) {
  context_.AsyncNotifyWhenDone(&done_tag_);
  ++outstanding_;
  service->RequestWatchRounds(&context_, &request_, &writer_, queue, queue, &start_tag_);
}

void Watcher::OnStart(bool ok) {
  --outstanding_;
  if (!ok) {
    done_ = true;
    Settle();
    return;
  }
  group_ = ToGroupId(request_.job(), request_.group());
  handler_->OnWatch(this);
  Greet();
}

// An early header tells the watcher that it misses nothing from here on.
void Watcher::Greet() {
  if (finishing_) return;
  writing_ = true;
  ++outstanding_;
  writer_.SendInitialMetadata(&greet_tag_);
}

void Watcher::OnGreeted(bool ok) {
  --outstanding_;
  writing_ = false;
  if (ok) WriteNext();
  Settle();
}

void Watcher::Send(const v1::WatchRoundsResponse& event) {
  constexpr size_t kMaxEvents = 1000;
  if (done_ || closing_.has_value()) return;
  if (events_.size() >= kMaxEvents) {
    ++dropped_;
    return;
  }
  events_.push_back(event);
  events_.back().set_dropped(std::exchange(dropped_, 0));
  WriteNext();
}

void Watcher::Close(const grpc::Status& status) {
  if (closing_.has_value()) return;
  closing_ = status;
  WriteNext();
}

void Watcher::WriteNext() {
  if (writing_ || finishing_ || done_) return;
  if (!events_.empty()) {
    writing_ = true;
    ++outstanding_;
    writer_.Write(events_.front(), &write_tag_);
  } else if (closing_.has_value()) {
    finishing_ = true;
    ++outstanding_;
    writer_.Finish(*closing_, &finish_tag_);
  }
}

void Watcher::OnWrite(bool ok) {
  --outstanding_;
  writing_ = false;
  events_.pop_front();
  if (ok) WriteNext();
  Settle();
}

void Watcher::OnFinish(bool) {
  --outstanding_;
  Settle();
}

void Watcher::OnDone(bool) {
  done_ = true;
  Settle();
}

void Watcher::Settle() {
  if (done_ && outstanding_ == 0) handler_->OnGone(this);
}

}  // namespace syncbn::rpc
