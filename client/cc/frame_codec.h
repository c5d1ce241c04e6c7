// The session's frames as bytes of the protocol (proto/syncbn/v1/statistics.proto), and back.

#ifndef SYNCBN_CLIENT_CC_FRAME_CODEC_H_
#define SYNCBN_CLIENT_CC_FRAME_CODEC_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "client/cc/buffer.h"
#include "client/cc/session/frame.h"
#include "client/cc/worker.h"
#include "plumbing/vector_pool.h"

namespace syncbn {

// A contribution that is encoded when it is begun, and sent as often as it must be.
class EncodedContribution : public session::Contribution {
 public:
  EncodedContribution(RoundKey key, Buffer encoded)
      : Contribution(std::move(key), encoded.size()), encoded_(std::move(encoded)) {}

  const Buffer& encoded() const { return encoded_; }

 private:
  const Buffer encoded_;
};

// Appends the frame's parts to `parts`: the encodings of its contributions, which must be EncodedContributions, and
// what comes before and after them. `options`: what the join of this worker says in addition to the frame's.
// `life_key`: the secret of this worker's life.
void EncodeFrame(const session::ClientFrame& frame, const Worker::Options& options, const std::string& life_key,
                 std::vector<Buffer>* parts);

// Reads a master's frame, which consists of these parts. Takes the memory of results from `spare`, as far as there is
// any. *Errors*: INTERNAL if it is not a syncbn.v1.MasterFrame.
absl::StatusOr<session::ServerFrame> DecodeFrame(absl::Span<const absl::string_view> parts, VectorPool* spare);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_FRAME_CODEC_H_
