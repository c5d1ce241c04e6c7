#include "kernels/cpu/reduce.h"

#include <algorithm>

#include "kernels/moments.h"

// Vectors of unknown length cannot be members of an array.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {
namespace {

// Groups of eight elements at a fixed distance: consecutive ones of one channel, or the same eight channels of
// consecutive rows. `lanes` < 8 of each group count; the other lanes read as 0, and are no part of the result.
struct Run {
  int64_t first = 0;   // The first group's first element, from the tensor's start.
  int64_t stride = 0;  // In elements.
  int64_t groups = 0;
  int64_t lanes = kLanes;
};

template <DataType type, bool whole>
HWY_INLINE Lanes LoadGroup(const uint8_t* p, int64_t lanes) {
  if constexpr (whole) {
    return Load<type>(p);
  } else {
    return Load<type>(p, lanes);
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

// Several accumulators hide the latency of the additions. Which one a group goes to depends on its place in the run.
// (The constructors are written out because implicit ones would not be compiled for the target.)
struct Sums {
  HWY_INLINE Sums() : a(Zero()), b(Zero()), c(Zero()), d(Zero()) {}
  HWY_INLINE Lanes Total() const { return (a + b) + (c + d); }

  Lanes a, b, c, d;
};

template <DataType type, bool whole>
HWY_INLINE void AddRun(const uint8_t* x, const Run& run, Sums* sums) {
  const int64_t step = run.stride * Element<type>::kSize;
  const uint8_t* p = x + run.first * Element<type>::kSize;
  int64_t left = run.groups;
  for (; left >= 4; left -= 4, p += 4 * step) {
    sums->a = sums->a + LoadGroup<type, whole>(p, run.lanes);
    sums->b = sums->b + LoadGroup<type, whole>(p + step, run.lanes);
    sums->c = sums->c + LoadGroup<type, whole>(p + 2 * step, run.lanes);
    sums->d = sums->d + LoadGroup<type, whole>(p + 3 * step, run.lanes);
  }
  for (; left > 0; --left, p += step) sums->a = sums->a + LoadGroup<type, whole>(p, run.lanes);
}

// Two sums at once, each in two accumulators.
struct PairSums {
  HWY_INLINE PairSums() : first_a(Zero()), first_b(Zero()), second_a(Zero()), second_b(Zero()) {}
  HWY_INLINE Lanes First() const { return first_a + first_b; }
  HWY_INLINE Lanes Second() const { return second_a + second_b; }

  Lanes first_a, first_b, second_a, second_b;
};

// Sums of x - center and of its square.
template <DataType type, bool whole>
HWY_INLINE void AddDeviations(const uint8_t* x, const Run& run, const Lanes& center, PairSums* sums) {
  const int64_t step = run.stride * Element<type>::kSize;
  const uint8_t* p = x + run.first * Element<type>::kSize;
  int64_t left = run.groups;
  for (; left >= 2; left -= 2, p += 2 * step) {
    const Lanes a = Clip<whole>(LoadGroup<type, whole>(p, run.lanes) - center, run.lanes);
    const Lanes b = Clip<whole>(LoadGroup<type, whole>(p + step, run.lanes) - center, run.lanes);
    sums->first_a = sums->first_a + a;
    sums->first_b = sums->first_b + b;
    sums->second_a = sums->second_a + a * a;
    sums->second_b = sums->second_b + b * b;
  }
  if (left > 0) {
    const Lanes a = Clip<whole>(LoadGroup<type, whole>(p, run.lanes) - center, run.lanes);
    sums->first_a = sums->first_a + a;
    sums->second_a = sums->second_a + a * a;
  }
}

// What a channel's gradient sums need besides the gradients.
struct ChannelLanes {
  Lanes mean;
  ForwardLanes forward;
};

// Sums of dy and of dy * (x - mean).
template <DataType type, Gate gate, bool whole>
HWY_INLINE void AddGradients(const ReduceArgs& args, const Run& run, const ChannelLanes& channel, PairSums* sums) {
  int64_t at = run.first;
  const auto add = [&](Lanes* first, Lanes* second) HWY_ATTR {
    const int64_t offset = at * Element<type>::kSize;
    const Lanes x = LoadGroup<type, whole>(args.x + offset, run.lanes);
    const Lanes dy = PassGate<type, gate>(LoadGroup<type, whole>(args.dy + offset, run.lanes), x, channel.forward,
                                          args.gate.mask, at, run.lanes);
    *first = *first + Clip<whole>(dy, run.lanes);
    *second = *second + Clip<whole>(dy * (x - channel.mean), run.lanes);
    at += run.stride;
  };
  int64_t left = run.groups;
  for (; left >= 2; left -= 2) {
    add(&sums->first_a, &sums->second_a);
    add(&sums->first_b, &sums->second_b);
  }
  if (left > 0) add(&sums->first_a, &sums->second_a);
}

// One row of one channel's chunk, channels first: whole groups, and what is left of the last one.
struct RowRuns {
  Run whole;
  Run tail;
};

RowRuns RunsOf(const ReductionPlan& plan, int64_t row, int64_t counter, const Range& columns) {
  RowRuns runs;
  runs.whole.first = plan.first_element + (row * plan.width + counter) * plan.columns + columns.begin;
  runs.whole.stride = kLanes;
  runs.whole.groups = columns.size() / kLanes;
  runs.tail.first = runs.whole.first + runs.whole.groups * kLanes;
  runs.tail.lanes = columns.size() % kLanes;
  runs.tail.groups = runs.tail.lanes > 0 ? 1 : 0;
  return runs;
}

template <DataType type>
Moments ChunkMoments(const ReduceArgs& args, int64_t chunk, int64_t counter) {
  const ReductionPlan& plan = *args.plan;
  const Range rows = plan.RowsOf(chunk);
  const Range columns = plan.ColumnsOf(chunk);
  const double count = static_cast<double>(rows.size() * columns.size());
  Sums sums;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowRuns runs = RunsOf(plan, row, counter, columns);
    AddRun<type, true>(args.x, runs.whole, &sums);
    AddRun<type, false>(args.x, runs.tail, &sums);
  }
  ShiftedSums about;
  about.count = rows.size() * columns.size();
  about.pivot = Sum(sums.Total()) / count;
  const Lanes center = Broadcast(about.pivot);
  PairSums deviations;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowRuns runs = RunsOf(plan, row, counter, columns);
    AddDeviations<type, true>(args.x, runs.whole, center, &deviations);
    AddDeviations<type, false>(args.x, runs.tail, center, &deviations);
  }
  about.sum = Sum(deviations.First());
  about.sum_squares = Sum(deviations.Second());
  return ToMoments(about);
}

template <DataType type>
void StatsChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean, double* m2) {
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      const Moments merged = Merge({count, mean[c], m2[c]}, ChunkMoments<type>(args, chunk, c));
      mean[c] = merged.mean;
      m2[c] = merged.m2;
    }
    count += args.plan->CountOf(chunk);
  }
}

