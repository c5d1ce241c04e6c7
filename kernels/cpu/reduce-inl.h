// The reductions in float64, for every type: groups of eight lanes, a chunk of a plan at a time.

#if defined(SYNCBN_KERNELS_CPU_REDUCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_REDUCE_INL_H_
#undef SYNCBN_KERNELS_CPU_REDUCE_INL_H_
#else
#define SYNCBN_KERNELS_CPU_REDUCE_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/lanes-inl.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce.h"
#include "kernels/gate.h"
#include "kernels/moments.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

// Groups of eight elements at a fixed distance: consecutive ones of one channel, or the same eight channels of
// consecutive rows. `lanes` < 8 of each group count; the other lanes are no part of the result.
struct Run {
  int64_t first = 0;   // The first group's first element, from the tensor's start.
  int64_t stride = 0;  // In elements.
  int64_t groups = 0;
  int64_t lanes = kLanes;
  bool readable = true;  // All eight elements of each group are in the tensor.
};

template <DataType type, bool whole>
SYNCBN_INLINE Lanes LoadGroup(const uint8_t* p, const Run& run) {
  if constexpr (whole) {
    return Load<type>(p);
  } else {
    return LoadPart<type>(p, run.lanes, run.readable);
  }
}

template <bool whole>
HWY_INLINE Lanes Clip(const Lanes& v, int64_t lanes) {
  if constexpr (whole) {
    return v;
  } else {
    return KeepFirst(lanes, v);
  }
}

// Two sums at once, each in two accumulators: one for even and one for odd groups of a run, to hide the latency of the
// additions; or one for each of two runs abreast. (The constructor is written out because an implicit one would not be
// compiled for the target.)
struct PairSums {
  HWY_INLINE PairSums() : first_a(Zero()), first_b(Zero()), second_a(Zero()), second_b(Zero()) {}

  Lanes first_a, first_b, second_a, second_b;
};

// Adds x - center and its square.
SYNCBN_INLINE void AddDeviation(const Lanes& deviation, Lanes* first, Lanes* second) {
  *first = *first + deviation;
  *second = *second + deviation * deviation;
}

template <DataType type, bool whole>
HWY_INLINE void AddDeviations(const uint8_t* x, const Run& run, const Lanes& center, PairSums* sums) {
  const int64_t step = run.stride * Element<type>::kSize;
  const uint8_t* p = x + run.first * Element<type>::kSize;
  int64_t left = run.groups;
  for (; left >= 2; left -= 2, p += 2 * step) {
    const Lanes a = LoadGroup<type, whole>(p, run) - center;
    const Lanes b = LoadGroup<type, whole>(p + step, run) - center;
    AddDeviation(Clip<whole>(a, run.lanes), &sums->first_a, &sums->second_a);
    AddDeviation(Clip<whole>(b, run.lanes), &sums->first_b, &sums->second_b);
  }
  if (left > 0) {
    const Lanes a = LoadGroup<type, whole>(p, run) - center;
    AddDeviation(Clip<whole>(a, run.lanes), &sums->first_a, &sums->second_a);
  }
}

// The same for a run and the one that begins eight elements later, so that a line of cache is read whole.
template <DataType type>
HWY_INLINE void AddDeviationsAbreast(const uint8_t* x, const Run& run, const Lanes& center_a, const Lanes& center_b,
                                     PairSums* sums) {
  const int64_t step = run.stride * Element<type>::kSize;
  const uint8_t* p = x + run.first * Element<type>::kSize;
  for (int64_t left = run.groups; left > 0; --left, p += step) {
    AddDeviation(Load<type>(p) - center_a, &sums->first_a, &sums->second_a);
    AddDeviation(Load<type>(p + kLanes * Element<type>::kSize) - center_b, &sums->first_b, &sums->second_b);
  }
}

// The inputs of a channel's gradient sums besides the gradients.
struct ChannelLanes {
  Lanes mean;
  ForwardLanes forward;
};

// Adds dy and dy * (x - mean) of the group at element `at`.
template <DataType type, Gate gate, bool whole>
SYNCBN_INLINE void AddGradient(const ReduceArgs& args, int64_t at, const Run& run, const ChannelLanes& channel,
                               Lanes* first, Lanes* second) {
  const int64_t offset = at * Element<type>::kSize;
  const Lanes x = LoadGroup<type, whole>(args.x + offset, run);
  const Lanes dy = PassGate<type, gate>(LoadGroup<type, whole>(args.dy + offset, run), x, channel.forward,
                                        args.gate.mask, at, run.lanes);
  *first = *first + Clip<whole>(dy, run.lanes);
  *second = *second + Clip<whole>(dy * (x - channel.mean), run.lanes);
}

