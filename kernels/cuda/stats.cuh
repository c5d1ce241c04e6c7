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

struct MomentsPartial {
  static constexpr int kWords = 3;
  double word[kWords];  // Count (exact up to 2^53), mean, M2.

  SYNCBN_HOST_DEVICE static MomentsPartial Empty() { return From(Moments()); }
  SYNCBN_HOST_DEVICE static MomentsPartial From(const Moments& moments) {
    return {{static_cast<double>(moments.count), moments.mean, moments.m2}};
  }
  // As Merge, without conversions of the count.
  SYNCBN_HOST_DEVICE static MomentsPartial Combine(const MomentsPartial& a, const MomentsPartial& b) {
    if (a.word[0] == 0.0) return b;
    if (b.word[0] == 0.0) return a;
    MomentsPartial merged = a;
    merged.Add(WeightsOf(a.word[0], b.word[0]), b.word[0], b.word[1], b.word[2]);
    return merged;
  }
  // Nearly always all channels of a thread have the same count: then a single division serves them all.
  template <int kValues, typename Other>
  SYNCBN_HOST_DEVICE static void CombineAll(MomentsPartial* mine, Other other) {
    const double na = mine[0].word[0];
    const double nb = other(0, 0);
    bool alike = na != 0.0 && nb != 0.0;
#pragma unroll
    for (int v = 1; v < kValues; ++v) alike = alike && mine[v].word[0] == na && other(v, 0) == nb;
    if (alike) {
      const MergeWeights weights = WeightsOf(na, nb);
#pragma unroll
      for (int v = 0; v < kValues; ++v) mine[v].Add(weights, nb, other(v, 1), other(v, 2));
      return;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) mine[v] = Combine(mine[v], {{other(v, 0), other(v, 1), other(v, 2)}});
  }

 private:
  SYNCBN_HOST_DEVICE void Add(const MergeWeights& weights, double count, double mean, double m2) {
    word[0] += count;
    MergeInto(weights, mean, m2, word[1], word[2]);
  }
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
  constexpr uint32_t kAll = kCount == 32 ? ~0u : (1u << kCount) - 1;
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

template <typename A>
SYNCBN_HOST_DEVICE inline MomentsPartial ToPartial(const ChannelSums<A>& sums, int64_t count) {
  ShiftedSums shifted;
  shifted.count = count;
  shifted.pivot = static_cast<double>(sums.pivot);
  shifted.sum = sums.sum;
  shifted.sum_squares = sums.sum_squares;
  return MomentsPartial::From(ToMoments(shifted));
}

// One thread's share of a tensor in rows.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void StatsOfColumn(const StatsArguments& arguments, int64_t tile, int split, Place at,
                                             MomentsPartial* partial) {
  constexpr int kUnroll = Unroll(Mapping::kRows, 16);
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const T* x = static_cast<const T*>(arguments.x);
  const int64_t column = tile * plan.tile_columns + at.column;
  const int64_t step = plan.members * plan.columns * kWidth;  // From one vector of a batch to the next.
  ChannelSums<A> sums[kWidth];
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
      AddBatch<kUnroll>([&](int u) { return vectors[u].Get(v); }, valid, n, count, &sums[v]);
    }
    count += n;
  }
  // The rest of the last row is one more value for some columns.
  const int64_t tail = split == 0 && at.member == 0 ? plan.tail - column * kWidth : 0;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    partial[v] = ToPartial(sums[v], count);
    if (v < tail) {
      Moments one;
      one.count = 1;
      one.mean = static_cast<double>(Widen(x[plan.size - plan.tail + column * kWidth + v]));
      partial[v] = MomentsPartial::Combine(partial[v], MomentsPartial::From(one));
    }
  }
}

// One thread's share of a tensor in planes.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void StatsOfPlanes(const StatsArguments& arguments, int64_t tile, int split, Place at,
                                             MomentsPartial* partial) {
  constexpr int kUnroll = Unroll(Mapping::kPlanes, 16);
  constexpr uint32_t kAll = kUnroll * kWidth == 32 ? ~0u : (1u << (kUnroll * kWidth)) - 1;
  using A = Accumulator<T>;
  const ReducePlan& plan = arguments.plan;
  const T* x = static_cast<const T*>(arguments.x);
  const int64_t channel = tile * plan.tile_columns + at.column;
  const bool whole = plan.whole && arguments.aligned;
  ChannelSums<A> sums;
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
    AddBatch<kUnroll * kWidth>([&](int i) { return vectors[i / kWidth].Get(i % kWidth); }, valid, n, count, &sums);
    count += n;
  }
  partial[0] = ToPartial(sums, count);
}

// The work of one block. kMapping and T are the plan's.
template <Mapping kMapping, typename T, typename Block>
SYNCBN_HOST_DEVICE inline void StatsOfBlock(Block& block, const StatsArguments& arguments) {
  constexpr int kWidth = static_cast<int>(16 / sizeof(T));
  constexpr int kValues = kMapping == Mapping::kRows ? kWidth : 1;
  using State = typename Block::StateType;
  const ReducePlan& plan = arguments.plan;
  block.Each([&](int thread, State& state) {
    const Place at = PlaceOf<kMapping>(plan, thread);
    if constexpr (kMapping == Mapping::kRows) {
      StatsOfColumn<T, kWidth>(arguments, block.tile(), block.split(), at, state.partial);
    } else {
      StatsOfPlanes<T, kWidth>(arguments, block.tile(), block.split(), at, state.partial);
    }
  });
  FinishReduction<kMapping, kValues, MomentsPartial>(block, plan, arguments.workspace,
                                                     [&](int64_t channel, const MomentsPartial& total) {
                                                       arguments.mean[channel] = total.word[1];
                                                       arguments.m2[channel] = total.word[2];
                                                     });
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_STATS_CUH_
