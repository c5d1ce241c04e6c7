// The lengths of the chunks that a long vector is cut into: proto/PROTOCOL.md, section 4, "Names of sums".

#ifndef SYNCBN_CLIENT_CC_SESSION_CHUNKS_H_
#define SYNCBN_CLIENT_CC_SESSION_CHUNKS_H_

#include <cstddef>

namespace syncbn::session {

// The lengths are the protocol's, so that all workers of a group cut alike. In numbers of elements.
struct ChunkLimits {
  // 128 KiB: the master merges a chunk and answers it within a millisecond or so, and then turns to others.
  size_t least = size_t{1} << 14;
  // The most that masters accept by default.
  size_t most = size_t{1} << 20;
  // No further chunk is sent while so much is unanswered, and kLeastChunksUnderWay are: 2 MiB, half of what masters
  // keep by default for a worker that has to ask again.
  size_t under_way = size_t{1} << 18;
};

// Each chunk is a layer, of which a group has 8,192 by default, so that longer vectors have longer chunks.
inline constexpr size_t kMostShortChunks = 128;
// Masters keep the newest 4 results, however large, for a worker that has to ask again.
inline constexpr size_t kLeastChunksUnderWay = 4;

// Returns the elements of each chunk but the last of a vector of `length`, at least 1: `least`, or for a vector of more
// than 128 of these `least` times the smallest power of two that makes no more than 128, and `most` at most. A vector
// that is no longer than that is not cut.
constexpr size_t ChunkElements(size_t length, const ChunkLimits& limits) {
  size_t elements = limits.least;
  while (elements < limits.most && (length - 1) / kMostShortChunks >= elements) elements *= 2;
  return elements;
}

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_CHUNKS_H_
