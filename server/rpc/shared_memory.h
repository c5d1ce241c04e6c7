// The master's side of the memory that workers on this machine share with it.

#ifndef SYNCBN_SERVER_RPC_SHARED_MEMORY_H_
#define SYNCBN_SERVER_RPC_SHARED_MEMORY_H_

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "plumbing/doorbell.h"
#include "plumbing/shared_file.h"
#include "plumbing/shared_ring.h"

namespace syncbn::rpc {

// The master's end of one worker's segment. Whatever a worker writes there, it harms itself alone.
//
// Thread safety: none; it belongs to its stream.
class SharedSegment {
 public:
  // `master_bell` must outlive the object.
  SharedSegment(SharedFile file, Doorbell* master_bell, size_t max_frame_bytes);

  // Queues a frame to be sent.
  void Queue(std::shared_ptr<const grpc::ByteBuffer> frame) { outgoing_.push_back(std::move(frame)); }
  size_t queued() const { return outgoing_.size(); }
  // Sends the queue's first frame, or what is left of it. Returns its length once it has been sent, and takes it from
  // the queue; nothing if the worker has to read first.
  std::optional<size_t> Send();
  // Returns whether Send can go on.
  bool HasRoom() const { return writer_.HasRoom(); }

  // Receives a frame, and returns true, if a whole one has come.
  bool Receive(grpc::ByteBuffer* frame);
  bool HasBytes() const { return reader_.HasBytes(); }

  // Returns what the worker has done against the rules; empty as long as it keeps them.
  const std::string& fault() const { return fault_; }

  // Makes the worker look at the segment.
  void RingWorker() { layout_->worker_bell.Ring(); }
  // Makes the master look at the segment.
  void RingMaster() { master_bell_->Ring(); }
  // Tells the worker that the stream ends, which shows in gRPC.
  void AnnounceEnd();

 private:
  SharedFile file_;
  SegmentLayout* const layout_;
  Doorbell* const master_bell_;
  RingWriter writer_;
  RingReader reader_;
  std::deque<std::shared_ptr<const grpc::ByteBuffer>> outgoing_;
  std::vector<grpc::Slice> slices_;  // Of the queue's first frame, if Send has begun with it.
  std::string fault_;
};

// Takes the segments that workers offer, and has the doorbell that all of their workers ring.
//
// Thread safety: none, but for what Doorbell says of bell().
class SharedMemory {
 public:
  // `directories`: where to look for what workers offer.
  SharedMemory(MemorySharing sharing, std::vector<std::string> directories, size_t max_frame_bytes)
      : sharing_(sharing), directories_(std::move(directories)), max_frame_bytes_(max_frame_bytes) {}

  // Maps the segment that a worker offers by the metadata of its call. Returns null if it is not to be had: it is
  // another machine's or another user's, or memory is not shared.
  std::unique_ptr<SharedSegment> Accept(absl::string_view offer);
  // The metadata by which the master tells a worker that its offer is accepted, and where the doorbell is. After the
  // first Accept that succeeded.
  const std::string& answer() const { return answer_; }
  // Null before the first Accept that succeeded.
  Doorbell* bell() const { return bell_.has_value() ? reinterpret_cast<Doorbell*>(bell_->data()) : nullptr; }
  // Takes the doorbell's name out of its directory. The doorbell itself stays as long as this object.
  void HideBell();

 private:
  // Makes the doorbell, in the directory of the first segment. All others must be there as well.
  bool MakeBell(const std::string& directory);

  const MemorySharing sharing_;
  std::vector<std::string> directories_;
  const size_t max_frame_bytes_;
  std::optional<SharedFile> bell_;
  std::string answer_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_SHARED_MEMORY_H_