template <DataType type, Gate gate, bool whole>
HWY_INLINE void AddGradients(const ReduceArgs& args, const Run& run, const ChannelLanes& channel, PairSums* sums) {
  int64_t at = run.first;
  int64_t left = run.groups;
  for (; left >= 2; left -= 2, at += 2 * run.stride) {
    AddGradient<type, gate, whole>(args, at, run, channel, &sums->first_a, &sums->second_a);
    AddGradient<type, gate, whole>(args, at + run.stride, run, channel, &sums->first_b, &sums->second_b);
  }
  if (left > 0) AddGradient<type, gate, whole>(args, at, run, channel, &sums->first_a, &sums->second_a);
}

// The same for a run and the one that begins eight elements later.
template <DataType type, Gate gate>
HWY_INLINE void AddGradientsAbreast(const ReduceArgs& args, const Run& run, const ChannelLanes& channel_a,
                                    const ChannelLanes& channel_b, PairSums* sums) {
  int64_t at = run.first;
  for (int64_t left = run.groups; left > 0; --left, at += run.stride) {
    AddGradient<type, gate, true>(args, at, run, channel_a, &sums->first_a, &sums->second_a);
    AddGradient<type, gate, true>(args, at + kLanes, run, channel_b, &sums->first_b, &sums->second_b);
  }
}

// One row of one channel's chunk, channels first: whole groups, and the rest of the last one.
struct RowRuns {
  Run whole;
  Run tail;
};

// Groups have `lanes` elements.
template <int64_t lanes>
RowRuns RunsOf(const ReductionPlan& plan, int64_t row, int64_t counter, const Range& columns) {
  RowRuns runs;
  runs.whole.first = plan.first_element + (row * plan.width + counter) * plan.columns + columns.begin;
  runs.whole.stride = lanes;
  runs.whole.groups = columns.size() / lanes;
  runs.tail.first = runs.whole.first + runs.whole.groups * lanes;
  runs.whole.lanes = lanes;
  runs.tail.lanes = columns.size() % lanes;
  runs.tail.groups = runs.tail.lanes > 0 ? 1 : 0;
  runs.tail.readable = runs.tail.first + lanes <= plan.end_element();
  return runs;
}

// The sums of a counter's values in a chunk about a pivot.
template <DataType type>
ShiftedSums ChunkSums(const ReduceArgs& args, int64_t chunk, int64_t counter, double pivot) {
  const ReductionPlan& plan = *args.plan;
  const Range rows = plan.RowsOf(chunk);
  const Range columns = plan.ColumnsOf(chunk);
  const Lanes center = Broadcast(pivot);
  PairSums sums;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowRuns runs = RunsOf<kLanes>(plan, row, counter, columns);
    AddDeviations<type, true>(args.x, runs.whole, center, &sums);
    AddDeviations<type, false>(args.x, runs.tail, center, &sums);
  }
  return {plan.CountOf(chunk), pivot, Sum(sums.first_a + sums.first_b), Sum(sums.second_a + sums.second_b)};
}

// Statistics in float64. Squares are summed about the mean of all chunks before; about the first value where there are
// none. The error of rounding is then some 2^-53 * n * d^2, for n values whose mean is d from the pivot, and a large d
// makes the merged m2 large too: the distance alone adds at least n * d^2 / 2 to it (for a first value, d^2).
template <DataType type>
struct WideStatistics {
  static constexpr DataType kType = type;

  static double FirstPivot(const ReduceArgs& args, int64_t chunk, int64_t counter) {
    const ReductionPlan& plan = *args.plan;
    const Run run = RunsOf<kLanes>(plan, plan.RowsOf(chunk).begin, counter, plan.ColumnsOf(chunk)).whole;
    double lanes[kLanes];
    StoreDoubles(Load<type>(args.x + run.first * Element<type>::kSize, 1), lanes);
    return lanes[0];
  }
  static double NextPivot(const Moments& before) { return before.mean; }
  static ShiftedSums SumsAbout(const ReduceArgs& args, int64_t chunk, int64_t counter, double pivot) {
    return ChunkSums<type>(args, chunk, counter, pivot);
  }
  static bool Holds(const ShiftedSums& /*sums*/, bool /*is_first*/) { return true; }
};

