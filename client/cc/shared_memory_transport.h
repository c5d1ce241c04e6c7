// Frames through shared memory, where the master runs on the same machine.

#ifndef SYNCBN_CLIENT_CC_SHARED_MEMORY_TRANSPORT_H_
#define SYNCBN_CLIENT_CC_SHARED_MEMORY_TRANSPORT_H_

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/cc/grpc_transport.h"
#include "client/cc/transport.h"
#include "plumbing/doorbell.h"
#include "plumbing/shared_file.h"
#include "plumbing/shared_ring.h"
#include "plumbing/spin.h"

namespace syncbn {

// Begins every stream by gRPC, and offers the master of a local target a segment with it (PROTOCOL.md, "Shared
// memory"). If the master takes it, every frame but each side's first goes through the segment; if not, the stream goes
// on as it began. The gRPC stream stays, for its end.
//
// The waiting thread looks at the segment for some microseconds, then sleeps on the segment's doorbell. After every few
// milliseconds without a ring it looks at the gRPC stream.
class SharedMemoryTransport final : public Transport {
 public:
  // `world_size`: the workers of the group, all of which may run on this machine.
  SharedMemoryTransport(ChannelMaker channels, SharedMemoryOptions options, size_t world_size)
      : options_(std::move(options)), world_size_(world_size), stream_(std::move(channels)) {}

  void Open(const std::string& target, absl::Duration connect_timeout) override;
  void Close() override { stream_.Close(); }
  bool IsUp() const override { return stream_.IsUp() && !ended_ && !broken_.has_value(); }
  bool shares_memory() const override { return segment_ != nullptr && segment_->shared(); }
  bool Write(absl::Span<const Buffer> parts) override;
  void Read() override;
  void Wait(absl::Time deadline) override;
  void Take(absl::FunctionRef<void(const Event&)> handle) override;
  void Wake() override;

 private:
  // The worker's end of a segment.
  class Segment {
   public:
    static absl::StatusOr<std::unique_ptr<Segment>> Create(const std::string& directory, const SharedName& name,
                                                           MemorySharing sharing);
    // Maps the master's doorbell, after which the segment is shared, and its name goes. *Errors*: UNAVAILABLE if there
    // is no such doorbell, or the master maps other memory than this.
    absl::Status Attach(const SharedName& bell, MemorySharing sharing);
    bool shared() const { return master_bell_.has_value(); }

    SegmentLayout& layout() { return *layout_; }
    Doorbell& master_bell() { return *reinterpret_cast<Doorbell*>(master_bell_->data()); }
    RingWriter& writer() { return writer_; }
    RingReader& reader() { return reader_; }

   private:
    Segment(std::string directory, SharedFile file);

    const std::string directory_;
    SharedFile file_;
    SegmentLayout* const layout_;
    std::optional<SharedFile> master_bell_;
    RingWriter writer_;
    RingReader reader_;
  };

  enum class Found { kNothing, kStreamEvent, kRoom, kFrame, kFault, kEnd };

  // ---- The stream
  void OnStreamEvent(const Event& event, absl::FunctionRef<void(const Event&)> handle);
  // Makes the segment that was offered, if it can be made.
  void MakeSegment();
  // The first frame has come, with the master's answer to the offer. Returns false if the stream cannot go on.
  bool TakeAnswer();

  // ---- The segment
  void ClearSegment();
  // Sends on what Write has begun. Returns whether all has been sent.
  bool SendOn();
  // Breaks off a stream whose master has broken the rules.
  void OnFault(absl::FunctionRef<void(const Event&)> handle);

  // ---- In Wait, without the lock
  void WaitForSegment(absl::Time deadline);
  // Looks once. Returns whether there is something for Take.
  bool Look();
  // Looks at the stream, until `deadline`. Returns whether there is something for Take.
  bool LookAtStream(absl::Time deadline);
  // Sleeps for a while, or until the master has rung, and looks at the stream if it has not, or it is time to. Returns
  // whether there is something for Take.
  bool Nap(uint32_t seen, absl::Time begun, absl::Time deadline);

  const SharedMemoryOptions options_;
  const size_t world_size_;
  GrpcTransport stream_;
  std::string target_;                    // Of the newest Open.
  std::optional<SharedName> offered_;     // With the stream, until the master has answered.
  bool distrusted_ = false;               // A master has broken the rules: no more segments.
  bool pass_over_ = false;                // The next stream is to have no segment.
  bool answered_ = false;                 // The stream's first frame has come.
  std::unique_ptr<Segment> segment_;      // Replaced by the thread that waits alone.
  std::optional<session::Break> broken_;  // The stream has ended; what is in the segment comes before the news of that.
  bool ended_ = false;                    // The end has been told before the stream's own.
  Spin spin_;
  absl::Time looked_at_stream_ = absl::InfinitePast();
  Found found_ = Found::kNothing;

  std::vector<Buffer> outgoing_;            // What the master has made no room for yet.
  std::atomic<bool> stream_writes_{false};  // A frame is being written to the stream.
  std::atomic<bool> sending_{false};        // outgoing_ is not empty.
  std::atomic<bool> fault_{false};          // The master has broken the rules, and Take has not told so.
  std::atomic<bool> woken_{false};
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_SHARED_MEMORY_TRANSPORT_H_
