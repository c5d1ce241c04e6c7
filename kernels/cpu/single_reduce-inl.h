// The reductions in float32, of the 16-bit types and of gradients in float32, a chunk of a plan at a time. A chunk
// whose sums float32 could not hold is summed again in float64.

#if defined(SYNCBN_KERNELS_CPU_SINGLE_REDUCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_SINGLE_REDUCE_INL_H_
#undef SYNCBN_KERNELS_CPU_SINGLE_REDUCE_INL_H_
#else
#define SYNCBN_KERNELS_CPU_SINGLE_REDUCE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/floats-inl.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/single_sums-inl.h"
#include "kernels/gate.h"
#include "kernels/moments.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

// The statistics in float32, for StatsChannelsFirst().
template <DataType type>
struct SingleStatistics {
  static constexpr DataType kType = type;

  // The pivot of the first chunk: the mean of the first values of a row, sixteen at most. One value would be far from
  // the mean more often, and the squares about it would lose digits of the variance.
  static double FirstPivot(const ReduceArgs& args, int64_t chunk, int64_t counter) {
    const ReductionPlan& plan = *args.plan;
    const RowRuns runs = RunsOf<kFloatLanes>(plan, plan.RowsOf(chunk).begin, counter, plan.ColumnsOf(chunk));
    const Run& run = runs.whole.groups > 0 ? runs.whole : runs.tail;
    WideSums sums;
    sums.Add(ClipFloats<false>(LoadFloatGroup<type, false>(args.x + run.first * Element<type>::kSize, run), run.lanes));
    return Sum(sums) / static_cast<double>(run.lanes);
  }

  static double NextPivot(const Moments& before) { return before.mean; }

  static HWY_INLINE ShiftedSums SumsAbout(const ReduceArgs& args, int64_t chunk, int64_t counter, double pivot) {
    const ReductionPlan& plan = *args.plan;
    const Range rows = plan.RowsOf(chunk);
    const double about = CenterOf<type>(pivot);
    const FloatLanes center = FloatOf(about);
    GrowingSums sums;
    RowRuns runs = RunsOf<kFloatLanes>(plan, rows.begin, counter, plan.ColumnsOf(chunk));
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      AddRun(runs.whole, DeviationTerms<type, true>(args.x, runs.whole, center), &sums);
      AddTail(runs.tail, DeviationTerms<type, false>(args.x, runs.tail, center), &sums);
      NextRow<kFloatLanes>(plan, &runs);
    }
    sums.Finish();
    return {plan.CountOf(chunk), about, Sum(sums.blocks.first), Sum(sums.blocks.second)};
  }

  static bool Holds(const ShiftedSums& sums, bool is_first) { return HoldsDeviations(sums, is_first); }
};