// A method chooses the pivot of a counter's first chunk and of the next ones, sums a chunk's values about it, and tells
// whether the sums will do; where they do not, the chunk is summed again in float64. Some counters at a time go through
// each step together: the steps of one would wait for each other.
template <class Method>
void StatsChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean, double* m2) {
  constexpr int64_t kAbreast = 16;
  double pivot[kAbreast];
  ShiftedSums about[kAbreast];
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    for (int64_t first = counters.begin; first < counters.end; first += kAbreast) {
      const int64_t n = std::min(kAbreast, counters.end - first);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = first + i;
        pivot[i] = count == 0 ? Method::FirstPivot(args, chunk, c) : Method::NextPivot(Moments{count, mean[c], m2[c]});
      }
      for (int64_t i = 0; i < n; ++i) about[i] = Method::SumsAbout(args, chunk, first + i, pivot[i]);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = first + i;
        if (HWY_UNLIKELY(!Method::Holds(about[i], count == 0))) {
          about[i] = ChunkSums<Method::kType>(args, chunk, c, pivot[i]);
        }
        const Moments merged = Merge({count, mean[c], m2[c]}, ToMoments(about[i]));
        mean[c] = merged.mean;
        m2[c] = merged.m2;
      }
    }
    count += args.plan->CountOf(chunk);
  }
}

// syncbn::ToMoments and syncbn::Merge, operation for operation, on eight counters with equal counts.
SYNCBN_INLINE void MergeLanes(int64_t count, int64_t chunk_count, const Lanes& pivot, const Lanes& sum,
                              const Lanes& sum_squares, int64_t lanes, double* mean, double* m2) {
  const double na = static_cast<double>(count);
  const double nb = static_cast<double>(chunk_count);
  const double n = na + nb;
  const Lanes shift = sum / Broadcast(nb);
  const Lanes chunk_mean = pivot + shift;
  const Lanes chunk_m2 = NotBelowZero(sum_squares - sum * shift);
  if (count == 0) {
    StoreDoubles(chunk_mean, mean, lanes);
    StoreDoubles(chunk_m2, m2, lanes);
    return;
  }
  const Lanes old_mean = LoadDoubles(mean, lanes);
  const Lanes delta = chunk_mean - old_mean;
  StoreDoubles(old_mean + delta * Broadcast(nb / n), mean, lanes);
  StoreDoubles(LoadDoubles(m2, lanes) + chunk_m2 + delta * delta * Broadcast(na * (nb / n)), m2, lanes);
}

template <DataType type, bool whole>
HWY_INLINE Lanes PivotOf(const uint8_t* x, const Run& run, int64_t count, const double* mean) {
  if (count == 0) return LoadGroup<type, whole>(x + run.first * Element<type>::kSize, run);
  return LoadDoubles(mean, run.lanes);
}

template <DataType type, bool whole>
HWY_INLINE void StatsGroup(const uint8_t* x, const Run& run, int64_t count, double* mean, double* m2) {
  const Lanes pivot = PivotOf<type, whole>(x, run, count, mean);
  PairSums sums;
  AddDeviations<type, whole>(x, run, pivot, &sums);
  MergeLanes(count, run.groups, pivot, sums.first_a + sums.first_b, sums.second_a + sums.second_b, run.lanes, mean, m2);
}

template <DataType type>
HWY_INLINE void StatsTwoGroups(const uint8_t* x, const Run& run, int64_t count, double* mean, double* m2) {
  const Lanes pivot_a = PivotOf<type, true>(x, run, count, mean);
  const Lanes pivot_b = PivotOf<type, true>(x + kLanes * Element<type>::kSize, run, count, mean + kLanes);
  PairSums sums;
  AddDeviationsAbreast<type>(x, run, pivot_a, pivot_b, &sums);
  MergeLanes(count, run.groups, pivot_a, sums.first_a, sums.second_a, kLanes, mean, m2);
  MergeLanes(count, run.groups, pivot_b, sums.first_b, sums.second_b, kLanes, mean + kLanes, m2 + kLanes);
}

// Rows of a chunk for `lanes` adjacent counters, or for as many as there are.
template <int64_t lanes>
Run GroupRun(const ReductionPlan& plan, const Range& rows, int64_t counter, int64_t end) {
  Run run;
  run.first = plan.first_element + rows.begin * plan.width + counter;
  run.stride = plan.width;
  run.groups = rows.size();
  run.lanes = std::min(lanes, end - counter);
  run.readable = run.first + (run.groups - 1) * run.stride + lanes <= plan.end_element();
  return run;
}

// Calls add(std::integral_constant<int, abreast>(), first group, first row, rows) for a few rows at a time, and for
// each of `groups` groups of counters in them, `kAbreast` at once where there are as many of the first `whole`. A group
// alone would take a part of each row, and the next one come back for more of it.
template <int kAbreast, class Add>
HWY_INLINE void EachBlockOfRows(const Range& rows, int64_t block, int64_t whole, int64_t groups, const Add& add) {
  for (int64_t row = 0; row < rows.size(); row += block) {
    const int64_t n = std::min(block, rows.size() - row);
    int64_t group = 0;
    for (; group + kAbreast <= whole; group += kAbreast) add(std::integral_constant<int, kAbreast>(), group, row, n);
    for (; group < groups; ++group) add(std::integral_constant<int, 1>(), group, row, n);
  }
}

