// The bytes of frames that one connection has not taken yet.

#ifndef SYNCBN_SERVER_RPC_UNREAD_BYTES_H_
#define SYNCBN_SERVER_RPC_UNREAD_BYTES_H_

#include <cstddef>
#include <memory>

namespace syncbn::rpc {

// A frame that goes to several streams of the connection is in memory once, and counts once.
//
// Thread safety: none; the caller serializes.
class UnreadBytes : public std::enable_shared_from_this<UnreadBytes> {
 public:
  // Stands for a frame. It counts until the last copy is gone.
  using Charge = std::shared_ptr<const void>;

  UnreadBytes() = default;
  UnreadBytes(const UnreadBytes&) = delete;
  UnreadBytes& operator=(const UnreadBytes&) = delete;

  size_t bytes() const { return bytes_; }

  // Returns the charge of a frame of so many bytes.
  Charge Add(size_t bytes) {
    bytes_ += bytes;
    return Charge(this, [owner = shared_from_this(), bytes](const void*) { owner->bytes_ -= bytes; });
  }

 private:
  size_t bytes_ = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_UNREAD_BYTES_H_
