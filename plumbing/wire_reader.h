// Protobuf's encoding, read field by field.

#ifndef SYNCBN_PLUMBING_WIRE_READER_H_
#define SYNCBN_PLUMBING_WIRE_READER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/base/attributes.h"
#include "absl/strings/string_view.h"
#include "plumbing/byte_pieces.h"

namespace syncbn {

// The types that a field of our messages may have. Groups, which have types of their own, are no part of any.
enum class WireType : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

// The longest encoding of a number.
inline constexpr size_t kMostVarintBytes = 10;

// Takes a number from the front. Returns false if it is cut off, or longer than 64 bits take.
inline bool TakeVarint(absl::string_view* bytes, uint64_t* value) {
  if (!bytes->empty() && static_cast<uint8_t>(bytes->front()) < 0x80) {  // As most.
    *value = static_cast<uint8_t>(bytes->front());
    bytes->remove_prefix(1);
    return true;
  }
  const size_t most = std::min(bytes->size(), kMostVarintBytes);
  uint64_t bits = 0;
  for (size_t i = 0; i < most; ++i) {
    const auto byte = static_cast<uint8_t>((*bytes)[i]);
    bits |= static_cast<uint64_t>(byte & 0x7f) << (7 * i);
    if (byte >= 0x80) continue;
    *value = bits;
    bytes->remove_prefix(i + 1);
    return true;
  }
  return false;
}

// Reads the fields of a message. It allocates nothing, and takes a fraction of the time of protobuf's CodedInputStream.
//
// *Thread safety*: none.
class WireReader {
 public:
  explicit WireReader(const BytePieces& message) : rest_(message), here_(message.front()) {}

  // Moves to the next field. Returns false at the end, and where the bytes are no field of our messages.
  bool Next() {
    if (here_.empty() && !rest_.whole()) GoOn();
    if (here_.empty() || !well_formed_) return false;
    uint64_t tag = 0;
    well_formed_ = TakeNumber(&tag) && tag >> 3 != 0 && tag <= std::numeric_limits<uint32_t>::max();
    number_ = static_cast<uint32_t>(tag >> 3);
    type_ = static_cast<WireType>(tag & 7);
    well_formed_ = well_formed_ && TakeValue();
    return well_formed_;
  }
  // As Next, for messages as serializers write them: a field that does not come after the one before it, by its number,
  // is no field either.
  bool NextInOrder() {
    const uint32_t before = number_;
    if (!Next()) return false;
    well_formed_ = number_ > before;
    return well_formed_;
  }
  // Returns false if Next has come to something that is no field.
  bool well_formed() const { return well_formed_; }

  // The field that Next has moved to: its number,
  uint32_t number() const { return number_; }
  WireType type() const { return type_; }
  // its value unless it is kBytes,
  uint64_t integer() const { return integer_; }
  // and if it is.
  const BytePieces& bytes() const { return bytes_; }

 private:
  bool TakeValue() {
    switch (type_) {
      case WireType::kVarint:
        return TakeNumber(&integer_);
      case WireType::kFixed64:
        return TakeFixed(sizeof(uint64_t));
      case WireType::kFixed32:
        return TakeFixed(sizeof(uint32_t));
      case WireType::kBytes:
        return TakeNumber(&integer_) && TakeBytes(integer_, &bytes_);
    }
    return false;
  }

  // The wire has numbers as the memory of all machines that this is built for has them.
  bool TakeFixed(size_t size) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    BytePieces bytes;
    if (!TakeBytes(size, &bytes)) return false;
    integer_ = 0;
    bytes.CopyTo(&integer_);
    return true;
  }

  bool TakeNumber(uint64_t* value) {
    return here_.size() < kMostVarintBytes && !rest_.whole() ? TakeCutNumber(value) : TakeVarint(&here_, value);
  }
  ABSL_ATTRIBUTE_NOINLINE bool TakeCutNumber(uint64_t* value) {
    GoOn();
    char copy[kMostVarintBytes];
    const BytePieces head = BytePieces(rest_).TakePrefix(std::min(rest_.size(), kMostVarintBytes));
    head.CopyTo(copy);
    absl::string_view bytes(copy, head.size());
    if (!TakeVarint(&bytes, value)) return false;
    rest_.RemovePrefix(head.size() - bytes.size());
    here_ = rest_.front();
    return true;
  }

  bool TakeBytes(uint64_t size, BytePieces* bytes) {
    if (size > here_.size()) return TakeCutBytes(size, bytes);
    *bytes = absl::string_view(here_.data(), size);
    here_.remove_prefix(size);
    return true;
  }
  ABSL_ATTRIBUTE_NOINLINE bool TakeCutBytes(uint64_t size, BytePieces* bytes) {
    GoOn();
    if (size > rest_.size()) return false;
    *bytes = rest_.TakePrefix(size);
    here_ = rest_.front();
    return true;
  }

  // Drops what was read of the first piece, and moves to the next one if that is all of it.
  void GoOn() {
    rest_.RemovePrefix(rest_.front().size() - here_.size());
    here_ = rest_.front();
  }

  BytePieces rest_;         // All that was not read when its first piece was begun,
  absl::string_view here_;  // and what is left of that piece: most messages have no other.
  bool well_formed_ = true;
  uint32_t number_ = 0;
  WireType type_ = WireType::kVarint;
  uint64_t integer_ = 0;
  BytePieces bytes_;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_WIRE_READER_H_