// syncbn::ToMoments and syncbn::Merge, operation for operation, on eight counters with equal counts.
HWY_INLINE void MergeLanes(int64_t count, int64_t chunk_count, const Lanes& pivot, const PairSums& deviations,
                           int64_t lanes, double* mean, double* m2) {
  const double na = static_cast<double>(count);
  const double nb = static_cast<double>(chunk_count);
  const double n = na + nb;
  const Lanes sum = deviations.First();
  const Lanes shift = sum / Broadcast(nb);
  const Lanes chunk_mean = pivot + shift;
  const Lanes chunk_m2 = NotBelowZero(deviations.Second() - sum * shift);
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
HWY_INLINE void StatsGroup(const uint8_t* x, const Run& run, int64_t count, double* mean, double* m2) {
  Sums sums;
  AddRun<type, whole>(x, run, &sums);
  const Lanes pivot = sums.Total() / Broadcast(static_cast<double>(run.groups));
  PairSums deviations;
  AddDeviations<type, whole>(x, run, pivot, &deviations);
  MergeLanes(count, run.groups, pivot, deviations, run.lanes, mean, m2);
}

// Rows of a chunk for eight adjacent counters, or for as many as there are.
Run GroupRun(const ReductionPlan& plan, const Range& rows, int64_t counter, int64_t end) {
  Run run;
  run.first = plan.first_element + rows.begin * plan.width + counter;
  run.stride = plan.width;
  run.groups = rows.size();
  run.lanes = std::min(kLanes, end - counter);
  return run;
}

template <DataType type>
void StatsChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* mean, double* m2) {
  const ReductionPlan& plan = *args.plan;
  int64_t count = 0;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; c += kLanes) {
      const Run run = GroupRun(plan, rows, c, counters.end);
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
void BackwardChannelsFirst(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                           double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    const Range columns = plan.ColumnsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; ++c) {
      ChannelLanes channel = {Broadcast(args.mean[c]), {Zero(), Zero(), Zero()}};
      if constexpr (gate == Gate::kForward) {
        const ForwardCoefficients& forward = args.gate.forward;
        channel.forward = {Broadcast(forward.mean[c]), Broadcast(forward.scale[c]), Broadcast(forward.shift[c])};
      }
      PairSums sums;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const RowRuns runs = RunsOf(plan, row, c, columns);
        AddGradients<type, gate, true>(args, runs.whole, channel, &sums);
        AddGradients<type, gate, false>(args, runs.tail, channel, &sums);
      }
      first[c] += Sum(sums.First());
      second[c] += Sum(sums.Second());
    }
  }
}

