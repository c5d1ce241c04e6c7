// Parses a worker's frame piece by piece: the number of its fields is checked before any is parsed, and contributions
// are parsed a few at a time.

#ifndef SYNCBN_SERVER_RPC_FRAME_READER_H_
#define SYNCBN_SERVER_RPC_FRAME_READER_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "google/protobuf/arena.h"
#include "grpcpp/support/byte_buffer.h"
#include "plumbing/buffer_pieces.h"
#include "plumbing/wire_reader.h"
#include "server/core/coordinator.h"
#include "server/core/limits.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::rpc {

// Limits of one slice of a frame. A contribution longer than `bytes` forms a slice of its own.
struct SliceLimits {
  size_t contributions = 256;
  size_t bytes = size_t{1} << 20;
  // A contribution that is longer than this is malformed.
  size_t longest_contribution = SIZE_MAX;
};

// Holds the frame's bytes and the memory of one slice, no more. A frame of many empty messages or unknown fields is
// refused by their number, before memory is spent on them.
//
// Thread safety: none.
class FrameReader {
 public:
  FrameReader(grpc::ByteBuffer&& frame, const core::Limits& limits);
  FrameReader(const FrameReader&) = delete;
  FrameReader& operator=(const FrameReader&) = delete;

  // Reads everything but the contributions, which it counts. To be called once, before anything else.
  // Errors: MALFORMED_FRAME, LIMIT_EXCEEDED.
  std::optional<core::Error> Open();

  // The frame without its contributions. Valid after Open.
  const core::FrameReceived& head() const { return head_; }
  size_t contributions() const { return contributions_; }
  size_t bytes() const { return frame_.Length(); }
  // Returns whether Next was called.
  bool begun() const { return fields_.has_value(); }
  // Returns whether Next has read all contributions.
  bool done() const { return read_ == contributions_; }

  // Fills the event with the next contributions; in the first slice with join and layers, in the last with blocked_on
  // and leave. The contributions point into messages on `arena`. Errors: those of Open.
  std::optional<core::Error> Next(const SliceLimits& slice, google::protobuf::Arena* arena, core::FrameReceived* event);

 private:
  // Adds one of the frame's fields, other than a contribution, to the head or to the messages that it is made of.
  std::optional<core::Error> TakePiece(int number, absl::string_view piece, v1::Join* join, v1::Leave* leave);
  // Takes a field of the frame that is a number, or one of several.
  std::optional<core::Error> TakeNumber(int number, uint64_t value);
  // Add to `left_ranks`.
  std::optional<core::Error> TakeRank(core::Rank rank);
  std::optional<core::Error> TakeRanks(absl::string_view packed);
  core::Error TooManyRounds() const;
  // Moves to the next contribution. Returns false if there is none.
  bool FindContribution();

  const core::Limits& limits_;
  grpc::ByteBuffer frame_;
  std::optional<BufferPieces> pieces_;
  std::optional<WireReader> fields_;  // Once Next was called.
  core::FrameReceived head_;
  size_t contributions_ = 0;
  size_t read_ = 0;
  bool pending_ = false;  // `fields_` is at a contribution that did not fit into the slice.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_FRAME_READER_H_
