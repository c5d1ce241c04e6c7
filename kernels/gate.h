// The kinds of ReluGate, as template arguments of the backward kernels.

#ifndef SYNCBN_KERNELS_GATE_H_
#define SYNCBN_KERNELS_GATE_H_

#include <cstdint>

#include "kernels/batch_norm.h"

namespace syncbn::kernels {

enum class Gate : uint8_t {
  kNone = 0,       // There was no ReLU: every gradient passes.
  kMask = 1,       // The forward pass's mask says which gradients pass.
  kRecompute = 2,  // The forward pass's output, computed again, says it.
};

inline Gate KindOf(const ReluGate& gate) {
  if (gate.mask != nullptr) return Gate::kMask;
  return gate.forward.mean != nullptr ? Gate::kRecompute : Gate::kNone;
}

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_GATE_H_
