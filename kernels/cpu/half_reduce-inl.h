// The reductions of the two 16-bit types in float32, a chunk of a plan at a time. A chunk whose sums float32 could not
// hold is summed again in float64.

#if defined(SYNCBN_KERNELS_CPU_HALF_REDUCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_HALF_REDUCE_INL_H_
#undef SYNCBN_KERNELS_CPU_HALF_REDUCE_INL_H_
#else
#define SYNCBN_KERNELS_CPU_HALF_REDUCE_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/floats-inl.h"
#include "kernels/cpu/half_sums-inl.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/reduce.h"
#include "kernels/gate.h"
#include "kernels/moments.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

// The pivot of the first chunk: the mean of the first values of a row, sixteen at most. One value would be far from the
// mean more often, and the squares about it would lose digits of the variance.
template <DataType type>
double FirstPivot(const ReduceArgs& args, int64_t chunk, int64_t counter) {
  const ReductionPlan& plan = *args.plan;
  const RowRuns runs = RunsOf<kFloatLanes>(plan, plan.RowsOf(chunk).begin, counter, plan.ColumnsOf(chunk));
  const Run& run = runs.whole.groups > 0 ? runs.whole : runs.tail;
  WideSums sums;
  sums.Add(ClipFloats<false>(LoadHalfGroup<type, false>(args.x + run.first * 2, run), run.lanes));
  return Sum(sums) / static_cast<double>(run.lanes);
}

// The same for the channels of a run's groups: of up to eight rows.
template <DataType type, bool whole>
HWY_INLINE FloatLanes FirstPivots(const ReduceArgs& args, const Run& run) {
  const int64_t rows = std::min<int64_t>(run.groups, 8);
  FloatLanes sum = BroadcastFloat(0);
  for (int64_t i = 0; i < rows; ++i) {
    sum = sum + LoadHalfGroup<type, whole>(args.x + (run.first + i * run.stride) * 2, run);
  }
  return sum * BroadcastFloat(1.0f / static_cast<float>(rows));
}

template <DataType type>
Moments HalfChunkMoments(const ReduceArgs& args, int64_t chunk, int64_t counter, double pivot, bool is_first) {
  const ReductionPlan& plan = *args.plan;
  const Range rows = plan.RowsOf(chunk);
  const Range columns = plan.ColumnsOf(chunk);
  ShiftedSums about;
  about.count = plan.CountOf(chunk);
  about.pivot = CenterOf<type>(pivot);
  const FloatLanes center = FloatOf(about.pivot);
  FloatPairSums sums;
  RowRuns runs = RunsOf<kFloatLanes>(plan, rows.begin, counter, columns);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    AddRun(runs.whole, DeviationTerms<type, true>(args.x, runs.whole, center), &sums);
    AddTail(runs.tail, DeviationTerms<type, false>(args.x, runs.tail, center), &sums);
    NextRow<kFloatLanes>(plan, &runs);
  }
  sums.Finish();
  about.sum = Sum(sums.wide_first);
  about.sum_squares = Sum(sums.wide_second);
  return HoldsDeviations(about, is_first) ? ToMoments(about) : ChunkMoments<type>(args, chunk, counter, pivot);
}

template <DataType type>
void HalfStatsChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean,
                            double* m2) {
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      const double pivot = count == 0 ? FirstPivot<type>(args, chunk, c) : mean[c];
      const Moments merged = Merge({count, mean[c], m2[c]}, HalfChunkMoments<type>(args, chunk, c, pivot, count == 0));
      mean[c] = merged.mean;
      m2[c] = merged.m2;
    }
    count += args.plan->CountOf(chunk);
  }
}

// Two results of sixteen counters, or of as many as there are.
struct PairOfSixteen {
  double first[kFloatLanes];
  double second[kFloatLanes];

