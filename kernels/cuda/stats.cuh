// BatchNormStats: from x to the mean and M2 of each channel.
//
// Mapping: plan.h. A thread reads vectors of 16 bytes, `unroll` at a time (4 in planes, 8 in rows), all of them asked
//   for before the first is used, so that an SM has 64 KB under way.
// Bytes moved: x once. The workspace is a few hundred KB at most and stays in the cache.
// Registers: a channel takes 5 (pivot, and two sums in float64); a thread has 1 channel (planes) or 2 to 8 (rows). The
//   compiler is held to 64 in planes (4 blocks an SM) and 128 in rows (2 blocks an SM).
// Numerics: sums of (x - pivot) and of its square. A batch of up to 32 values is summed in float32 and then added to
//   float64 sums. The pivot is the mean of the thread's first batch, and moves to the mean of a later batch that shows
//   it to be far off, so neither an outlier in the first batch nor a drift costs precision. A batch whose squares leave
//   the range of float32 is summed again in float64.
// Deterministic: the plan alone decides which values a thread adds, and in which order; reduce.cuh merges by index.

#ifndef SYNCBN_KERNELS_CUDA_STATS_CUH_
#define SYNCBN_KERNELS_CUDA_STATS_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/plane_vector.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/scalar_types.cuh"
#include "kernels/moments.h"

namespace syncbn::kernels::cuda {

struct StatsArguments {
  ReducePlan plan;
  const void* x = nullptr;
  bool aligned = false;  // x lies on a 16-byte boundary.
  double* mean = nullptr;
  double* m2 = nullptr;
  ReduceWorkspace workspace;
};

SYNCBN_HOST_DEVICE inline int CountBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Sums of one channel about a pivot.
template <typename A>
struct ChannelSums {
  A pivot = 0;
  double sum = 0.0;
  double sum_squares = 0.0;
};

// The mean of the valid ones of kCount values, without overflow, and finite even where values are not.
template <int kCount, typename A, typename Get>
SYNCBN_HOST_DEVICE inline A PivotOf(Get get, uint32_t valid, int count) {
  constexpr A kLargest = std::is_same<A, double>::value ? static_cast<A>(1.7e308) : static_cast<A>(3.4e38f);
  const A weight = A{1} / static_cast<A>(count);
  A mean = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (valid >> i & 1) mean = FusedMultiplyAdd(get(i), weight, mean);
  }
  return mean >= -kLargest && mean <= kLargest ? mean : A{0};
}

// Sums in float64 of a batch that float32 cannot hold.
template <int kCount, typename A, typename Get>
SYNCBN_HOST_DEVICE inline void AddWideBatch(Get get, uint32_t valid, ChannelSums<A>* sums) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const double d = static_cast<double>(get(i)) - static_cast<double>(sums->pivot);
    if (valid >> i & 1) {
      sums->sum += d;
      sums->sum_squares = fma(d, d, sums->sum_squares);
    }
  }
}

// Adds the values get(i) of those i < kCount whose bit in `valid` is set, `count` of them; `before` came earlier.
template <int kCount, typename A, typename Get>
SYNCBN_HOST_DEVICE inline void AddBatch(Get get, uint32_t valid, int count, int64_t before, ChannelSums<A>* sums) {
  constexpr uint32_t kAll = ~0u >> (32 - kCount);
  constexpr bool kIsFloat = std::is_same<A, float>::value;
  if (before == 0) sums->pivot = PivotOf<kCount, A>(get, valid, count);
  A sum = 0;
  A sum_squares = 0;
  if (valid == kAll) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A d = get(i) - sums->pivot;
      sum += d;
      sum_squares = FusedMultiplyAdd(d, d, sum_squares);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A d = valid >> i & 1 ? get(i) - sums->pivot : A{0};
      sum += d;
      sum_squares = FusedMultiplyAdd(d, d, sum_squares);
    }
  }
  if (kIsFloat && !(sum_squares >= A(1e-30f) && sum_squares <= A(1e36f))) {
    if (sum_squares == 0 && sum == 0) return;  // All equal the pivot.
    AddWideBatch<kCount>(get, valid, sums);
    return;
  }
  sums->sum += static_cast<double>(sum);
  sums->sum_squares += static_cast<double>(sum_squares);
  const A size = static_cast<A>(count);
  if (sum * sum <= A(0.9f) * (size * sum_squares)) return;
  // The batch lies on one side of the pivot, more than three of its standard deviations away.
  const A pivot = sums->pivot + sum / size;
  ShiftedSums shifted;
  shifted.count = before + count;
  shifted.pivot = static_cast<double>(sums->pivot);
  shifted.sum = sums->sum;
  shifted.sum_squares = sums->sum_squares;
  const ShiftedSums rebased = Rebase(shifted, static_cast<double>(pivot));
  sums->pivot = pivot;
  sums->sum = rebased.sum;
  sums->sum_squares = rebased.sum_squares;
}

