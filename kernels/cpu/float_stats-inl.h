// The statistics of float32 tensors, a chunk of a plan at a time, where channels have many values. Deviations from a
// pivot are differences in float32, and everything else is in float64: the square of a float32 is exact there, so that
// a fused multiply-add has the bits of a multiplication and an addition, and instruction sets without it give the same.

#if defined(SYNCBN_KERNELS_CPU_FLOAT_STATS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_FLOAT_STATS_INL_H_
#undef SYNCBN_KERNELS_CPU_FLOAT_STATS_INL_H_
#else
#define SYNCBN_KERNELS_CPU_FLOAT_STATS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/lanes-inl.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/reduce.h"
#include "kernels/moments.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

// Eight float32 lanes, in as many vectors as Lanes.
struct Singles {
  hn::Vec<DF> part[kParts];
};

// Returns pivots near the means: float32 values with few digits beside their channel's, multiples of a 64th of the
// deviation or less. A difference from one is mostly exact. The roundings of differences from just any float32 would be
// the same for all values between two powers of 2, and add up.
HWY_INLINE Singles PivotsNear(const Lanes& mean, const Lanes& variance) {
  const DU du;
  Singles r;
  SYNCBN_FOR_PARTS(i) {
    const auto exponent = hn::And(hn::ShiftRight<52>(hn::BitCast(du, variance.part[i])), hn::Set(du, 0x7FF));
    // Half of the variance's exponent, and -6. The smallest there is leaves a mean beside no variance as it is.
    const auto step = hn::ShiftLeft<52>(hn::ShiftRight<1>(hn::Add(exponent, hn::Set(du, 1023 - 2 * 6))));
    // Leaves no room for anything below a step.
    const Vector big = hn::Mul(hn::BitCast(D(), step), hn::Set(D(), 0x1.8p52));
    r.part[i] = ToFloat(hn::Sub(hn::Add(mean.part[i], big), big));
  }
  return r;
}

HWY_INLINE double PivotNear(double mean, double variance) {
  return static_cast<double>(hn::GetLane(PivotsNear(Broadcast(mean), Broadcast(variance)).part[0]));
}

HWY_INLINE Singles BroadcastSingle(double value) {
  Singles r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::Set(DF(), static_cast<float>(value));
  return r;
}

// Sums of eight lanes' deviations and of their squares.
struct DeviationSums {
  Lanes sum, squares;

  HWY_INLINE DeviationSums() : sum(Zero()), squares(Zero()) {}

  // Adds the group of eight values at an address.
  HWY_INLINE void Add(const uint8_t* x, const Singles& pivot) {
    SYNCBN_FOR_PARTS(i) {
      const Vector deviation = hn::PromoteTo(D(), Minus(DF(), LoadBytes<DF>(x + i * kWide * 4), pivot.part[i]));
      sum.part[i] = hn::Add(sum.part[i], deviation);
      squares.part[i] = hn::MulAdd(deviation, deviation, squares.part[i]);
    }
  }

  // Adds its first n values; the others behind it are read, or not touched.
  HWY_INLINE void AddFirst(int64_t n, const uint8_t* x, bool readable, const Singles& pivot) {
    alignas(64) uint8_t few[kLanes * 4] = {};
    if (!readable) {
      CopyFew<4>(few, x, n);
      x = few;
    }
    Lanes deviation;
    SYNCBN_FOR_PARTS(i) {
      deviation.part[i] = hn::PromoteTo(D(), Minus(DF(), LoadBytes<DF>(x + i * kWide * 4), pivot.part[i]));
    }
    deviation = KeepFirst(n, deviation);
    sum = sum + deviation;
    SYNCBN_FOR_PARTS(i) { squares.part[i] = hn::MulAdd(deviation.part[i], deviation.part[i], squares.part[i]); }
  }
};

// As many values give a first pivot, which needs only be some deviations from the mean.
constexpr int64_t kFirstValues = 4;

// The statistics by differences in float32, for StatsChannelsFirst().
struct FloatStatistics {
  static constexpr DataType kType = DataType::kFloat32;

