// Protobuf messages as the byte buffers of gRPC's generic and raw calls.

#ifndef SYNCBN_PLUMBING_MESSAGES_H_
#define SYNCBN_PLUMBING_MESSAGES_H_

#include <cstddef>
#include <cstdint>

#include "google/protobuf/arena.h"
#include "google/protobuf/message_lite.h"
#include "grpc/slice.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"

namespace syncbn {

// Returns the message's encoding in one slice, whose memory is allocated once.
inline grpc::ByteBuffer SerializeToBuffer(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(grpc_slice_malloc(message.ByteSizeLong()), grpc::Slice::STEAL_REF);
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

// An arena for one frame, to live on the stack: messages of up to 512 channels need nothing from the heap.
class FrameArena {
 public:
  google::protobuf::Arena* get() { return &arena_; }

  // Returns a message that lives as long as the arena.
  template <typename Message>
  Message* Create() {
    return google::protobuf::Arena::CreateMessage<Message>(&arena_);
  }

 private:
  alignas(8) char block_[(size_t{8} << 10) + 512];
  google::protobuf::Arena arena_{block_, sizeof(block_)};
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_MESSAGES_H_
