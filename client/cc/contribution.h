// A contribution on its way out: the caller's vectors as bytes of the protocol.

#ifndef SYNCBN_CLIENT_CC_CONTRIBUTION_H_
#define SYNCBN_CLIENT_CC_CONTRIBUTION_H_

#include <cstdint>

#include "absl/types/span.h"
#include "grpcpp/support/slice.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {

// What a worker contributes to the round `key`. `first` and `second` are, by phase: mean and m2; sum_dy and sum_dy_xmu;
// the vector, and nothing. They point into the caller's memory.
struct OutgoingContribution {
  v1::RoundKey key;
  int64_t count = 0;                                               // Forward only.
  v1::BackwardRole backward_role = v1::BACKWARD_ROLE_UNSPECIFIED;  // Forward only.
  absl::Span<const double> first;
  absl::Span<const double> second;
};

// A v1::WorkerFrame with this contribution alone, as protobuf would serialize it, but with one copy of the vectors
// instead of two.
grpc::Slice Encode(const OutgoingContribution& contribution);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CONTRIBUTION_H_
