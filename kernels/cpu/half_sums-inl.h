// Sums in float32 of groups of sixteen elements of the two 16-bit types, for their reductions: the terms, the sums, and
// the findings about what float32 lost.

#if defined(SYNCBN_KERNELS_CPU_HALF_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_HALF_SUMS_INL_H_
#undef SYNCBN_KERNELS_CPU_HALF_SUMS_INL_H_
#else
#define SYNCBN_KERNELS_CPU_HALF_SUMS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/floats-inl.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/reduce.h"
#include "kernels/gate.h"
#include "kernels/half.h"
#include "kernels/moments.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

// Sums in float64 of sixteen float32 lanes: lanes 0 to 7, and 8 to 15.
struct WideSums {
  Lanes lower, upper;

  HWY_INLINE WideSums() : lower(Zero()), upper(Zero()) {}

  HWY_INLINE void Add(const FloatLanes& v) {
    lower = lower + WidenHalf<0>(v);
    upper = upper + WidenHalf<1>(v);
  }

  // Returns eight of the lanes in float64.
  template <size_t which>
  static HWY_INLINE Lanes WidenHalf(const FloatLanes& v) {
    Lanes r;
    SYNCBN_FOR_PARTS(i) {
      const size_t part = which * kParts + i;  // Counted in vectors of float64.
#if HWY_TARGET == HWY_SCALAR                   // Which has no halves, and as many floats as doubles.
      r.part[i] = hn::PromoteTo(D(), v.part[part]);
#else
      if (part % 2 == 0) {
        r.part[i] = hn::PromoteTo(D(), hn::LowerHalf(v.part[part / 2]));
      } else {
        r.part[i] = hn::PromoteTo(D(), hn::UpperHalf(DF(), v.part[part / 2]));
      }
#endif
    }
    return r;
  }
};

// Two sums at once, of terms that are added eight groups at a time, then four times that, then in float64: a long sum
// in float32 would lose the digits that a variance in float32 has.
struct FloatPairSums {
  FloatLanes first, second;  // Of fewer than eight groups.
  FloatLanes batch_first, batch_second;
  int64_t groups = 0;  // In both.
  WideSums wide_first, wide_second;

  HWY_INLINE FloatPairSums() : first(BroadcastFloat(0)), second(first), batch_first(first), batch_second(first) {}

  static constexpr int64_t kEight = 8;
  static constexpr int64_t kBatch = 32;

  // Returns the number of groups of `left` to be added before Added() must be called.
  HWY_INLINE int64_t Room(int64_t left) const { return std::min(left, kEight - groups % kEight); }

  HWY_INLINE void Added(int64_t more) {
    groups += more;
    if (groups % kEight != 0) return;
    batch_first = batch_first + first;
    batch_second = batch_second + second;
    first = second = BroadcastFloat(0);
    if (groups == kBatch) Widen();
  }

  // Must be called after the last group.
  HWY_INLINE void Finish() {
    batch_first = batch_first + first;
    batch_second = batch_second + second;
    Widen();
  }

 private:
  HWY_INLINE void Widen() {
    wide_first.Add(batch_first);
    wide_second.Add(batch_second);
    batch_first = batch_second = BroadcastFloat(0);
    groups = 0;
  }
};

template <DataType type, bool whole>
HWY_INLINE FloatLanes LoadHalfGroup(const uint8_t* p, const Run& run) {
  if constexpr (whole) return LoadHalves<type>(p);
  return run.readable ? LoadHalves<type>(p) : LoadHalves<type>(p, run.lanes);
}

template <bool whole>
HWY_INLINE FloatLanes ClipFloats(const FloatLanes& v, int64_t lanes) {
  if constexpr (whole) return v;
  return FirstOf(lanes, v, BroadcastFloat(0));
}

// Adds the terms of kGroups groups, 1, 2 or 4. They are added to each other first, which loses less and waits less.
template <int kGroups, class Terms>
HWY_INLINE void AddGroups(const Terms& terms, int64_t at, int64_t stride, FloatPairSums* sums) {
  FloatLanes first[kGroups], second[kGroups];
  _Pragma("GCC unroll 4") for (int j = 0; j < kGroups; ++j) terms.At(at + j * stride, &first[j], &second[j]);
  if constexpr (kGroups == 4) {
    first[0] = first[0] + first[2];
    first[1] = first[1] + first[3];
    second[0] = second[0] + second[2];
    second[1] = second[1] + second[3];
  }
  if constexpr (kGroups >= 2) {
    first[0] = first[0] + first[1];
    second[0] = second[0] + second[1];
  }
  sums->first = sums->first + first[0];
  sums->second = sums->second + second[0];
}