// The pivots of a run's groups in the first chunk: the means of up to eight rows' values.
template <DataType type, bool whole>
HWY_INLINE FloatLanes FirstPivots(const ReduceArgs& args, const Run& run) {
  const int64_t rows = std::min<int64_t>(run.groups, 8);
  FloatLanes sum = BroadcastFloat(0);
  for (int64_t i = 0; i < rows; ++i) {
    sum = sum + LoadFloatGroup<type, whole>(args.x + (run.first + i * run.stride) * Element<type>::kSize, run);
  }
  return sum * BroadcastFloat(1.0f / static_cast<float>(rows));
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

// Sixteen counters of a block, or as many as there are: their rows in a chunk, and their sums over those.
struct GroupSums {
  HWY_INLINE GroupSums() : run(), sums() {}

  Run run;
  BlockSums sums;
};

constexpr int64_t kMaxGroups = kMaxBlock / kFloatLanes;
// As many groups abreast as the processor's registers hold sums and coefficients of; a result does not depend on it.
constexpr int kFloatsAbreast = LanesOf<Floats>::kCount == 1 ? 4 : LanesOf<Floats>::kCount == 2 ? 2 : 1;
constexpr int64_t kBlockRows = 8;

inline int64_t GroupsOf(const Range& counters) { return (counters.size() + kFloatLanes - 1) / kFloatLanes; }

// Adds a chunk's rows to the sums of groups of counters, of which the first have all sixteen. terms(whole, run, g)
// makes those of a group; `whole` says whether all of its lanes count.
template <class TermsOf>
HWY_INLINE void SumGroups(const Range& rows, const Range& counters, const TermsOf& terms, GroupSums* sums) {
  const int64_t groups = GroupsOf(counters);
  EachBlockOfRows<kFloatsAbreast>(
      rows, kBlockRows, counters.size() / kFloatLanes, groups,
      [&](auto abreast, int64_t g, int64_t row, int64_t n) HWY_ATTR {
        const Run& run = sums[g].run;
        const int64_t at = run.first + row * run.stride;
        BlockSums* to[abreast];
        for (int i = 0; i < abreast; ++i) to[i] = &sums[g + i].sums;
        if (HWY_LIKELY(run.lanes == kFloatLanes)) {
          AddRows<abreast>([&](int i) HWY_ATTR { return terms(std::true_type(), run, g + i); }, at, run.stride, n, to);
        } else {
          AddRows<1>([&](int) HWY_ATTR { return terms(std::false_type(), run, g); }, at, run.stride, n, to);
        }
      });
  for (int64_t g = 0; g < groups; ++g) sums[g].sums.Finish();
}

// Merges the statistics of a group's rows into those of `count` rows before.
template <DataType type>
HWY_INLINE void MergeGroup(const ReduceArgs& args, const Range& rows, const GroupSums& group, const FloatLanes& center,
                           int64_t c, int64_t count, double* mean, double* m2) {
  const Run& run = group.run;
  alignas(64) float pivot[kFloatLanes];
  StoreFloats(center, pivot);
  const PairOfSixteen about(group.sums.first, group.sums.second);
  uint32_t lost = 0;
  for (int64_t i = 0; i < run.lanes; ++i) {
    const ShiftedSums lane = {run.groups, static_cast<double>(pivot[i]), about.first[i], about.second[i]};
    if (!HoldsDeviations(lane, count == 0)) lost |= 1u << i;
  }
  PairOfSixteen wide(mean, m2, run.lanes);
  if (HWY_UNLIKELY(lost != 0)) WideStats<type>(args, rows, c, run.lanes, count, &wide);
  const int64_t lower = std::min(run.lanes, kLanes);
  MergeLanes(count, run.groups, WideSums::WidenHalf<0>(center), group.sums.first.lower, group.sums.second.lower, lower,
             mean, m2);
  if (run.lanes > kLanes) {
    MergeLanes(count, run.groups, WideSums::WidenHalf<1>(center), group.sums.first.upper, group.sums.second.upper,
               run.lanes - kLanes, mean + kLanes, m2 + kLanes);
  }
  for (int64_t i = 0; lost >> i != 0; ++i) {
    if ((lost >> i & 1) == 0) continue;
    mean[i] = wide.first[i];
    m2[i] = wide.second[i];
  }
}

template <DataType type>
void SingleStatsChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean,
                             double* m2) {
  const ReductionPlan& plan = *args.plan;
  const int64_t groups = GroupsOf(counters);
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    GroupSums sums[kMaxGroups];
    FloatLanes center[kMaxGroups];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kFloatLanes;
      const Run run = GroupRun<kFloatLanes>(plan, rows, c, counters.end);
      const FloatLanes pivot = count == 0 ? FirstPivots<type, false>(args, run) : FloatsOf(mean + c, run.lanes);
      center[g] = RoundFloats<type>(pivot);
      sums[g].run = run;
    }
    SumGroups(
        rows, counters,
        [&](auto whole, const Run& run, int64_t g)
            HWY_ATTR { return DeviationTerms<type, decltype(whole)::value>(args.x, run, center[g]); },
        sums);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kFloatLanes;
      MergeGroup<type>(args, rows, sums[g], center[g], c, count, mean + c, m2 + c);
    }
    count += rows.size();
  }
}

// Returns the sum of dy * (x - mean) from that of dy * (x - center).
inline double AboutMean(double mean, double center, double sum_dy, double sum_dy_xmu) {
  return sum_dy_xmu + (center - mean) * sum_dy;
}

// The float32 inputs of a counter's, or of a group's, gradient sums: `floats` makes lanes of a vector of float64.
template <DataType type, Gate gate, class Floats>
HWY_INLINE FloatChannelLanes ChannelOf(const ReduceArgs& args, const Floats& floats) {
  FloatChannelLanes channel;
  channel.mean = RoundFloats<type>(floats(args.mean));
  if constexpr (gate == Gate::kRecompute) {
    if constexpr (type != DataType::kFloat32) channel.forward_mean = floats(args.gate.forward.mean);
    channel.forward_scale = floats(args.gate.forward.scale);
    channel.forward_shift = floats(args.gate.forward.shift);
  }
  return channel;
}

