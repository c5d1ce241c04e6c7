// Frames of bytes from one process to another through shared memory.

#ifndef SYNCBN_PLUMBING_SHARED_RING_H_
#define SYNCBN_PLUMBING_SHARED_RING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "plumbing/doorbell.h"

namespace syncbn {

// The shared words of one direction, zeroed at first. Counts of bytes since the beginning; the writer writes one, the
// reader the other.
struct RingWords {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  // The writer has found the ring full, and is to be rung for when something has been read.
  alignas(64) std::atomic<uint32_t> writer_waits;
};

// Bytes of one direction, a power of two. A longer frame goes piece by piece.
inline constexpr size_t kRingBytes = size_t{512} << 10;

// A worker's segment, as it lies in shared memory behind the head of its file.
struct SegmentLayout {
  RingWords to_master;
  RingWords to_worker;
  alignas(64) Doorbell worker_bell;
  // The master has ended the stream: the rest comes by gRPC.
  alignas(64) std::atomic<uint32_t> closing;
  // The master has taken the segment: a worker that does not find it here maps other memory than its master.
  std::atomic<uint32_t> taken;
  alignas(64) char bytes_to_master[kRingBytes];
  alignas(64) char bytes_to_worker[kRingBytes];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

enum class RingProgress {
  kDone,    // A whole frame has been sent or received.
  kWaits,   // The other side has to do something first.
  kBroken,  // The other side has written what it must not. Nothing more comes of this ring.
};

// Writes frames, each after its length as a 32-bit number in the machine's byte order. What the other side writes
// counts only after it was checked; the writer's own count is kept outside of the shared memory.
//
// *Thread safety*: none; one writer and one reader, of any two processes.
class RingWriter {
 public:
  RingWriter(RingWords* words, char* bytes) : words_(words), bytes_(bytes) {}

  // Sends what is left of the frame that these parts form, in order. After kWaits it is to be called again with the
  // same parts, when the reader has rung. A frame has less than 4 GiB.
  //
  // A long frame goes in pieces, and `bell`, if there is one, is rung for each but the newest: so the reader copies out
  // what has come while the writer copies on.
  RingProgress Send(absl::Span<const absl::string_view> parts, Doorbell* bell = nullptr);
  // Returns false if Send would return kWaits. Does not tell a broken ring.
  bool HasRoom() const { return words_->read.load(std::memory_order_acquire) != written_ - kRingBytes; }

 private:
  // Copies as much of the frame, from sent_ on, as fits, and a piece at most. Returns false for a broken ring.
  bool Copy(absl::string_view length, absl::Span<const absl::string_view> parts);

  RingWords* const words_;
  char* const bytes_;
  uint64_t written_ = 0;
  size_t sent_ = 0;  // Bytes of the current frame, its length included.
};

// *Thread safety*: as RingWriter.
class RingReader {
 public:
  // A frame of more than `most_bytes` is refused.
  RingReader(RingWords* words, const char* bytes, size_t most_bytes)
      : words_(words), bytes_(bytes), most_bytes_(most_bytes) {}

  // Reads on. After kDone, frame() has the frame, and the next call begins another one.
  RingProgress Receive();
  // The frame, which no other process can change.
  std::string& frame() { return frame_; }
  // Returns whether Receive would read anything.
  bool HasBytes() const { return words_->written.load(std::memory_order_acquire) != read_; }
  // Returns whether the writer has to be rung for since something was read. Each wait is told of once.
  bool WriterWaits();
  // Returns why Receive has returned kBroken.
  const std::string& fault() const { return fault_; }

 private:
  // Moves up to `most` bytes to the end of `to`. Returns how many.
  size_t Take(size_t available, size_t most, std::string* to);
  RingProgress Break(std::string fault);

  RingWords* const words_;
  const char* const bytes_;
  const size_t most_bytes_;
  uint64_t read_ = 0;
  bool complete_ = false;  // frame_ was handed out.
  std::string length_;     // The bytes of it that have been read.
  std::string frame_;
  std::string fault_;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SHARED_RING_H_
