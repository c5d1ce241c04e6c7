// The use of epsilon that keeps the inverse standard deviation finite. The numbers are those of EpsMode in
// statistics.proto.

#ifndef SYNCBN_KERNELS_EPS_MODE_H_
#define SYNCBN_KERNELS_EPS_MODE_H_

#include <cstdint>

namespace syncbn {

enum class EpsMode : uint8_t {
  kAdd = 1,    // 1/sqrt(var + eps), as torch has it.
  kClamp = 2,  // 1/sqrt(max(var, eps)), as Synchronized-BatchNorm-PyTorch has it.
};

}  // namespace syncbn

#endif  // SYNCBN_KERNELS_EPS_MODE_H_