// A thread's sums about the pivot that all threads of the channel share.
template <typename A>
SYNCBN_HOST_DEVICE inline Sums Shared(const ChannelSums<A>& own, int64_t count, A pivot) {
  ShiftedSums shifted;
  shifted.count = count;
  shifted.pivot = static_cast<double>(own.pivot);
  shifted.sum = own.sum;
  shifted.sum_squares = own.sum_squares;
  const ShiftedSums rebased = Rebase(shifted, static_cast<double>(pivot));
  return {{rebased.sum, rebased.sum_squares}};
}

// The pivot that all threads of a channel share: its first value, or 0 if that is not finite. It is one of the values,
// so m2 has a term of about the square of its distance from the mean, and the rounding errors of sums about it, 2^-53
// of n such squares, stay 2^-53 * n of m2, wherever it lies.
template <typename A>
SYNCBN_HOST_DEVICE inline A SharedPivot(A first) {
  return first - first == 0 ? first : A{0};
}

// One thread's share of a tensor in rows.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void StatsOfColumn(const StatsArguments& arguments, int64_t tile, int split, Place at,
                                             Sums* sums) {
  constexpr int kUnroll = Unroll(Mapping::kRows, 16);
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const T* x = static_cast<const T*>(arguments.x);
  const int64_t column = tile * plan.tile_columns + at.column;
  const int64_t step = plan.members * plan.columns * kWidth;  // From one vector of a batch to the next.
  ChannelSums<A> own[kWidth];
  int64_t count = 0;
  const int64_t end = column < plan.columns ? plan.batches : 0;
  for (int64_t batch = split; batch < end; batch += plan.splits) {
    const int64_t row = batch * plan.members * kUnroll + at.member;
    Vector<T, kWidth> vectors[kUnroll];
    int n = 0;
    if (arguments.aligned && row + (kUnroll - 1) * plan.members < plan.rows) {
      const T* const first = x + (row * plan.columns + column) * kWidth;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) LoadWhole(first + u * step, &vectors[u]);
      n = kUnroll;
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t r = row + u * plan.members;
        if (r < plan.rows) {
          Load(x, (r * plan.columns + column) * kWidth, plan.size, arguments.aligned, &vectors[u]);
          n = u + 1;
        } else {
          vectors[u].Clear();
        }
      }
    }
    if (n == 0) break;
    const uint32_t valid = (1u << n) - 1;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      AddBatch<kUnroll>([&](int u) { return vectors[u].Get(v); }, valid, n, count, &own[v]);
    }
    count += n;
  }
  if (column >= plan.columns || plan.size == 0) return;
  // The rest of the last row is one more value for some columns.
  const int64_t tail = split == 0 && at.member == 0 ? plan.tail - column * kWidth : 0;
  Vector<T, kWidth> firsts;
  if (plan.replicas == 1) {
    Load(x, column * kWidth, plan.size, arguments.aligned, &firsts);
  } else {
    firsts.Clear();
    EachChannelOfColumn<kWidth>(plan, column, [&](int v, int64_t channel) { firsts.Set(v, x[channel]); });
  }
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    const A pivot = SharedPivot(firsts.Get(v));
    sums[v] = Shared(own[v], count, pivot);
    if (v < tail) {
      const double last = static_cast<double>(Widen(x[plan.size - plan.tail + column * kWidth + v]));
      const double d = last - static_cast<double>(pivot);
      sums[v].word[0] += d;
      sums[v].word[1] = fma(d, d, sums[v].word[1]);
    }
  }
}