  // The pivot of a counter's first chunk: near the mean of its first values.
  static HWY_INLINE double FirstPivot(const ReduceArgs& args, int64_t chunk, int64_t counter) {
    const ReductionPlan& plan = *args.plan;
    const Range columns = plan.ColumnsOf(chunk);
    const int64_t first =
        plan.first_element + (plan.RowsOf(chunk).begin * plan.width + counter) * plan.columns + columns.begin;
    const int64_t n = std::min(columns.size(), kFirstValues);
    float values[kFirstValues];
    std::memcpy(values, args.x + first * 4, static_cast<size_t>(n) * 4);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double deviation = static_cast<double>(values[i]) - static_cast<double>(values[0]);
      sum += deviation;
      squares += deviation * deviation;
    }
    const double shift = sum / static_cast<double>(n);
    return PivotNear(static_cast<double>(values[0]) + shift, squares / static_cast<double>(n) - shift * shift);
  }

  static HWY_INLINE double NextPivot(const Moments& before) {
    return PivotNear(before.mean, before.m2 / static_cast<double>(before.count));
  }

  static HWY_INLINE ShiftedSums SumsAbout(const ReduceArgs& args, int64_t chunk, int64_t counter, double pivot_value) {
    const ReductionPlan& plan = *args.plan;
    const Range rows = plan.RowsOf(chunk);
    const RowRuns runs = RunsOf<kLanes>(plan, rows.begin, counter, plan.ColumnsOf(chunk));
    const Singles pivot = BroadcastSingle(pivot_value);
    const int64_t step = plan.width * plan.columns;
    const int64_t n = runs.tail.lanes;
    int64_t tail = runs.tail.first;
    const uint8_t* row = args.x + runs.whole.first * 4;
    DeviationSums even, odd;
    for (int64_t i = 0; i < rows.size(); ++i, row += step * 4, tail += step) {
      const uint8_t* p = row;
      int64_t left = runs.whole.groups;
      for (; left >= 2; left -= 2, p += 2 * kLanes * 4) {
        even.Add(p, pivot);
        odd.Add(p + kLanes * 4, pivot);
      }
      if (left > 0) even.Add(p, pivot);
      if (n > 0) odd.AddFirst(n, args.x + tail * 4, tail + kLanes <= plan.end_element(), pivot);
    }
    return {plan.CountOf(chunk), pivot_value, Sum(even.sum + odd.sum), Sum(even.squares + odd.squares)};
  }

  // Sums in float64 are finite unless a value, or its distance from the pivot in float32, is not. If no chunk came
  // before, the pivot must not lie so far off that most of a difference is its distance from the mean. Later it may:
  // the distance then makes the merged m2 as large.
  static bool Holds(const ShiftedSums& sums, bool is_first) {
    if (!std::isfinite(sums.sum_squares)) return false;
    return !is_first || sums.sum * sums.sum <= 0.9 * static_cast<double>(sums.count) * sums.sum_squares;
  }
};

// As many groups abreast as the processor's registers hold sums of; a result does not depend on it.
constexpr int kGroupsAbreast = kParts == 1 ? 8 : kParts == 2 ? 2 : 1;

// Eight counters of a block, or as many as there are: their rows in a chunk, and their sums over those.
struct FloatGroup {
  HWY_INLINE FloatGroup() : run(), pivot(BroadcastSingle(0)), sums() {}

  Run run;
  Singles pivot;
  DeviationSums sums;
};

// Returns the pivots of a group: of its first rows if there are no statistics yet.
HWY_INLINE Singles PivotsOf(const ReduceArgs& args, const Run& run, int64_t count, const double* mean,
                            const double* m2) {
  double first_mean[kLanes] = {}, first_m2[kLanes] = {};
  if (count == 0) {
    Run few = run;
    few.groups = std::min(run.groups, kFirstValues);
    if (run.lanes == kLanes) {
      StatsGroup<DataType::kFloat32, true>(args.x, few, 0, first_mean, first_m2);
    } else {
      StatsGroup<DataType::kFloat32, false>(args.x, few, 0, first_mean, first_m2);
    }
    count = few.groups;
    mean = first_mean;
    m2 = first_m2;
  }
  return PivotsNear(LoadDoubles(mean, run.lanes),
                    LoadDoubles(m2, run.lanes) * Broadcast(1 / static_cast<double>(count)));
}

