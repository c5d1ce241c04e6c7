// BatchNormBackwardReduce: from dy and x to the sums of dy and of dy * (x - mean) of each channel.
//
// Mapping: plan.h, as for the statistics. A thread asks for 2 (planes) or 4 (rows) vectors of each tensor at a time.
// Bytes moved: dy and x once; with a mask, an eighth of a byte an element more. A gate that recomputes the forward pass
//   reads nothing: it has x.
// Registers: a channel takes 5 (hi, and two sums in float64) and 3 more if the gate recomputes; the same bounds as for
//   the statistics.
// Numerics: x - hi, where hi is the mean rounded to the working precision; the rounding error is one term in float64 at
//   the end: sum dy*(x - mean) = sum dy*(x - hi) - (mean - hi) * sum dy. Batches of up to 32 in float32, then
//   float64.
// Deterministic: as the statistics.

#ifndef SYNCBN_KERNELS_CUDA_BACKWARD_REDUCE_CUH_
#define SYNCBN_KERNELS_CUDA_BACKWARD_REDUCE_CUH_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/plane_vector.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

struct BackwardReduceArguments {
  ReducePlan plan;
  const void* dy = nullptr;
  const void* x = nullptr;
  bool aligned = false;  // Both lie on a 16-byte boundary.
  const double* mean = nullptr;
  ReluGate gate;
  double* sum_dy = nullptr;
  double* sum_dy_xmu = nullptr;
  ReduceWorkspace workspace;
};

// One channel's coefficients in a thread: the rounded mean, and the forward pass's if the gate recomputes it.
template <Gate kGate, typename A>
struct ReduceLane {
  A hi;
  SYNCBN_HOST_DEVICE void Init(const BackwardReduceArguments& arguments, int64_t channel) {
    hi = static_cast<A>(arguments.mean[channel]);
  }
  SYNCBN_HOST_DEVICE bool Open(A, bool masked) const { return kGate == Gate::kNone || masked; }
};
template <typename A>
struct ReduceLane<Gate::kRecompute, A> {
  A hi;
  ForwardLane<A> forward;
  SYNCBN_HOST_DEVICE void Init(const BackwardReduceArguments& arguments, int64_t channel) {
    hi = static_cast<A>(arguments.mean[channel]);
    forward = ForwardLane<A>::At(arguments.gate.forward, channel);
  }
  SYNCBN_HOST_DEVICE bool Open(A x, bool) const { return forward(x) > A{0}; }
};

// One vector of each tensor.
template <typename T, int kWidth>
struct GradientPair {
  Vector<T, kWidth> dy;
  Vector<T, kWidth> x;
  uint32_t mask;

  template <Gate kGate>
  SYNCBN_HOST_DEVICE void LoadFrom(const BackwardReduceArguments& arguments, int64_t first) {
    Load(static_cast<const T*>(arguments.dy), first, arguments.plan.size, arguments.aligned, &dy);
    Load(static_cast<const T*>(arguments.x), first, arguments.plan.size, arguments.aligned, &x);
    mask = kGate == Gate::kMask ? MaskBits(arguments.gate.mask, first) : 0;
  }
  // Requires both vectors to be whole and on 16-byte boundaries.
  template <Gate kGate>
  SYNCBN_HOST_DEVICE void LoadWholeFrom(const BackwardReduceArguments& arguments, int64_t first) {
    LoadWhole(static_cast<const T*>(arguments.dy) + first, &dy);
    LoadWhole(static_cast<const T*>(arguments.x) + first, &x);
    mask = kGate == Gate::kMask ? MaskBits(arguments.gate.mask, first) : 0;
  }
  SYNCBN_HOST_DEVICE void Clear() {
    dy.Clear();
    x.Clear();
    mask = 0;
  }
};

// Adds one element to a batch's sums. `valid`: whether it counts.
template <typename Lane, typename A>
SYNCBN_HOST_DEVICE inline void AddGradient(const Lane& lane, A dy, A x, bool masked, bool valid, A* sum, A* sum_xmu) {
  const bool counts = valid && lane.Open(x, masked);
  const A gradient = counts ? dy : A{0};
  const A distance = counts ? x - lane.hi : A{0};  // 0 * infinity would be NaN.
  *sum += gradient;
  *sum_xmu = FusedMultiplyAdd(gradient, distance, *sum_xmu);
}

// Adds a batch's vectors to the sums of their channels. `n`: how many vectors count.
template <typename T, int kWidth, int kUnroll, typename Lane>
SYNCBN_HOST_DEVICE inline void AddPairs(const Lane* lanes, const GradientPair<T, kWidth>* pairs, int n, Sums* sums) {
  using A = Accumulator<T>;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    A sum = 0;
    A sum_xmu = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      AddGradient(lanes[v], pairs[u].dy.Get(v), pairs[u].x.Get(v), pairs[u].mask >> v & 1, u < n, &sum, &sum_xmu);
    }
    sums[v].word[0] += static_cast<double>(sum);
    sums[v].word[1] += static_cast<double>(sum_xmu);
  }
}

