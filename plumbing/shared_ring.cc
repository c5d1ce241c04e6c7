#include "plumbing/shared_ring.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"

namespace syncbn {
namespace {

static_assert((kRingBytes & (kRingBytes - 1)) == 0);
// PROTOCOL.md tells these.
static_assert(offsetof(SegmentLayout, to_worker) == 192 && offsetof(SegmentLayout, worker_bell) == 384);
static_assert(offsetof(SegmentLayout, closing) == 448 && offsetof(SegmentLayout, taken) == 452);
static_assert(offsetof(SegmentLayout, bytes_to_master) == 512);
static_assert(offsetof(SegmentLayout, bytes_to_worker) == 524800 && sizeof(SegmentLayout) == 1049088);
static_assert(sizeof(Doorbell) == 8);

// The most that a writer copies before the reader sees any of it.
constexpr size_t kPieceBytes = size_t{64} << 10;
// The bytes for which memory is taken before they have come: a length may be a lie.
constexpr size_t kMostReserved = size_t{16} << 20;

// Calls `copy` with the place in the ring, the offset in the piece and the length, once or twice.
template <typename Copy>
void AroundTheEnd(uint64_t position, size_t size, Copy copy) {
  const size_t begin = static_cast<size_t>(position) & (kRingBytes - 1);
  const size_t first = std::min(size, kRingBytes - begin);
  copy(begin, 0, first);
  if (first < size) copy(0, first, size - first);
}

}  // namespace

RingProgress RingWriter::Send(absl::Span<const absl::string_view> parts, Doorbell* bell) {
  size_t size = 0;
  for (const absl::string_view part : parts) size += part.size();
  SYNCBN_CHECK(size <= std::numeric_limits<uint32_t>::max(), "a frame of ", size, " bytes");
  const uint32_t number = static_cast<uint32_t>(size);
  char length[sizeof(number)];
  std::memcpy(length, &number, sizeof(number));
  const absl::string_view head(length, sizeof(length));
  while (true) {
    if (!Copy(head, parts)) return RingProgress::kBroken;
    if (sent_ == sizeof(number) + size) {
      sent_ = 0;
      return RingProgress::kDone;
    }
    if (HasRoom()) {
      if (bell != nullptr) bell->Ring();
      continue;
    }
    words_->writer_waits.store(1, std::memory_order_seq_cst);
    // The reader may have made room before it could see that.
    if (words_->read.load(std::memory_order_seq_cst) == written_ - kRingBytes) return RingProgress::kWaits;
  }
}

bool RingWriter::Copy(absl::string_view length, absl::Span<const absl::string_view> parts) {
  const uint64_t in_use = written_ - words_->read.load(std::memory_order_acquire);
  if (in_use > kRingBytes) return false;
  size_t room = std::min(kRingBytes - static_cast<size_t>(in_use), kPieceBytes);
  size_t begin = 0;  // A part's, in the frame.
  const auto copy = [&](absl::string_view part) {
    const size_t end = begin + part.size();
    if (sent_ < end && room > 0) {
      const size_t size = std::min(end - sent_, room);
      const char* const from = part.data() + (sent_ - begin);
      AroundTheEnd(written_, size,
                   [&](size_t place, size_t offset, size_t n) { std::memcpy(bytes_ + place, from + offset, n); });
      written_ += size;
      sent_ += size;
      room -= size;
    }
    begin = end;
  };
  copy(length);
  for (const absl::string_view part : parts) copy(part);
  words_->written.store(written_, std::memory_order_release);
  return true;
}

RingProgress RingReader::Receive() {
  if (!fault_.empty()) return RingProgress::kBroken;
  if (std::exchange(complete_, false)) {
    frame_.clear();
    length_.clear();
  }
  const uint64_t available = words_->written.load(std::memory_order_acquire) - read_;
  if (available > kRingBytes) {
    return Break(absl::StrCat("the count of written bytes is ", available,
                              " beyond that of read ones, and the ring has ", kRingBytes));
  }
  if (available == 0) return RingProgress::kWaits;
  size_t left = static_cast<size_t>(available);
  uint32_t size = 0;
  left -= Take(left, sizeof(size) - length_.size(), &length_);
  if (length_.size() == sizeof(size)) {
    std::memcpy(&size, length_.data(), sizeof(size));
    if (size > most_bytes_) {
      return Break(absl::StrCat("a frame of ", size, " bytes is longer than allowed, which is ", most_bytes_));
    }
    if (frame_.empty()) frame_.reserve(std::min<size_t>(size, kMostReserved));
    Take(left, size - frame_.size(), &frame_);
    complete_ = frame_.size() == size;
  }
  words_->read.store(read_, std::memory_order_seq_cst);
  return complete_ ? RingProgress::kDone : RingProgress::kWaits;
}

size_t RingReader::Take(size_t available, size_t most, std::string* to) {
  const size_t size = std::min(available, most);
  AroundTheEnd(read_, size, [&](size_t place, size_t, size_t n) { to->append(bytes_ + place, n); });
  read_ += size;
  return size;
}

bool RingReader::WriterWaits() {
  return words_->writer_waits.load(std::memory_order_seq_cst) != 0 &&
         words_->writer_waits.exchange(0, std::memory_order_seq_cst) != 0;
}

RingProgress RingReader::Break(std::string fault) {
  fault_ = std::move(fault);
  return RingProgress::kBroken;
}

}  // namespace syncbn
