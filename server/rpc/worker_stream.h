// One worker's Synchronize call, as frames in and frames out.

#ifndef SYNCBN_SERVER_RPC_WORKER_STREAM_H_
#define SYNCBN_SERVER_RPC_WORKER_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

#include "grpcpp/completion_queue.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/async_stream.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/rpc/event_loop.h"
#include "syncbn/v1/statistics.grpc.pb.h"

namespace syncbn::rpc {

// Frames pass as bytes: an answer is serialized once, and its slices are shared by all streams that it goes to.
using StatisticsAsyncService = v1::StatisticsService::WithRawMethod_Synchronize<v1::StatisticsService::Service>;

// Lives on the thread that drives its completion queue; owned by its handler, which deletes it when it is gone.
class WorkerStream {
 public:
  class Handler {
   public:
    virtual ~Handler() = default;
    // A worker has called. The handler should wait for the next one.
    virtual void OnAccepted(WorkerStream* stream) = 0;
    // A frame has arrived. The stream reads on when the handler has called ReadNext().
    virtual void OnFrame(WorkerStream* stream, grpc::ByteBuffer frame) = 0;
    // A frame has been written.
    virtual void OnWritten(WorkerStream* stream) = 0;
    // The worker will send nothing more, and can still be sent to.
    virtual void OnHalfClosed(WorkerStream* stream) = 0;
    // The worker has cancelled, or its connection broke. Nothing can be sent.
    virtual void OnBroken(WorkerStream* stream) = 0;
    // No operation is outstanding: the stream may and should be deleted.
    virtual void OnGone(WorkerStream* stream) = 0;
  };

  WorkerStream(uint64_t id, Handler* handler, size_t max_unread_bytes);

  // Waits for a worker's call.
  void Accept(StatisticsAsyncService* service, grpc::ServerCompletionQueue* queue);

  uint64_t id() const { return id_; }

  // Asks for the next frame, once for each frame. No-op on a stream that is closed.
  void ReadNext();
  // Bytes that have been queued and not been written.
  size_t unread_bytes() const { return unread_bytes_; }
  // Frames that have been written.
  uint64_t written() const { return written_; }
  // Returns whether a frame of so many bytes may be sent. A worker that would leave more than max_unread_bytes unread
  // is cut off instead, before the frame is built.
  bool Admits(size_t bytes);
  // Queues a frame that was admitted.
  void Send(const grpc::ByteBuffer& frame);
  // Ends the call once everything queued has been written. Nothing is read any more.
  void Close(const grpc::Status& status);
  // Breaks the call off.
  void Cancel() { context_.TryCancel(); }

  bool closed() const { return closing_.has_value(); }

 private:
  void OnStart(bool ok);
  void OnRead(bool ok);
  void OnWrite(bool ok);
  void OnFinish(bool ok);
  void OnDone(bool ok);
  void WriteNext();
  void Settle();

  const uint64_t id_;
  Handler* const handler_;
  const size_t max_unread_bytes_;

  grpc::ServerContext context_;
  grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer> call_;
  MethodTag<WorkerStream> start_tag_, read_tag_, write_tag_, finish_tag_, done_tag_;

  grpc::ByteBuffer incoming_;
  std::deque<grpc::ByteBuffer> outgoing_;
  size_t unread_bytes_ = 0;
  uint64_t written_ = 0;
  std::optional<grpc::Status> closing_;
  int outstanding_ = 0;  // Operations, done_tag_ excepted.
  bool reading_ = false;
  bool writing_ = false;
  bool finishing_ = false;
  bool broken_ = false;
  bool cut_off_ = false;
  bool done_ = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_WORKER_STREAM_H_
