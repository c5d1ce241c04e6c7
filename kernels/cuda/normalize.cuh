// BatchNormElemt: y = (x - mean) * scale + shift [+ residual] [then ReLU], rounded once.
//
// Mapping, and why it is deterministic: elementwise.cuh.
// Bytes moved: x and y once, and the residual once if there is one; the ReLU mask, if it is wanted, an eighth of a byte
//   an element. With a mask a thread owns 8 consecutive elements, so that no two threads write bits of one byte.
// Registers: 3 for each channel of a thread, and 16 (planes) or 32 (rows) for the vectors under way.
// The stores ask to leave the cache first: y is not read again by this operation, x may be by the backward pass.

#ifndef SYNCBN_KERNELS_CUDA_NORMALIZE_CUH_
#define SYNCBN_KERNELS_CUDA_NORMALIZE_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/batch_norm.h"
#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

// The addition after the normalization, before any ReLU: none; a residual; a residual, with a mask of the outcome.
enum class Addition : uint8_t { kNone = 0, kResidual = 1, kResidualAndMask = 2 };

inline Addition AdditionOf(const Epilogue& epilogue) {
  if (epilogue.relu && epilogue.relu_mask != nullptr) return Addition::kResidualAndMask;
  return epilogue.residual != nullptr ? Addition::kResidual : Addition::kNone;
}

SYNCBN_HOST_DEVICE constexpr int ElemtWidth(Addition addition, size_t element_bytes) {
  return addition == Addition::kResidualAndMask ? 8 : static_cast<int>(16 / element_bytes);
}

// Bytes read for a vector.
SYNCBN_HOST_DEVICE constexpr int ElemtBytes(Addition addition, size_t element_bytes) {
  return ElemtWidth(addition, element_bytes) * static_cast<int>(element_bytes) * (addition == Addition::kNone ? 1 : 2);
}

struct ElemtArguments {
  ElementPlan plan;
  const void* x = nullptr;
  ForwardCoefficients coefficients;
  Epilogue epilogue;
  void* y = nullptr;
  bool aligned = false;  // x, y and the residual lie on 16-byte boundaries.
};

template <Addition kAddition, typename T>
struct ElemtOp {
  static constexpr int kWidth = ElemtWidth(kAddition, sizeof(T));
  static constexpr int kBytes = ElemtBytes(kAddition, sizeof(T));
  using A = Accumulator<T>;
  using Lane = ForwardLane<A>;

  struct Plain {
    Vector<T, kWidth> x;
  };
  struct WithResidual {
    Vector<T, kWidth> x;
    Vector<T, kWidth> residual;
  };
  using Input = std::conditional_t<kAddition == Addition::kNone, Plain, WithResidual>;

  const ElemtArguments& arguments;

  SYNCBN_HOST_DEVICE Lane LaneAt(int64_t channel) const { return Lane::At(arguments.coefficients, channel); }

  SYNCBN_HOST_DEVICE void Read(int64_t first, Input* input) const {
    Load(static_cast<const T*>(arguments.x), first, arguments.plan.size, arguments.aligned, &input->x);
    if constexpr (kAddition == Addition::kResidual) {
      Load(static_cast<const T*>(arguments.epilogue.residual), first, arguments.plan.size, arguments.aligned,
           &input->residual);
    } else if constexpr (kAddition == Addition::kResidualAndMask) {
      if (arguments.epilogue.residual != nullptr) {
        Load(static_cast<const T*>(arguments.epilogue.residual), first, arguments.plan.size, arguments.aligned,
             &input->residual);
      } else {
        input->residual.Clear();
      }
    }
  }

  template <typename LaneOf>
  SYNCBN_HOST_DEVICE void Write(int64_t first, const Input& input, LaneOf lane_of) const {
    Vector<T, kWidth> y;
    y.Clear();
    uint32_t positive = 0;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      A value = lane_of(v)(input.x.Get(v));
      if constexpr (kAddition != Addition::kNone) value += input.residual.Get(v);
      if constexpr (kAddition == Addition::kResidualAndMask) {
        if (value > A{0} && first + v < arguments.plan.size) positive |= 1u << v;
      }
      if (arguments.epilogue.relu && value < A{0}) value = A{0};  // A NaN passes.
      y.Set(v, Narrow<T>::From(value));
    }
    Store(y, first, arguments.plan.size, arguments.aligned, static_cast<T*>(arguments.y));
    if constexpr (kAddition == Addition::kResidualAndMask) {
      arguments.epilogue.relu_mask[first >> 3] = static_cast<uint8_t>(positive);
    }
  }
};

// The work of one block.
template <Mapping kMapping, Addition kAddition, typename T, typename Block>
SYNCBN_HOST_DEVICE inline void ElemtOfBlock(Block& block, const ElemtArguments& arguments) {
  using Op = ElemtOp<kAddition, T>;
  ElementsOfBlock<kMapping>(block, arguments.plan, Op{arguments});
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_NORMALIZE_CUH_
