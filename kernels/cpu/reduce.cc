#include "kernels/cpu/reduce.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cc"
// clang-format off
#include "kernels/cpu/targets.h"
// clang-format on
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/float_stats-inl.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/single_reduce-inl.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {
namespace {

template <DataType type>
void StatsOf(const ReduceArgs& args, int64_t unit) {
  const ReductionPlan& plan = *args.plan;
  const int64_t split = plan.SplitOf(unit);
  const Range counters = plan.CountersOf(unit);
  const Range chunks = plan.ChunksOf(split);
  double* mean = args.first + split * plan.width;
  double* m2 = args.second + split * plan.width;
  if constexpr (type == DataType::kFloat32) {
    if (args.single) {
      if (plan.counters_adjacent) return FloatStatsChannelsLast(args, counters, chunks, mean, m2);
      return StatsChannelsFirst<FloatStatistics>(args, counters, chunks, mean, m2);
    }
  } else if constexpr (SizeOf(type) == 2) {
    if (args.single) {
      if (plan.counters_adjacent) return SingleStatsChannelsLast<type>(args, counters, chunks, mean, m2);
      return StatsChannelsFirst<SingleStatistics<type>>(args, counters, chunks, mean, m2);
    }
  }
  if (plan.counters_adjacent) return StatsChannelsLast<type>(args, counters, chunks, mean, m2);
  StatsChannelsFirst<WideStatistics<type>>(args, counters, chunks, mean, m2);
}

template <DataType type, Gate gate>
void BackwardOf(const ReduceArgs& args, int64_t unit) {
  const ReductionPlan& plan = *args.plan;
  const int64_t split = plan.SplitOf(unit);
  const Range counters = plan.CountersOf(unit);
  const Range chunks = plan.ChunksOf(split);
  double* first = args.first + split * plan.width;
  double* second = args.second + split * plan.width;
  if constexpr (type != DataType::kFloat64) {
    if (args.single) {
      if (plan.counters_adjacent) return SingleBackwardChannelsLast<type, gate>(args, counters, chunks, first, second);
      return SingleBackwardChannelsFirst<type, gate>(args, counters, chunks, first, second);
    }
  }
  if (plan.counters_adjacent) return BackwardChannelsLast<type, gate>(args, counters, chunks, first, second);
  BackwardChannelsFirst<type, gate>(args, counters, chunks, first, second);
}

template <DataType type>
void BackwardOf(const ReduceArgs& args, int64_t unit) {
  switch (KindOf(args.gate)) {
    case Gate::kNone:
      return BackwardOf<type, Gate::kNone>(args, unit);
    case Gate::kMask:
      return BackwardOf<type, Gate::kMask>(args, unit);
    case Gate::kRecompute:
      return BackwardOf<type, Gate::kRecompute>(args, unit);
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
