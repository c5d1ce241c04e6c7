// A contribution on its way out: the caller's vectors as bytes of the protocol.

#ifndef SYNCBN_CLIENT_CC_CONTRIBUTION_H_
#define SYNCBN_CLIENT_CC_CONTRIBUTION_H_

#include <cstdint>

#include "absl/types/span.h"
#include "client/cc/buffer.h"
#include "client/cc/session/types.h"

namespace syncbn {

// The numbers of a contribution. `first` and `second` are, by phase: mean and m2; sum_dy and sum_dy_xmu; the vector,
// and nothing. They point into the caller's memory.
struct Payload {
  int64_t count = 0;                                     // Forward only.
  BackwardRole backward_role = BackwardRole::kRequired;  // Forward only.
  absl::Span<const double> first;
  absl::Span<const double> second;
};

// Returns a v1::WorkerFrame with this contribution alone, as protobuf would serialize it, but with one copy of the
// vectors instead of two. Such frames may follow each other in one: their parts add up.
Buffer EncodeContribution(const RoundKey& key, const Payload& payload);

// Returns a v1::WorkerFrame that only says that the worker is blocked on this round, as protobuf would serialize it.
Buffer EncodeBlockedOn(const RoundKey& key);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CONTRIBUTION_H_