  HWY_INLINE PairOfSixteen(const WideSums& a, const WideSums& b) {
    StoreDoubles(a.lower, first);
    StoreDoubles(a.upper, first + kLanes);
    StoreDoubles(b.lower, second);
    StoreDoubles(b.upper, second + kLanes);
  }
  // A chunk's results so far.
  HWY_INLINE PairOfSixteen(const double* a, const double* b, int64_t n) : first(), second() {
    std::copy_n(a, n, first);
    std::copy_n(b, n, second);
  }
};

// The statistics and gradient sums of up to sixteen counters from c on, summed in float64 and merged into `results`.
template <DataType type>
HWY_NOINLINE void WideStats(const ReduceArgs& args, const Range& rows, int64_t c, int64_t lanes, int64_t count,
                            PairOfSixteen* results) {
  for (int64_t at = 0; at < lanes; at += kLanes) {
    const Run run = GroupRun<kLanes>(*args.plan, rows, c + at, c + lanes);
    StatsGroup<type, false>(args.x, run, count, results->first + at, results->second + at);
  }
}

template <DataType type, Gate gate>
HWY_NOINLINE void WideGradients(const ReduceArgs& args, const Range& rows, int64_t c, int64_t lanes,
                                PairOfSixteen* results) {
  for (int64_t at = 0; at < lanes; at += kLanes) {
    const Run run = GroupRun<kLanes>(*args.plan, rows, c + at, c + lanes);
    BackwardGroup<type, gate, false>(args, run, c + at, results->first + at, results->second + at);
  }
}

// The statistics of sixteen counters' rows, merged into those of `count` rows before.
template <DataType type, bool whole>
HWY_INLINE void HalfStatsGroup(const ReduceArgs& args, const Range& rows, const Run& run, int64_t c, int64_t count,
                               double* mean, double* m2) {
  const FloatLanes center = ToHalf<type>(count == 0 ? FirstPivots<type, whole>(args, run) : FloatsOf(mean, run.lanes));
  alignas(64) float pivot[kFloatLanes];
  StoreFloats(center, pivot);
  FloatPairSums sums;
  AddRun(run, DeviationTerms<type, whole>(args.x, run, center), &sums);
  sums.Finish();
  const PairOfSixteen about(sums.wide_first, sums.wide_second);
  uint32_t lost = 0;
  for (int64_t i = 0; i < run.lanes; ++i) {
    const ShiftedSums lane = {run.groups, static_cast<double>(pivot[i]), about.first[i], about.second[i]};
    if (!HoldsDeviations(lane, count == 0)) lost |= 1u << i;
  }
  PairOfSixteen wide(mean, m2, run.lanes);
  if (HWY_UNLIKELY(lost != 0)) WideStats<type>(args, rows, c, run.lanes, count, &wide);
  const int64_t lower = std::min(run.lanes, kLanes);
  MergeLanes(count, run.groups, WideSums::WidenHalf<0>(center), sums.wide_first.lower, sums.wide_second.lower, lower,
             mean, m2);
  if (run.lanes > kLanes) {
    MergeLanes(count, run.groups, WideSums::WidenHalf<1>(center), sums.wide_first.upper, sums.wide_second.upper,
               run.lanes - kLanes, mean + kLanes, m2 + kLanes);
  }
  for (int64_t i = 0; lost >> i != 0; ++i) {
    if ((lost >> i & 1) == 0) continue;
    mean[i] = wide.first[i];
    m2[i] = wide.second[i];
  }
}

template <DataType type>
void HalfStatsChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean,
                           double* m2) {
  const ReductionPlan& plan = *args.plan;
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; c += kFloatLanes) {
      const Run run = GroupRun<kFloatLanes>(plan, rows, c, counters.end);
      if (run.lanes == kFloatLanes) {
        HalfStatsGroup<type, true>(args, rows, run, c, count, mean + c, m2 + c);
      } else {
        HalfStatsGroup<type, false>(args, rows, run, c, count, mean + c, m2 + c);
      }
    }
    count += rows.size();
  }
}

