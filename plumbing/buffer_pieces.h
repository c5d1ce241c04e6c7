// The bytes of a message that gRPC has received, where they are.

#ifndef SYNCBN_PLUMBING_BUFFER_PIECES_H_
#define SYNCBN_PLUMBING_BUFFER_PIECES_H_

#include <cstddef>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "plumbing/byte_pieces.h"

namespace syncbn {

// Lists the slices of a buffer. A message of very short slices, as a peer may send it, is copied into one piece: the
// list never takes more than a small part of the message's own length.
//
// *Thread safety*: none.
class BufferPieces {
 public:
  // `buffer` must outlive this, and stay as it is.
  explicit BufferPieces(grpc::ByteBuffer* buffer) {
    grpc::ProtoBufferReader slices(buffer);
    const void* data = nullptr;
    int size = 0;
    while (slices.Next(&data, &size)) Add({static_cast<const char*>(data), static_cast<size_t>(size)});
    if (!joined_.empty()) pieces_.assign(1, joined_);
  }
  BufferPieces(const BufferPieces&) = delete;
  BufferPieces& operator=(const BufferPieces&) = delete;

  absl::Span<const absl::string_view> pieces() const { return pieces_; }
  BytePieces bytes() const { return BytePieces(pieces()); }

 private:
  static constexpr size_t kFewPieces = 64;
  static constexpr size_t kShortPiece = 1024;

  void Add(absl::string_view piece) {
    bytes_ += piece.size();
    if (joined_.empty() && (pieces_.size() < kFewPieces || pieces_.size() < bytes_ / kShortPiece)) {
      pieces_.push_back(piece);
      return;
    }
    for (const absl::string_view before : pieces_) joined_.append(before.data(), before.size());
    pieces_.clear();
    joined_.append(piece.data(), piece.size());
  }

  size_t bytes_ = 0;
  absl::InlinedVector<absl::string_view, 4> pieces_;
  std::string joined_;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_BUFFER_PIECES_H_