template <DataType type>
void StatsChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean, double* m2) {
  const ReductionPlan& plan = *args.plan;
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    int64_t c = counters.begin;
    for (; c + 2 * kLanes <= counters.end; c += 2 * kLanes) {
      StatsTwoGroups<type>(args.x, GroupRun<kLanes>(plan, rows, c, counters.end), count, mean + c, m2 + c);
    }
    for (; c < counters.end; c += kLanes) {
      const Run run = GroupRun<kLanes>(plan, rows, c, counters.end);
      if (run.lanes == kLanes) {
        StatsGroup<type, true>(args.x, run, count, mean + c, m2 + c);
      } else {
        StatsGroup<type, false>(args.x, run, count, mean + c, m2 + c);
      }
    }
    count += rows.size();
  }
}

template <DataType type, Gate gate>
void BackwardChunk(const ReduceArgs& args, int64_t chunk, int64_t c, double* first, double* second) {
  const ReductionPlan& plan = *args.plan;
  const Range rows = plan.RowsOf(chunk);
  const Range columns = plan.ColumnsOf(chunk);
  ChannelLanes channel = {Broadcast(args.mean[c]), {Zero(), Zero(), Zero(), false}};
  if constexpr (gate == Gate::kRecompute) {
    const ForwardCoefficients& forward = args.gate.forward;
    channel.forward = {Broadcast(forward.mean[c]), Broadcast(forward.scale[c]), Broadcast(forward.shift[c]),
                       args.single_gate};
  }
  PairSums sums;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowRuns runs = RunsOf<kLanes>(plan, row, c, columns);
    AddGradients<type, gate, true>(args, runs.whole, channel, &sums);
    AddGradients<type, gate, false>(args, runs.tail, channel, &sums);
  }
  *first += Sum(sums.first_a + sums.first_b);
  *second += Sum(sums.second_a + sums.second_b);
}

template <DataType type, Gate gate>
void BackwardChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                           double* second) {
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      BackwardChunk<type, gate>(args, chunk, c, first + c, second + c);
    }
  }
}

template <Gate gate>
HWY_INLINE ChannelLanes ChannelsAt(const ReduceArgs& args, int64_t c, int64_t lanes) {
  ChannelLanes channel = {LoadDoubles(args.mean + c, lanes), {Zero(), Zero(), Zero(), false}};
  if constexpr (gate == Gate::kRecompute) {
    const ForwardCoefficients& forward = args.gate.forward;
    channel.forward = {LoadDoubles(forward.mean + c, lanes), LoadDoubles(forward.scale + c, lanes),
                       LoadDoubles(forward.shift + c, lanes), args.single_gate};
  }
  return channel;
}

HWY_INLINE void AddTo(double* total, const Lanes& sum, int64_t lanes) {
  StoreDoubles(LoadDoubles(total, lanes) + sum, total, lanes);
}

template <DataType type, Gate gate, bool whole>
HWY_INLINE void BackwardGroup(const ReduceArgs& args, const Run& run, int64_t c, double* first, double* second) {
  PairSums sums;
  AddGradients<type, gate, whole>(args, run, ChannelsAt<gate>(args, c, run.lanes), &sums);
  AddTo(first, sums.first_a + sums.first_b, run.lanes);
  AddTo(second, sums.second_a + sums.second_b, run.lanes);
}

template <DataType type, Gate gate>
HWY_INLINE void BackwardTwoGroups(const ReduceArgs& args, const Run& run, int64_t c, double* first, double* second) {
  PairSums sums;
  AddGradientsAbreast<type, gate>(args, run, ChannelsAt<gate>(args, c, kLanes),
                                  ChannelsAt<gate>(args, c + kLanes, kLanes), &sums);
  AddTo(first, sums.first_a, kLanes);
  AddTo(first + kLanes, sums.first_b, kLanes);
  AddTo(second, sums.second_a, kLanes);
  AddTo(second + kLanes, sums.second_b, kLanes);
}

template <DataType type, Gate gate>
void BackwardChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                          double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    int64_t c = counters.begin;
    for (; c + 2 * kLanes <= counters.end; c += 2 * kLanes) {
      BackwardTwoGroups<type, gate>(args, GroupRun<kLanes>(plan, rows, c, counters.end), c, first + c, second + c);
    }
    for (; c < counters.end; c += kLanes) {
      const Run run = GroupRun<kLanes>(plan, rows, c, counters.end);
      if (run.lanes == kLanes) {
        BackwardGroup<type, gate, true>(args, run, c, first + c, second + c);
      } else {
        BackwardGroup<type, gate, false>(args, run, c, first + c, second + c);
      }
    }
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