// Adds the terms of a run's groups: terms.At(at, &first, &second) sets those of the group at an element.
template <class Terms>
HWY_INLINE void AddRun(const Run& run, const Terms& terms, FloatPairSums* sums) {
  const int64_t stride = run.stride;
  int64_t at = run.first;
  for (int64_t left = run.groups; left > 0;) {
    const int64_t groups = sums->Room(left);
    int64_t i = groups;
    for (; i >= 4; i -= 4, at += 4 * stride) AddGroups<4>(terms, at, stride, sums);
    if (i >= 2) {
      AddGroups<2>(terms, at, stride, sums);
      at += 2 * stride;
    }
    if (i % 2 != 0) {
      AddGroups<1>(terms, at, stride, sums);
      at += stride;
    }
    sums->Added(groups);
    left -= groups;
  }
}

// The same for a row's last group.
template <class Terms>
HWY_INLINE void AddTail(const Run& run, const Terms& terms, FloatPairSums* sums) {
  if (run.groups == 0) return;
  AddGroups<1>(terms, run.first, run.stride, sums);
  sums->Added(1);
}

// x - center, and its square.
template <DataType type, bool whole>
struct DeviationTerms {
  const uint8_t* x;
  const Run& run;
  FloatLanes center;

  HWY_INLINE DeviationTerms(const uint8_t* x_, const Run& run_, const FloatLanes& center_)
      : x(x_), run(run_), center(center_) {}

  HWY_INLINE void At(int64_t at, FloatLanes* first, FloatLanes* second) const {
    *first = ClipFloats<whole>(LoadHalfGroup<type, whole>(x + at * 2, run) - center, run.lanes);
    *second = *first * *first;
  }
};

HWY_INLINE FloatLanes FloatOf(double value) { return BroadcastFloat(static_cast<float>(value)); }

// Returns the value that deviations are taken from: one of the tensor's type, so that x - center is exact unless one is
// thousands of times the other. Its roundings would be the same for values of one binade, and add up.
template <DataType type>
double CenterOf(double value) {
  return type == DataType::kFloat16 ? Float16ToDouble(Float16FromDouble(value))
                                    : BFloat16ToDouble(BFloat16FromDouble(value));
}

// The first n of sixteen entries; the other lanes are 0.
HWY_INLINE FloatLanes FloatsOf(const double* entries, int64_t n) {
  alignas(64) float lanes[kFloatLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = static_cast<float>(entries[i]);
  return LoadFloats(lanes);
}

struct FloatChannelLanes {
  FloatLanes mean;  // Or the center in its place.
  FloatLanes forward_mean, forward_scale, forward_shift;
};

// dy where the gate is open, and dy * (x - mean).
template <DataType type, Gate gate, bool whole>
struct GradientTerms {
  const ReduceArgs& args;
  const Run& run;
  FloatChannelLanes channel;

  HWY_INLINE GradientTerms(const ReduceArgs& args_, const Run& run_, const FloatChannelLanes& channel_)
      : args(args_), run(run_), channel(channel_) {}

  HWY_INLINE void At(int64_t at, FloatLanes* first, FloatLanes* second) const {
    const FloatLanes x = LoadHalfGroup<type, whole>(args.x + at * 2, run);
    FloatLanes dy = LoadHalfGroup<type, whole>(args.dy + at * 2, run);
    if constexpr (gate == Gate::kMask) {
      dy = KeepWhereSet(MaskBits(args.gate.mask, at, run.lanes), dy);
    } else if constexpr (gate == Gate::kRecompute) {
      dy = KeepWhereAbove(Affine(x, channel.forward_mean, channel.forward_scale, channel.forward_shift),
                          Half<type>::kRoundsToZero, dy);
    }
    *first = ClipFloats<whole>(dy, run.lanes);
    *second = ClipFloats<whole>(dy * (x - channel.mean), run.lanes);
  }
};

// Tells whether float32 held the deviations' sums of a chunk. If no chunk came before, the pivot must not lie so far
// off that the squares are mostly its distance from the mean. Later it may: the distance then makes the merged m2 as
// large.
inline bool HoldsDeviations(const ShiftedSums& sums, bool is_first) {
  // Nothing but the pivot, or 0 and numbers whose squares are too small for a float32 variance.
  if (sums.sum == 0 && sums.sum_squares == 0) return sums.pivot == 0 || std::abs(sums.pivot) > 0x1p-50;
  if (!(sums.sum_squares >= 1e-30 && sums.sum_squares <= 1e36)) return false;
  return !is_first || sums.sum * sums.sum <= 0.9 * static_cast<double>(sums.count) * sums.sum_squares;
}

// Tells whether float32 held the gradients' sums of a chunk.
inline bool HoldsGradients(double first, double second) {
  if (first == 0 && second == 0) return true;
  return std::abs(second) >= 1e-28 && std::abs(second) <= 1e36 && std::abs(first) <= 1e36;
}

// Moves to the same columns of the next row: a small plane takes little longer than RunsOf().
template <int64_t lanes>
HWY_INLINE void NextRow(const ReductionPlan& plan, RowRuns* runs) {
  const int64_t step = plan.width * plan.columns;
  runs->whole.first += step;
  runs->tail.first += step;
  runs->tail.readable = runs->tail.first + lanes <= plan.end_element();
}

HWY_INLINE double Sum(const WideSums& sums) { return Sum(sums.lower + sums.upper); }

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
