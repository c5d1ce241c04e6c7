// A worker's frame, taken apart piece by piece: what is in it is counted before it is parsed, and its contributions are
// parsed a few at a time.

#ifndef SYNCBN_SERVER_RPC_FRAME_READER_H_
#define SYNCBN_SERVER_RPC_FRAME_READER_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "google/protobuf/arena.h"
#include "google/protobuf/io/coded_stream.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "server/core/coordinator.h"
#include "server/core/limits.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::rpc {

// Limits of one slice of a frame. A contribution that is longer than `bytes` is a slice of its own.
struct SliceLimits {
  size_t contributions = 256;
  size_t bytes = size_t{1} << 20;
  // A contribution that is longer than this is malformed.
  size_t longest_contribution = SIZE_MAX;
};

// Holds the frame's bytes, and beyond them memory for one slice. A frame of empty messages or of unknown fields is
// refused by their number, which is known before memory is spent on them.
//
// Thread safety: none.
class FrameReader {
 public:
  FrameReader(grpc::ByteBuffer frame, const core::Limits& limits);
  FrameReader(const FrameReader&) = delete;
  FrameReader& operator=(const FrameReader&) = delete;

  // Reads all but the contributions, which it counts. To be called once, first. Errors: MALFORMED_FRAME,
  // LIMIT_EXCEEDED.
  std::optional<core::Error> Open();

  // After Open. Its contributions are empty.
  const core::FrameReceived& head() const { return head_; }
  size_t contributions() const { return contributions_; }
  // Returns whether Next was called.
  bool begun() const { return begun_; }
  // Returns whether Next has read all contributions.
  bool done() const { return read_ == contributions_; }

  // Fills the event with the next contributions, and with what else is in the frame where it belongs: join and layers
  // in the first slice, blocked_on and leave in the last. The contributions point into messages on `arena`. Errors: as
  // Open.
  std::optional<core::Error> Next(const SliceLimits& slice, google::protobuf::Arena* arena, core::FrameReceived* event);

 private:
  using Input = google::protobuf::io::CodedInputStream;

  // Adds one of the frame's fields, a contribution excepted, to the head, or to what will be converted to it.
  std::optional<core::Error> TakePiece(int number, absl::string_view piece, v1::Join* join, v1::Leave* leave);
  core::Error TooManyRounds() const;
  // Moves to the next contribution and returns its length; nothing if there is none.
  std::optional<int> FindContribution();

  const core::Limits& limits_;
  grpc::ByteBuffer frame_;
  std::optional<grpc::ProtoBufferReader> bytes_;
  std::optional<Input> input_;
  core::FrameReceived head_;
  size_t contributions_ = 0;
  size_t read_ = 0;
  std::optional<int> pending_length_;  // Of a contribution that was found, and did not fit into the slice.
  bool begun_ = false;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_FRAME_READER_H_
