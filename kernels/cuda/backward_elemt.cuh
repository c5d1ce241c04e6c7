// BatchNormBackwardElemt: dx = scale * (dy - mean_dy - (x - mean) * projection), where dy counts as 0 where ReLU's gate
// is shut, and the gated dy itself for the branch that was added.
//
// Mapping, and why it is deterministic: elementwise.cuh.
// Bytes moved: dy, x and dx once; d_residual once if it is wanted; the mask, if there is one, an eighth of a byte an
//   element.
// Registers: 4 for each channel of a thread, and 3 more if the gate recomputes; 16 (planes) or 32 (rows) for the
//   vectors under way.

#ifndef SYNCBN_KERNELS_CUDA_BACKWARD_ELEMT_CUH_
#define SYNCBN_KERNELS_CUDA_BACKWARD_ELEMT_CUH_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

// Bytes read for a vector, as Unroll() takes them. In rows of a 16-bit type, a thread that recomputes the gate has 56
// coefficients in registers, which leaves room for half as many vectors: hence twice the bytes.
SYNCBN_HOST_DEVICE constexpr int BackwardElemtBytes(Gate gate, size_t element_bytes) {
  return gate == Gate::kRecompute && element_bytes == 2 ? 64 : 32;
}

struct BackwardElemtArguments {
  ElementPlan plan;
  const void* dy = nullptr;
  const void* x = nullptr;
  BackwardCoefficients coefficients;
  ReluGate gate;
  void* dx = nullptr;
  void* d_residual = nullptr;
  bool aligned = false;  // All tensors lie on 16-byte boundaries.
};

template <Gate kGate, typename A>
struct GatedLane {
  BackwardLane<A> backward;
  SYNCBN_HOST_DEVICE bool Open(A, bool masked) const { return kGate == Gate::kNone || masked; }
  SYNCBN_HOST_DEVICE static GatedLane At(const BackwardElemtArguments& arguments, int64_t channel) {
    return {BackwardLane<A>::At(arguments.coefficients, channel)};
  }
};
template <typename A>
struct GatedLane<Gate::kRecompute, A> {
  BackwardLane<A> backward;
  ForwardLane<A> forward;
  SYNCBN_HOST_DEVICE bool Open(A x, bool) const { return forward(x) > A{0}; }
  SYNCBN_HOST_DEVICE static GatedLane At(const BackwardElemtArguments& arguments, int64_t channel) {
    return {BackwardLane<A>::At(arguments.coefficients, channel), ForwardLane<A>::At(arguments.gate.forward, channel)};
  }
};

template <Gate kGate, typename T>
struct BackwardElemtOp {
  static constexpr int kWidth = static_cast<int>(16 / sizeof(T));
  static constexpr int kBytes = BackwardElemtBytes(kGate, sizeof(T));
  using A = Accumulator<T>;
  using Lane = GatedLane<kGate, A>;

  struct Input {
    Vector<T, kWidth> dy;
    Vector<T, kWidth> x;
    uint32_t mask;
  };

  const BackwardElemtArguments& arguments;

  SYNCBN_HOST_DEVICE Lane LaneAt(int64_t channel) const { return Lane::At(arguments, channel); }

  SYNCBN_HOST_DEVICE void Read(int64_t first, Input* input) const {
    Load(static_cast<const T*>(arguments.dy), first, arguments.plan.size, arguments.aligned, &input->dy);
    Load(static_cast<const T*>(arguments.x), first, arguments.plan.size, arguments.aligned, &input->x);
    input->mask = kGate == Gate::kMask ? MaskBits(arguments.gate.mask, first) : 0;
  }

  template <typename LaneOf>
  SYNCBN_HOST_DEVICE void Write(int64_t first, const Input& input, LaneOf lane_of) const {
    Vector<T, kWidth> dx;
    dx.Clear();
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const Lane lane = lane_of(v);
      const A x = input.x.Get(v);
      const A dy = lane.Open(x, input.mask >> v & 1) ? input.dy.Get(v) : A{0};
      dx.Set(v, Narrow<T>::From(lane.backward(dy, x)));
    }
    Store(dx, first, arguments.plan.size, arguments.aligned, static_cast<T*>(arguments.dx));
    if (arguments.d_residual == nullptr) return;
    // A second look at the gate costs less than the registers that would carry both results at once.
    Vector<T, kWidth> gated;
    gated.Clear();
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const bool open = lane_of(v).Open(input.x.Get(v), input.mask >> v & 1);
      gated.Set(v, Narrow<T>::From(open ? input.dy.Get(v) : A{0}));
    }
    Store(gated, first, arguments.plan.size, arguments.aligned, static_cast<T*>(arguments.d_residual));
  }
};

// The work of one block.
template <Mapping kMapping, Gate kGate, typename T, typename Block>
SYNCBN_HOST_DEVICE inline void BackwardElemtOfBlock(Block& block, const BackwardElemtArguments& arguments) {
  using Op = BackwardElemtOp<kGate, T>;
  ElementsOfBlock<kMapping>(block, arguments.plan, Op{arguments});
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_BACKWARD_ELEMT_CUH_