// Returns the sum of dy * (x - mean) from that of dy * (x - center).
inline double AboutMean(double mean, double center, double sum_dy, double sum_dy_xmu) {
  return sum_dy_xmu + (center - mean) * sum_dy;
}

template <DataType type, Gate gate>
void HalfBackwardChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                               double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    const Range columns = plan.ColumnsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      FloatChannelLanes channel;
      const double center = CenterOf<type>(args.mean[c]);
      channel.mean = FloatOf(center);
      if constexpr (gate == Gate::kRecompute) {
        const ForwardCoefficients& forward = args.gate.forward;
        channel.forward_mean = FloatOf(forward.mean[c]);
        channel.forward_scale = FloatOf(forward.scale[c]);
        channel.forward_shift = FloatOf(forward.shift[c]);
      }
      FloatPairSums sums;
      RowRuns runs = RunsOf<kFloatLanes>(plan, rows.begin, c, columns);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        AddRun(runs.whole, GradientTerms<type, gate, true>(args, runs.whole, channel), &sums);
        AddTail(runs.tail, GradientTerms<type, gate, false>(args, runs.tail, channel), &sums);
        NextRow<kFloatLanes>(plan, &runs);
      }
      sums.Finish();
      const double sum_dy = Sum(sums.wide_first);
      const double sum_dy_xmu = Sum(sums.wide_second);
      if (HWY_LIKELY(HoldsGradients(sum_dy, sum_dy_xmu))) {
        first[c] += sum_dy;
        second[c] += AboutMean(args.mean[c], center, sum_dy, sum_dy_xmu);
      } else {
        BackwardChunk<type, gate>(args, chunk, c, first + c, second + c);
      }
    }
  }
}

template <DataType type, Gate gate, bool whole>
HWY_INLINE void HalfBackwardGroup(const ReduceArgs& args, const Range& rows, const Run& run, int64_t c, double* first,
                                  double* second) {
  FloatChannelLanes channel;
  channel.mean = ToHalf<type>(FloatsOf(args.mean + c, run.lanes));
  alignas(64) float center[kFloatLanes];
  StoreFloats(channel.mean, center);
  if constexpr (gate == Gate::kRecompute) {
    const ForwardCoefficients& forward = args.gate.forward;
    channel.forward_mean = FloatsOf(forward.mean + c, run.lanes);
    channel.forward_scale = FloatsOf(forward.scale + c, run.lanes);
    channel.forward_shift = FloatsOf(forward.shift + c, run.lanes);
  }
  FloatPairSums sums;
  AddRun(run, GradientTerms<type, gate, whole>(args, run, channel), &sums);
  sums.Finish();
  const PairOfSixteen own(sums.wide_first, sums.wide_second);
  uint32_t lost = 0;
  for (int64_t i = 0; i < run.lanes; ++i) lost |= (HoldsGradients(own.first[i], own.second[i]) ? 0u : 1u) << i;
  PairOfSixteen wide(first, second, run.lanes);
  if (HWY_UNLIKELY(lost != 0)) WideGradients<type, gate>(args, rows, c, run.lanes, &wide);
  for (int64_t i = 0; i < run.lanes; ++i) {
    const bool held = (lost >> i & 1) == 0;
    first[i] = held ? first[i] + own.first[i] : wide.first[i];
    second[i] =
        held ? second[i] + AboutMean(args.mean[c + i], static_cast<double>(center[i]), own.first[i], own.second[i])
             : wide.second[i];
  }
}

template <DataType type, Gate gate>
void HalfBackwardChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                              double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; c += kFloatLanes) {
      const Run run = GroupRun<kFloatLanes>(plan, rows, c, counters.end);
      if (run.lanes == kFloatLanes) {
        HalfBackwardGroup<type, gate, true>(args, rows, run, c, first + c, second + c);
      } else {
        HalfBackwardGroup<type, gate, false>(args, rows, run, c, first + c, second + c);
      }
    }
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