// One thread's share of tensors in rows.
template <Gate kGate, typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void GradientOfColumn(const BackwardReduceArguments& arguments, int64_t tile, int split,
                                                Place at, Sums* sums) {
  constexpr int kUnroll = Unroll(Mapping::kRows, 32);
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const int64_t column = tile * plan.tile_columns + at.column;
  if (column >= plan.columns) return;
  const int64_t step = plan.members * plan.columns * kWidth;  // From one vector of a batch to the next.
  GradientPair<T, kWidth> pairs[kUnroll];
  const auto read = [&](int64_t batch) {
    const int64_t row = batch * plan.members * kUnroll + at.member;
    if (arguments.aligned && row + (kUnroll - 1) * plan.members < plan.rows) {
      const int64_t first = (row * plan.columns + column) * kWidth;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pairs[u].template LoadWholeFrom<kGate>(arguments, first + u * step);
      return kUnroll;
    }
    int n = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * plan.members;
      if (r < plan.rows) {
        pairs[u].template LoadFrom<kGate>(arguments, (r * plan.columns + column) * kWidth);
        n = u + 1;
      } else {
        pairs[u].Clear();
      }
    }
    return n;
  };
  // The first batch is asked for before the coefficients, so that both are under way at once.
  int64_t batch = split;
  int n = batch < plan.batches ? read(batch) : 0;
  ReduceLane<kGate, A> lanes[kWidth];
  EachChannelOfColumn<kWidth>(plan, column, [&](int v, int64_t channel) { lanes[v].Init(arguments, channel); });
  while (n > 0) {
    AddPairs<T, kWidth, kUnroll>(lanes, pairs, n, sums);
    batch += plan.splits;
    n = batch < plan.batches ? read(batch) : 0;
  }
  if (split != 0 || at.member != 0 || plan.tail <= column * kWidth) return;
  // The rest of the last row is one more value for some columns.
  GradientPair<T, kWidth> pair;
  pair.template LoadFrom<kGate>(arguments, (plan.rows * plan.columns + column) * kWidth);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    A sum = 0;
    A sum_xmu = 0;
    AddGradient(lanes[v], pair.dy.Get(v), pair.x.Get(v), pair.mask >> v & 1, v < plan.tail - column * kWidth, &sum,
                &sum_xmu);
    sums[v].word[0] += static_cast<double>(sum);
    sums[v].word[1] += static_cast<double>(sum_xmu);
  }
}

// One thread's share of tensors in planes.
template <Gate kGate, typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void GradientOfPlanes(const BackwardReduceArguments& arguments, int64_t tile, int split,
                                                Place at, Sums* sums) {
  constexpr int kUnroll = Unroll(Mapping::kPlanes, 32);
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const int64_t channel = tile * plan.tile_columns + at.column;
  if (channel >= plan.channels || split >= plan.batches) return;
  const bool whole = plan.whole && arguments.aligned;
  GradientPair<T, kWidth> pairs[kUnroll];
  const auto read = [&](int64_t batch) {
    const int64_t unit = batch * plan.members * kUnroll + at.member;
    if (whole && unit + (kUnroll - 1) * plan.members < plan.units) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        pairs[u].template LoadWholeFrom<kGate>(arguments,
                                               FindWholePlaneVector(plan, channel, unit + u * plan.members, kWidth));
      }
      return ~0u;
    }
    uint32_t valid = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const PlaneVector vector = FindPlaneVector(plan, channel, unit + u * plan.members, kWidth);
      if (vector.valid != 0) {
        pairs[u].template LoadFrom<kGate>(arguments, vector.first);
      } else {
        pairs[u].Clear();
      }
      valid |= vector.valid << (u * kWidth);
    }
    return valid;
  };
  // The first batch is asked for before the coefficients, so that both are under way at once.
  uint32_t valid = read(split);
  ReduceLane<kGate, A> lane;
  lane.Init(arguments, channel);
  for (int64_t batch = split;;) {
    A sum = 0;
    A sum_xmu = 0;
#pragma unroll
    for (int i = 0; i < kUnroll * kWidth; ++i) {
      const int u = i / kWidth;
      const int v = i % kWidth;
      AddGradient(lane, pairs[u].dy.Get(v), pairs[u].x.Get(v), pairs[u].mask >> v & 1, valid >> i & 1, &sum, &sum_xmu);
    }
    sums[0].word[0] += static_cast<double>(sum);
    sums[0].word[1] += static_cast<double>(sum_xmu);
    batch += plan.splits;
    if (batch >= plan.batches) return;
    valid = read(batch);
  }
}

// From the sums of a channel to what the operation says.
template <typename A>
struct GradientOutput {
  const BackwardReduceArguments& arguments;

  SYNCBN_HOST_DEVICE double Prepare(int64_t channel) const { return arguments.mean[channel]; }
  SYNCBN_HOST_DEVICE void Write(int64_t channel, double mean, const Sums& sums) const {
    arguments.sum_dy[channel] = sums.word[0];
    arguments.sum_dy_xmu[channel] = fma(static_cast<double>(static_cast<A>(mean)) - mean, sums.word[0], sums.word[1]);
  }
};

// The work of one block.
template <Mapping kMapping, Gate kGate, typename T, typename Block>
SYNCBN_HOST_DEVICE inline void BackwardReduceOfBlock(Block& block, const BackwardReduceArguments& arguments) {
  constexpr int kWidth = static_cast<int>(16 / sizeof(T));
  constexpr int kValues = ValuesOfThread<kMapping, T>();
  using State = typename Block::StateType;
  const ReducePlan& plan = arguments.plan;
  const GradientOutput<Accumulator<T>> output{arguments};
  block.Each([&](int thread, State& state) {
    const Place at = PlaceOf<kMapping>(plan, thread);
    Sums sums[kValues];
    if constexpr (kMapping == Mapping::kRows) {
      GradientOfColumn<kGate, T, kWidth>(arguments, block.tile(), block.split(), at, sums);
    } else {
      GradientOfPlanes<kGate, T, kWidth>(arguments, block.tile(), block.split(), at, sums);
    }
    StoreSums<kValues>(block, thread, sums);
    state.prepared = PreparedFor(plan, block.tile(), thread, output);
  });
  FinishReduction<kMapping, kValues>(block, plan, arguments.workspace, output);
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_BACKWARD_REDUCE_CUH_