// Merges the statistics of a group's rows into those of `count` rows before.
HWY_INLINE void MergeFloatGroup(const ReduceArgs& args, const FloatGroup& group, int64_t count, double* mean,
                                double* m2) {
  const Run& run = group.run;
  Lanes pivot;
  SYNCBN_FOR_PARTS(i) pivot.part[i] = hn::PromoteTo(D(), group.pivot.part[i]);
  double sum[kLanes], squares[kLanes];
  StoreDoubles(group.sums.sum, sum);
  StoreDoubles(group.sums.squares, squares);
  bool held[kLanes] = {};
  bool all = true;
  for (int64_t i = 0; i < run.lanes; ++i) {
    held[i] = FloatStatistics::Holds({run.groups, 0, sum[i], squares[i]}, count == 0);
    all = all && held[i];
  }
  if (HWY_LIKELY(all)) {
    MergeLanes(count, run.groups, pivot, group.sums.sum, group.sums.squares, run.lanes, mean, m2);
    return;
  }
  // The others must keep the bits that they would have without such a channel beside them.
  double wide_mean[kLanes] = {}, wide_m2[kLanes] = {};
  std::copy_n(mean, run.lanes, wide_mean);
  std::copy_n(m2, run.lanes, wide_m2);
  StatsGroup<DataType::kFloat32, false>(args.x, run, count, wide_mean, wide_m2);
  MergeLanes(count, run.groups, pivot, group.sums.sum, group.sums.squares, run.lanes, mean, m2);
  for (int64_t i = 0; i < run.lanes; ++i) {
    if (held[i]) continue;
    mean[i] = wide_mean[i];
    m2[i] = wide_m2[i];
  }
}

// Adds n rows, from one on, of kAbreast adjacent groups.
template <int kAbreast>
HWY_INLINE void AddFloatRows(const uint8_t* x, int64_t row, int64_t n, FloatGroup* group) {
  const Run& run = group->run;
  const int64_t step = run.stride * 4;
  const uint8_t* p = x + (run.first + row * run.stride) * 4;
  DeviationSums sums[kAbreast];
  _Pragma("GCC unroll 8") for (int g = 0; g < kAbreast; ++g) sums[g] = group[g].sums;
  if (HWY_LIKELY(run.lanes == kLanes)) {
    for (int64_t i = 0; i < n; ++i, p += step) {
      _Pragma("GCC unroll 8") for (int g = 0; g < kAbreast; ++g) sums[g].Add(p + g * kLanes * 4, group[g].pivot);
    }
  } else {
    for (int64_t i = 0; i < n; ++i, p += step) {
      sums[0].AddFirst(run.lanes, p, run.readable, group->pivot);
    }
  }
  _Pragma("GCC unroll 8") for (int g = 0; g < kAbreast; ++g) group[g].sums = sums[g];
}

inline void FloatStatsChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean,
                                   double* m2) {
  const ReductionPlan& plan = *args.plan;
  const int64_t groups = (counters.size() + kLanes - 1) / kLanes;
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    FloatGroup group[kMaxBlock / kLanes];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kLanes;
      group[g].run = GroupRun<kLanes>(plan, rows, c, counters.end);
      group[g].pivot = PivotsOf(args, group[g].run, count, mean + c, m2 + c);
    }
    EachBlockOfRows<kGroupsAbreast>(rows, 16, counters.size() / kLanes, groups,
                                    [&](auto abreast, int64_t g, int64_t row, int64_t n)
                                        HWY_ATTR { AddFloatRows<abreast>(args.x, row, n, &group[g]); });
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kLanes;
      MergeFloatGroup(args, group[g], count, mean + c, m2 + c);
    }
    count += rows.size();
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
