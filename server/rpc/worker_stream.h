// One worker's Synchronize call, as frames in and frames out.

#ifndef SYNCBN_SERVER_RPC_WORKER_STREAM_H_
#define SYNCBN_SERVER_RPC_WORKER_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>

#include "grpcpp/completion_queue.h"
#include "grpcpp/support/async_stream.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/core/types.h"
#include "server/rpc/identity.h"
#include "server/rpc/shared_memory.h"
#include "server/rpc/stream_call.h"
#include "server/rpc/unread_bytes.h"
#include "syncbn/v1/statistics.grpc.pb.h"

namespace syncbn::rpc {

// Frames pass as bytes: an answer is serialized once, and its slices are shared by all streams that it goes to.
using StatisticsAsyncService = v1::StatisticsService::WithRawMethod_Synchronize<v1::StatisticsService::Service>;

// Once Share was called, all frames but each side's first go through the shared segment, and the call stays for its
// end.
//
// Owned by its handler, which deletes it when it is gone.
class WorkerStream final : public StreamCall<grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>,
                                             std::shared_ptr<const grpc::ByteBuffer>> {
 public:
  class Handler {
   public:
    virtual ~Handler() = default;
    // A worker has called. The handler should wait for the next one.
    virtual void OnAccepted(WorkerStream* stream) = 0;
    // A frame has arrived, which the handler may take by Swap: gRPC's buffers cannot be moved. The stream reads on when
    // the handler has called ReadNext().
    virtual void OnFrame(WorkerStream* stream, grpc::ByteBuffer&& frame) = 0;
    // A frame has been written.
    virtual void OnWritten(WorkerStream* stream) = 0;
    // The worker has broken a rule of shared memory.
    virtual void OnFault(WorkerStream* stream, const std::string& fault) = 0;
    // The worker will send nothing more, and can still be sent to.
    virtual void OnHalfClosed(WorkerStream* stream) = 0;
    // The worker has cancelled, or its connection broke. Nothing can be sent.
    virtual void OnBroken(WorkerStream* stream) = 0;
    // No operation is under way: the stream may and should be deleted.
    virtual void OnGone(WorkerStream* stream) = 0;
  };

  // Waits for a worker's call.
  WorkerStream(core::StreamId id, Handler* handler, size_t max_unread_bytes, StatisticsAsyncService* service,
               grpc::ServerCompletionQueue* queue);

  core::StreamId id() const { return id_; }
  // Returns the worker's address, as Connections names it; empty before a worker has called.
  const std::string& peer() const { return peer_; }
  // Returns what the worker's certificate says. A worker has called.
  PeerNames names() const;

  // Returns the segment that the worker offers, as SharedMemory::Accept takes it; empty if it offers none.
  std::string offer() const;
  // Shares the segment from here on, and tells the worker so by `answer`. Before anything is sent.
  void Share(std::unique_ptr<SharedSegment> segment, const std::string& answer);
  bool shares_memory() const { return segment_ != nullptr; }
  // Looks at the segment: sends on, and receives a frame. Returns whether there was anything to do.
  bool Poll();

  // Asks for the next frame, once for each frame. Does nothing on a stream that is not open.
  void ReadNext();
  // Bytes that have been queued and not been written.
  size_t unread_bytes() const { return unread_bytes_; }
  // Frames that have been written.
  uint64_t written() const { return written_; }
  // Returns whether a frame of so many bytes may be sent. A worker that would leave more than max_unread_bytes unread
  // is to be cut off instead, before the frame is built.
  bool Admits(size_t bytes);
  // Queues a frame that was admitted. It and `charge` are kept until it has been written.
  void Send(std::shared_ptr<const grpc::ByteBuffer> frame, UnreadBytes::Charge charge);

 private:
  void OnStart() override;
  void OnRead(bool ok) override;
  void OnClosing() override;
  void OnDequeue(const std::shared_ptr<const grpc::ByteBuffer>& frame) override {
    unread_bytes_ -= frame->Length();
    charges_.pop_front();
  }
  void OnWritten() override;
  void OnEnded() override;
  void OnGone() override { handler_->OnGone(this); }
  bool HoldsEnd() const override { return segment_ != nullptr && segment_->queued() != 0 && segment_->fault().empty(); }

  // Sends through the segment what it has room for, and wakes the worker. Returns whether a frame has been sent.
  bool SendShared();

  const core::StreamId id_;
  Handler* const handler_;
  const size_t max_unread_bytes_;
  std::string peer_;  // Kept here, since gRPC forgets it when the call is cancelled.
  grpc::ByteBuffer incoming_;
  size_t unread_bytes_ = 0;
  std::deque<UnreadBytes::Charge> charges_;         // Of the frames that are queued for the call,
  std::deque<UnreadBytes::Charge> shared_charges_;  // and for the segment.
  uint64_t written_ = 0;
  bool cut_off_ = false;
  std::unique_ptr<SharedSegment> segment_;  // Null if memory is not shared.
  bool answered_ = false;                   // The first frame has been sent.
  bool reading_ = false;                    // The next frame of the segment is wanted.
  bool fault_told_ = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_WORKER_STREAM_H_