// One thread's share of a tensor in planes.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void StatsOfPlanes(const StatsArguments& arguments, int64_t tile, int split, Place at,
                                             Sums* sums) {
  constexpr int kUnroll = Unroll(Mapping::kPlanes, 16);
  static_assert(kUnroll * kWidth <= 32, "a batch's values have a bit each");
  constexpr uint32_t kAll = ~0u >> (32 - kUnroll * kWidth);
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const T* x = static_cast<const T*>(arguments.x);
  const int64_t channel = tile * plan.tile_columns + at.column;
  const bool whole = plan.whole && arguments.aligned;
  ChannelSums<A> own;
  int64_t count = 0;
  const int64_t end = channel < plan.channels && at.column < plan.tile_columns ? plan.batches : 0;
  for (int64_t batch = split; batch < end; batch += plan.splits) {
    const int64_t unit = batch * plan.members * kUnroll + at.member;
    Vector<T, kWidth> vectors[kUnroll];
    uint32_t valid = kAll;
    if (whole && unit + (kUnroll - 1) * plan.members < plan.units) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        LoadWhole(x + FindWholePlaneVector(plan, channel, unit + u * plan.members, kWidth), &vectors[u]);
      }
    } else {
      valid = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const PlaneVector vector = FindPlaneVector(plan, channel, unit + u * plan.members, kWidth);
        if (vector.valid != 0) {
          Load(x, vector.first, plan.size, arguments.aligned, &vectors[u]);
        } else {
          vectors[u].Clear();
        }
        valid |= vector.valid << (u * kWidth);
      }
    }
    const int n = CountBits(valid);
    if (n == 0) continue;
    AddBatch<kUnroll * kWidth>([&](int i) { return vectors[i / kWidth].Get(i % kWidth); }, valid, n, count, &own);
    count += n;
  }
  if (count > 0) sums[0] = Shared(own, count, SharedPivot(Widen(x[channel * plan.spatial])));
}

// From the sums of a channel to its mean and M2.
template <Mapping kMapping, typename T>
struct StatsOutput {
  const StatsArguments& arguments;

  SYNCBN_HOST_DEVICE double Prepare(int64_t channel) const {
    const int64_t first = kMapping == Mapping::kRows ? channel : channel * arguments.plan.spatial;
    if (arguments.plan.size == 0) return 0.0;
    return static_cast<double>(SharedPivot(Widen(static_cast<const T*>(arguments.x)[first])));
  }
  SYNCBN_HOST_DEVICE void Write(int64_t channel, double pivot, const Sums& sums) const {
    ShiftedSums shifted;
    shifted.count = arguments.plan.count;
    shifted.pivot = pivot;
    shifted.sum = sums.word[0];
    shifted.sum_squares = sums.word[1];
    const Moments moments = ToMoments(shifted);
    arguments.mean[channel] = moments.mean;
    arguments.m2[channel] = moments.m2;
  }
};

// The work of one block. kMapping and T are the plan's.
template <Mapping kMapping, typename T, typename Block>
SYNCBN_HOST_DEVICE inline void StatsOfBlock(Block& block, const StatsArguments& arguments) {
  constexpr int kWidth = static_cast<int>(16 / sizeof(T));
  constexpr int kValues = ValuesOfThread<kMapping, T>();
  using State = typename Block::StateType;
  const ReducePlan& plan = arguments.plan;
  const StatsOutput<kMapping, T> output{arguments};
  block.Each([&](int thread, State& state) {
    const Place at = PlaceOf<kMapping>(plan, thread);
    Sums sums[kValues];
    if constexpr (kMapping == Mapping::kRows) {
      StatsOfColumn<T, kWidth>(arguments, block.tile(), block.split(), at, sums);
    } else {
      StatsOfPlanes<T, kWidth>(arguments, block.tile(), block.split(), at, sums);
    }
    StoreSums<kValues>(block, thread, sums);
    state.prepared = PreparedFor(plan, block.tile(), thread, output);
  });
  FinishReduction<kMapping, kValues>(block, plan, arguments.workspace, output);
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_STATS_CUH_
