// The base of the master's streaming calls: which operations are under way, what is queued to be written, and when the
// call may be deleted.

#ifndef SYNCBN_SERVER_RPC_STREAM_CALL_H_
#define SYNCBN_SERVER_RPC_STREAM_CALL_H_

#include <array>
#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "grpcpp/server_context.h"
#include "grpcpp/support/async_stream.h"
#include "grpcpp/support/status.h"
#include "plumbing/check.h"
#include "server/rpc/event_loop.h"

namespace syncbn::rpc {

// One call, from the wait for it to its last operation. `Stream` is gRPC's ServerAsyncWriter or
// ServerAsyncReaderWriter, `Message` what it writes, or a std::shared_ptr to that. At most one operation of each kind
// is under way at a time.
//
// gRPC tells the end of a call once (OnEnded), independently of the operations under way. After both, OnGone is the
// last hook to be called, and may delete the object; no other hook may.
//
// Thread safety: none; it lives on the thread that drives its completion queue.
template <typename Stream, typename Message>
class StreamCall {
 public:
  virtual ~StreamCall() = default;
  StreamCall(const StreamCall&) = delete;
  StreamCall& operator=(const StreamCall&) = delete;

  // Ends the call once everything queued has been written. The first status counts.
  void Close(const grpc::Status& status) {
    if (closing_.has_value()) return;
    closing_ = status;
    OnClosing();
    WriteNext();
  }

  // Breaks the call off.
  void Cancel() { context_.TryCancel(); }

  // Returns whether Close was called.
  bool closed() const { return closing_.has_value(); }
  // Returns whether messages may be queued: the call has not been closed, and neither broken nor ended by its peer.
  bool open() const { return !closing_.has_value() && !broken_ && !ended_; }
  // Messages that have been queued and not been written.
  size_t queued() const { return outgoing_.size(); }

 protected:
  StreamCall() : stream_(&context_) {}

  const grpc::ServerContext& context() const { return context_; }

  // Waits for a call: `request` (context, stream, tag) passes its arguments to a service's Request method.
  template <typename Request>
  void Await(Request&& request) {
    context_.AsyncNotifyWhenDone(static_cast<Tag*>(&ended_tag_));
    request(&context_, &stream_, static_cast<void*>(Begin(Operation::kStart)));
  }

  // Queues a message to be written. The call must be open().
  void Queue(Message message) {
    SYNCBN_CHECK(open(), "a message to a call that is closed");
    outgoing_.push_back(std::move(message));
    WriteNext();
  }

  // Adds metadata to the headers. Before they and the first message are sent.
  void AddHeader(const std::string& name, const std::string& value) { context_.AddInitialMetadata(name, value); }

  // Sends the headers before the first message.
  void SendHeaders() {
    if (open()) stream_.SendInitialMetadata(Begin(Operation::kHeaders));
  }

  // Reads one message; only for streams that read.
  template <typename Incoming>
  void Read(Incoming* message) {
    if (open() && !under_way(Operation::kRead)) stream_.Read(message, Begin(Operation::kRead));
  }

  // A call has come.
  virtual void OnStart() = 0;
  // A read has ended; `ok` as grpc::CompletionQueue::Next has it. Not called after the call was closed or has ended.
  virtual void OnRead(bool /*ok*/) {}
  // Returns whether the end of the call has to wait for something other than queued messages. EndIfDue follows.
  virtual bool HoldsEnd() const { return false; }
  // Ends a call that was closed, if nothing holds it up.
  void EndIfDue() { WriteNext(); }

  // A message has been written or has failed to be, and leaves the queue. Must not send.
  virtual void OnDequeue(const Message& /*message*/) {}
  // A message has been written, and the next is on its way if there is one.
  virtual void OnWritten() {}
  // Close was called, and its status has not been sent.
  virtual void OnClosing() {}
  // The call has ended: its status was sent, or its peer has cancelled it or gone.
  virtual void OnEnded() {}
  // Nothing is under way any more.
  virtual void OnGone() = 0;

 private:
  enum class Operation { kStart, kHeaders, kRead, kWrite, kFinish };

  class OperationTag final : public Tag {
   public:
    OperationTag(StreamCall* call, Operation operation) : call_(call), operation_(operation) {}
    void Proceed(bool ok) override { call_->Complete(operation_, ok); }

    bool under_way = false;

   private:
    StreamCall* const call_;
    const Operation operation_;
  };

  template <typename T>
  static const T* Referent(const T& message) {
    return &message;
  }
  template <typename T>
  static const T* Referent(const std::shared_ptr<const T>& message) {
    return message.get();
  }

  OperationTag& TagOf(Operation operation) { return tags_[static_cast<size_t>(operation)]; }
  bool under_way(Operation operation) { return TagOf(operation).under_way; }

  Tag* Begin(Operation operation) {
    OperationTag& tag = TagOf(operation);
    SYNCBN_CHECK(!std::exchange(tag.under_way, true), "operation ", static_cast<int>(operation), " twice at a time");
    ++outstanding_;
    return &tag;
  }

  void Complete(Operation operation, bool ok) {
    SYNCBN_CHECK(std::exchange(TagOf(operation).under_way, false));
    --outstanding_;
    switch (operation) {
      case Operation::kStart:
        if (ok) {
          OnStart();
        } else {
          ended_ = true;  // No call came, so its end will not be told.
        }
        break;
      case Operation::kHeaders:
        if (ok) WriteNext();
        broken_ = broken_ || !ok;
        break;
      case Operation::kRead:
        if (open()) OnRead(ok);
        break;
      case Operation::kWrite:
        OnDequeue(outgoing_.front());
        outgoing_.pop_front();
        broken_ = broken_ || !ok;
        WriteNext();
        if (ok) OnWritten();
        break;
      case Operation::kFinish:
        break;
    }
    DeleteIfGone();
  }

  void End(bool /*cancelled*/) {
    ended_ = true;
    OnEnded();
    DeleteIfGone();
  }

  void WriteNext() {
    const bool busy = under_way(Operation::kStart) || under_way(Operation::kHeaders) || under_way(Operation::kWrite);
    if (busy || broken_ || ended_) return;
    if (!outgoing_.empty()) {
      stream_.Write(*Referent(outgoing_.front()), Begin(Operation::kWrite));
    } else if (closing_.has_value() && !HoldsEnd() && !std::exchange(finished_, true)) {
      stream_.Finish(*closing_, Begin(Operation::kFinish));
    }
  }

  void DeleteIfGone() {
    if (ended_ && outstanding_ == 0) OnGone();
  }

  grpc::ServerContext context_;
  Stream stream_;
  std::array<OperationTag, 5> tags_ = {OperationTag(this, Operation::kStart), OperationTag(this, Operation::kHeaders),
                                       OperationTag(this, Operation::kRead), OperationTag(this, Operation::kWrite),
                                       OperationTag(this, Operation::kFinish)};
  MethodTag<StreamCall> ended_tag_{this, &StreamCall::End};
  std::deque<Message> outgoing_;
  std::optional<grpc::Status> closing_;
  int outstanding_ = 0;  // Operations under way; the notice of the call's end is none.
  bool finished_ = false;
  bool broken_ = false;  // A write has failed.
  bool ended_ = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_STREAM_CALL_H_