// Returns the smallest lane.
HWY_INLINE double Least(const FloatLanes& v) {
  alignas(64) float lanes[kFloatLanes];
  StoreFloats(v, lanes);
  return static_cast<double>(*std::min_element(lanes, lanes + kFloatLanes));
}

template <DataType type, Gate gate>
void SingleBackwardChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                                 double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    const Range columns = plan.ColumnsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      const double center = CenterOf<type>(args.mean[c]);
      const FloatChannelLanes channel =
          ChannelOf<type, gate>(args, [c](const double* vector) HWY_ATTR { return FloatOf(vector[c]); });
      GrowingSums sums;
      FloatLanes least = BroadcastFloat(HUGE_VALF);
      RowRuns runs = RunsOf<kFloatLanes>(plan, rows.begin, c, columns);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        AddRun(runs.whole, GradientTerms<type, gate, true>(args, runs.whole, channel, &least), &sums);
        AddTail(runs.tail, GradientTerms<type, gate, false>(args, runs.tail, channel, &least), &sums);
        NextRow<kFloatLanes>(plan, &runs);
      }
      sums.Finish();
      const double sum_dy = Sum(sums.blocks.first);
      const double sum_dy_xmu = Sum(sums.blocks.second);
      bool held = HoldsGradients(sum_dy, sum_dy_xmu);
      if constexpr (gate == Gate::kRecompute && type == DataType::kFloat32) {
        held = held && GateIsSure(args.gate.forward.scale[c], args.gate.forward.shift[c], Least(least));
      }
      if (HWY_LIKELY(held)) {
        first[c] += sum_dy;
        second[c] += AboutMean(args.mean[c], center, sum_dy, sum_dy_xmu);
      } else {
        BackwardChunk<type, gate>(args, chunk, c, first + c, second + c);
      }
    }
  }
}

// Adds the sums of a group's rows to those of the rows before.
template <DataType type, Gate gate>
HWY_INLINE void AddGroup(const ReduceArgs& args, const Range& rows, const GroupSums& group, const FloatLanes& mean,
                         const FloatLanes& least, int64_t c, double* first, double* second) {
  const Run& run = group.run;
  alignas(64) float center[kFloatLanes];
  StoreFloats(mean, center);
  const PairOfSixteen own(group.sums.first, group.sums.second);
  uint32_t lost = 0;
  for (int64_t i = 0; i < run.lanes; ++i) lost |= (HoldsGradients(own.first[i], own.second[i]) ? 0u : 1u) << i;
  if constexpr (gate == Gate::kRecompute && type == DataType::kFloat32) {
    const ForwardCoefficients& forward = args.gate.forward;
    alignas(64) float sizes[kFloatLanes];
    StoreFloats(least, sizes);
    for (int64_t i = 0; i < run.lanes; ++i) {
      if (!GateIsSure(forward.scale[c + i], forward.shift[c + i], static_cast<double>(sizes[i]))) lost |= 1u << i;
    }
  }
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
void SingleBackwardChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                                double* second) {
  const ReductionPlan& plan = *args.plan;
  const int64_t groups = GroupsOf(counters);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    GroupSums sums[kMaxGroups];
    FloatChannelLanes channel[kMaxGroups];
    FloatLanes least[kMaxGroups];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kFloatLanes;
      const Run run = GroupRun<kFloatLanes>(plan, rows, c, counters.end);
      channel[g] = ChannelOf<type, gate>(
          args, [c, &run](const double* vector) HWY_ATTR { return FloatsOf(vector + c, run.lanes); });
      least[g] = BroadcastFloat(HUGE_VALF);
      sums[g].run = run;
    }
    SumGroups(
        rows, counters,
        [&](auto whole, const Run& run, int64_t g)
            HWY_ATTR { return GradientTerms<type, gate, decltype(whole)::value>(args, run, channel[g], &least[g]); },
        sums);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = counters.begin + g * kFloatLanes;
      AddGroup<type, gate>(args, rows, sums[g], channel[g].mean, least[g], c, first + c, second + c);
    }
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
