// The words that workers, masters and the wire have in common. The numbers are those of the enums of the same names in
// proto/syncbn/v1/statistics.proto, whose comments say what each word means.

#ifndef SYNCBN_VOCABULARY_ENUMS_H_
#define SYNCBN_VOCABULARY_ENUMS_H_

#include <cstdint>

#include "kernels/eps_mode.h"

namespace syncbn {

enum class Phase : uint8_t { kForward = 1, kBackward = 2, kSum = 3 };
enum class MissingPolicy : uint8_t { kFail = 1, kProceed = 2, kWait = 3 };
enum class LayerKind : uint8_t { kBatchNorm = 1, kSum = 2 };
enum class NumericPolicy : uint8_t { kRefuse = 1, kPropagate = 2 };
enum class BackwardRole : uint8_t { kRequired = 1, kIfRequired = 2, kNone = 3 };

// The names of the wire, without their prefixes.
constexpr const char* Name(Phase phase) {
  return phase == Phase::kForward ? "FORWARD" : phase == Phase::kBackward ? "BACKWARD" : "SUM";
}
constexpr const char* Name(MissingPolicy policy) {
  return policy == MissingPolicy::kProceed ? "PROCEED" : policy == MissingPolicy::kWait ? "WAIT" : "FAIL";
}
constexpr const char* Name(LayerKind kind) { return kind == LayerKind::kSum ? "SUM" : "BATCH_NORM"; }
constexpr const char* Name(EpsMode mode) { return mode == EpsMode::kClamp ? "CLAMP" : "ADD"; }
constexpr const char* Name(NumericPolicy policy) {
  return policy == NumericPolicy::kPropagate ? "PROPAGATE" : "REFUSE";
}

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_ENUMS_H_
