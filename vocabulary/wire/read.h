// Reads the parts of messages that come with every round without protobuf, which takes several times as long.

#ifndef SYNCBN_VOCABULARY_WIRE_READ_H_
#define SYNCBN_VOCABULARY_WIRE_READ_H_

#include <cstdint>
#include <vector>

#include "plumbing/byte_pieces.h"
#include "vocabulary/enums.h"
#include "vocabulary/round_key.h"

namespace syncbn::wire {

// All of these return false for a message that is malformed, and for one that serializers do not write: with a field
// that is unknown, out of order or there twice. Protobuf is to read it then, or to tell what is wrong. What they write
// to counts only after they have returned true.

// Reads a v1::RoundKey, whose phase must be one that is known.
bool ReadRoundKey(const BytePieces& bytes, RoundKey* key);
// Reads the number of a v1::BackwardRole.
bool ReadBackwardRole(uint64_t number, BackwardRole* role);
// Reads a packed field of numbers, such as ranks.
bool ReadNumbers(const BytePieces& packed, std::vector<uint32_t>* numbers);

// Returns whether the bytes can be a packed field of doubles.
inline bool AreDoubles(const BytePieces& packed) { return packed.size() % sizeof(double) == 0; }
// Copies a packed field of doubles, of which there are packed.size() / sizeof(double).
inline void CopyDoubles(const BytePieces& packed, double* to) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  packed.CopyTo(to);
}

}  // namespace syncbn::wire

#endif  // SYNCBN_VOCABULARY_WIRE_READ_H_