template <DataType type, Gate gate>
void BackwardChannelsLast(const ReduceArgs& args, const Range& counters, const Range& chunks, double* first,
                          double* second) {
  const ReductionPlan& plan = *args.plan;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const Range rows = plan.RowsOf(chunk);
    for (int64_t c = counters.begin; c < counters.end; c += kLanes) {
      const Run run = GroupRun(plan, rows, c, counters.end);
      ChannelLanes channel = {LoadDoubles(args.mean + c, run.lanes), {Zero(), Zero(), Zero()}};
      if constexpr (gate == Gate::kForward) {
        const ForwardCoefficients& forward = args.gate.forward;
        channel.forward = {LoadDoubles(forward.mean + c, run.lanes), LoadDoubles(forward.scale + c, run.lanes),
                           LoadDoubles(forward.shift + c, run.lanes)};
      }
      PairSums sums;
      if (run.lanes == kLanes) {
        AddGradients<type, gate, true>(args, run, channel, &sums);
      } else {
        AddGradients<type, gate, false>(args, run, channel, &sums);
      }
      StoreDoubles(LoadDoubles(first + c, run.lanes) + sums.First(), first + c, run.lanes);
      StoreDoubles(LoadDoubles(second + c, run.lanes) + sums.Second(), second + c, run.lanes);
    }
  }
}

template <DataType type>
void StatsOf(const ReduceArgs& args, int64_t unit) {
  const ReductionPlan& plan = *args.plan;
  const int64_t split = plan.SplitOf(unit);
  double* mean = args.first + split * plan.width;
  double* m2 = args.second + split * plan.width;
  if (plan.counters_adjacent) {
    StatsChannelsLast<type>(args, plan.CountersOf(unit), plan.ChunksOf(split), mean, m2);
  } else {
    StatsChannelsFirst<type>(args, plan.CountersOf(unit), plan.ChunksOf(split), mean, m2);
  }
}

template <DataType type, Gate gate>
void BackwardOf(const ReduceArgs& args, int64_t unit) {
  const ReductionPlan& plan = *args.plan;
  const int64_t split = plan.SplitOf(unit);
  double* first = args.first + split * plan.width;
  double* second = args.second + split * plan.width;
  if (plan.counters_adjacent) {
    BackwardChannelsLast<type, gate>(args, plan.CountersOf(unit), plan.ChunksOf(split), first, second);
  } else {
    BackwardChannelsFirst<type, gate>(args, plan.CountersOf(unit), plan.ChunksOf(split), first, second);
  }
}

template <DataType type>
void BackwardOf(const ReduceArgs& args, int64_t unit) {
  switch (KindOf(args.gate)) {
    case Gate::kOpen:
      return BackwardOf<type, Gate::kOpen>(args, unit);
    case Gate::kMask:
      return BackwardOf<type, Gate::kMask>(args, unit);
    case Gate::kForward:
      return BackwardOf<type, Gate::kForward>(args, unit);
  }
}

}  // namespace

void Stats(const ReduceArgs& args, int64_t unit) {
  switch (args.type) {
    case DataType::kFloat32:
      return StatsOf<DataType::kFloat32>(args, unit);
    case DataType::kFloat64:
      return StatsOf<DataType::kFloat64>(args, unit);
    case DataType::kFloat16:
      return StatsOf<DataType::kFloat16>(args, unit);
    case DataType::kBFloat16:
      return StatsOf<DataType::kBFloat16>(args, unit);
  }
}

void BackwardReduce(const ReduceArgs& args, int64_t unit) {
  switch (args.type) {
    case DataType::kFloat32:
      return BackwardOf<DataType::kFloat32>(args, unit);
    case DataType::kFloat64:
      return BackwardOf<DataType::kFloat64>(args, unit);
    case DataType::kFloat16:
      return BackwardOf<DataType::kFloat16>(args, unit);
    case DataType::kBFloat16:
      return BackwardOf<DataType::kBFloat16>(args, unit);
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace syncbn::kernels::cpu {

HWY_EXPORT(Stats);
HWY_EXPORT(BackwardReduce);

void StatsUnit(const ReduceArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(Stats)(args, unit); }
void BackwardReduceUnit(const ReduceArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(BackwardReduce)(args, unit); }

}  // namespace syncbn::kernels::cpu

#endif  // HWY_ONCE
