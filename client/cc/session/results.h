// Checks what a master sends as the result of a round.

#ifndef SYNCBN_CLIENT_CC_SESSION_RESULTS_H_
#define SYNCBN_CLIENT_CC_SESSION_RESULTS_H_

#include <cstddef>

#include "absl/status/status.h"
#include "client/cc/session/types.h"

namespace syncbn::session {

// Returns OK for a result that a merge of contributions can give, otherwise INTERNAL, naming the layer and what is
// wrong.
//
// `payload`: the kind of result that the master sent. `length`: that of its vectors; 0 if only the master knows it.
// `finite`: the layer's policy refuses NaN and infinity.
absl::Status CheckResult(const RoundKey& key, Phase payload, size_t length, bool finite, const RoundResult& result);

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_RESULTS_H_
