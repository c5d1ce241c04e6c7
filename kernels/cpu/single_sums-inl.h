// Sums in float32 of groups of sixteen elements, for the reductions: the terms, the sums, and the findings about what
// float32 lost.

#if defined(SYNCBN_KERNELS_CPU_SINGLE_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_SINGLE_SUMS_INL_H_
#undef SYNCBN_KERNELS_CPU_SINGLE_SUMS_INL_H_
#else
#define SYNCBN_KERNELS_CPU_SINGLE_SUMS_INL_H_
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

// Two terms of each lane of a group, or their sums over some groups.
struct FloatPair {
  FloatLanes first, second;
};

HWY_INLINE FloatPair operator+(const FloatPair& a, const FloatPair& b) {
  return {a.first + b.first, a.second + b.second};
}

// Two sums at once, of blocks: sums in float32 of the terms of some groups. Blocks are added in float32 until they have
// some 32 groups, then in float64: a long sum in float32 would lose the digits that a variance in float32 has.
struct BlockSums {
  static constexpr int64_t kBatch = 32;

  FloatLanes batch_first, batch_second;
  int64_t groups = 0;  // In both.
  WideSums first, second;

  HWY_INLINE BlockSums() : batch_first(BroadcastFloat(0)), batch_second(batch_first) {}

  SYNCBN_INLINE void Add(int64_t more, const FloatPair& block) {
    batch_first = batch_first + block.first;
    batch_second = batch_second + block.second;
    groups += more;
    if (groups >= kBatch) Finish();
  }

  // Must be called after the last block.
  HWY_INLINE void Finish() {
    first.Add(batch_first);
    second.Add(batch_second);
    batch_first = batch_second = BroadcastFloat(0);
    groups = 0;
  }
};

// A block that grows by a few groups at a time, and the blocks before it.
struct GrowingSums {
  static constexpr int64_t kBlock = 8;

  FloatPair block;
  int64_t groups = 0;
  BlockSums blocks;

  HWY_INLINE GrowingSums() : block{BroadcastFloat(0), BroadcastFloat(0)}, blocks() {}

  HWY_INLINE void Add(int64_t more, const FloatPair& terms) {
    block = block + terms;
    groups += more;
    if (groups >= kBlock) EndBlock();
  }

  // Must be called after the last group.
  HWY_INLINE void Finish() {
    EndBlock();
    blocks.Finish();
  }

 private:
  HWY_INLINE void EndBlock() {
    blocks.Add(groups, block);
    block = {BroadcastFloat(0), BroadcastFloat(0)};
    groups = 0;
  }
};

template <DataType type, bool whole>
HWY_INLINE FloatLanes LoadFloatGroup(const uint8_t* p, const Run& run) {
  if constexpr (whole) return LoadAsFloats<type>(p);
  return run.readable ? LoadAsFloats<type>(p) : LoadAsFloats<type>(p, run.lanes);
}

template <bool whole>
HWY_INLINE FloatLanes ClipFloats(const FloatLanes& v, int64_t lanes) {
  if constexpr (whole) return v;
  return FirstOf(lanes, v, BroadcastFloat(0));
}

// Returns the sums over kGroups groups, 1 to 4. Adding them to each other first loses less and waits less.
template <int kGroups, class Terms>
HWY_INLINE FloatPair SumOfGroups(const Terms& terms, int64_t at, int64_t stride) {
  if constexpr (kGroups == 1) return terms.At(at);
  if constexpr (kGroups == 2) return terms.At(at) + terms.At(at + stride);
  if constexpr (kGroups == 3) return SumOfGroups<2>(terms, at, stride) + terms.At(at + 2 * stride);
  return SumOfGroups<2>(terms, at, stride) + SumOfGroups<2>(terms, at + 2 * stride, stride);
}

template <int kGroups, class Terms>
HWY_INLINE void AddGroups(const Terms& terms, int64_t at, int64_t stride, GrowingSums* sums) {
  sums->Add(kGroups, SumOfGroups<kGroups>(terms, at, stride));
}

// Adds the terms of a run's groups: terms.At(at) returns those of the group at an element.
template <class Terms>
HWY_INLINE void AddRun(const Run& run, const Terms& terms, GrowingSums* sums) {
  const int64_t stride = run.stride;
  int64_t at = run.first;
  int64_t left = run.groups;
  for (; left >= 4; left -= 4, at += 4 * stride) AddGroups<4>(terms, at, stride, sums);
  if (left == 3) {
    AddGroups<3>(terms, at, stride, sums);
  } else if (left == 2) {
    AddGroups<2>(terms, at, stride, sums);
  } else if (left == 1) {
    AddGroups<1>(terms, at, stride, sums);
  }
}

// The same for a row's last group.
template <class Terms>
HWY_INLINE void AddTail(const Run& run, const Terms& terms, GrowingSums* sums) {
  if (run.groups != 0) AddGroups<1>(terms, run.first, run.stride, sums);
}

// Adds n rows of kAbreast adjacent groups: terms(g) are those of a group, and `at` is the first one's first element.
template <int kAbreast, class TermsOf>
HWY_INLINE void AddRows(const TermsOf& terms, int64_t at, int64_t stride, int64_t n, BlockSums* const* sums) {
  FloatPair block[kAbreast];
  _Pragma("GCC unroll 4") for (int g = 0; g < kAbreast; ++g) block[g] = {BroadcastFloat(0), BroadcastFloat(0)};
  int64_t left = n;
  for (; left >= 2; left -= 2, at += 2 * stride) {
    _Pragma("GCC unroll 4") for (int g = 0; g < kAbreast; ++g) {
      const int64_t i = at + g * kFloatLanes;
      block[g] = block[g] + (terms(g).At(i) + terms(g).At(i + stride));
    }
  }
  if (left > 0) {
    _Pragma("GCC unroll 4") for (int g = 0; g < kAbreast; ++g) {
      block[g] = block[g] + terms(g).At(at + g * kFloatLanes);
    }
  }
  _Pragma("GCC unroll 4") for (int g = 0; g < kAbreast; ++g) sums[g]->Add(n, block[g]);
}

// x - center, and its square.
template <DataType type, bool whole>
struct DeviationTerms {
  const uint8_t* x;
  const Run& run;
  FloatLanes center;

  HWY_INLINE DeviationTerms(const uint8_t* x_, const Run& run_, const FloatLanes& center_)
      : x(x_), run(run_), center(center_) {}

  SYNCBN_INLINE FloatPair At(int64_t at) const {
    const FloatLanes deviation =
        ClipFloats<whole>(Minus(LoadFloatGroup<type, whole>(x + at * Element<type>::kSize, run), center), run.lanes);
    return {deviation, deviation * deviation};
  }
};

HWY_INLINE FloatLanes FloatOf(double value) { return BroadcastFloat(static_cast<float>(value)); }

// Returns the value that deviations are taken from: one of the tensor's type, so that x - center is exact unless one is
// thousands of times the other. Its roundings would be the same for values of one binade, and add up.
template <DataType type>
double CenterOf(double value) {
  if constexpr (type == DataType::kFloat16) {
    return Float16ToDouble(Float16FromDouble(value));
  } else if constexpr (type == DataType::kBFloat16) {
    return BFloat16ToDouble(BFloat16FromDouble(value));
  } else {
    return static_cast<double>(static_cast<float>(value));
  }
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

// dy where the gate is open, and dy * (x - mean). The gate of a float32 tensor, whose outputs are computed in float64,
// is taken from an output in float32; `least` gets the smallest of these in size, for GateIsSure().
template <DataType type, Gate gate, bool whole>
struct GradientTerms {
  const ReduceArgs& args;
  const Run& run;
  FloatChannelLanes channel;
  FloatLanes* least;

  HWY_INLINE GradientTerms(const ReduceArgs& args_, const Run& run_, const FloatChannelLanes& channel_,
                           FloatLanes* least_)
      : args(args_), run(run_), channel(channel_), least(least_) {}

  SYNCBN_INLINE FloatPair At(int64_t at) const {
    const FloatLanes x = LoadFloatGroup<type, whole>(args.x + at * Element<type>::kSize, run);
    FloatLanes dy = LoadFloatGroup<type, whole>(args.dy + at * Element<type>::kSize, run);
    if constexpr (gate == Gate::kMask) {
      dy = KeepWhereSet(MaskBits(args.gate.mask, at, run.lanes), dy);
    } else if constexpr (gate == Gate::kRecompute && type == DataType::kFloat32) {
      const FloatLanes output = x * channel.forward_scale + channel.forward_shift;
      dy = KeepWhereAbove(output, 0, dy);
      const FloatLanes size = LeastSize(output, *least);
      *least = whole ? size : FirstOf(run.lanes, size, *least);
    } else if constexpr (gate == Gate::kRecompute) {
      dy = KeepWhereAbove(Affine(x, channel.forward_mean, channel.forward_scale, channel.forward_shift),
                          Half<type>::kRoundsToZero, dy);
    }
    return {ClipFloats<whole>(dy, run.lanes), ClipFloats<whole>(dy * Minus(x, channel.mean), run.lanes)};
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

// Tells whether outputs that were computed in float32, none of them smaller than `least` in size, have the sign of
// those in float64, given a channel's factor and constant term. The roundings of both numbers, of the product and of
// the sum change an output by less than 2^-22 of itself and of the term, unless a product leaves float32's range.
inline bool GateIsSure(double scale, double shift, double least) {
  const double factor = std::abs(scale), term = std::abs(shift);
  if (!(factor == 0 || (factor >= 0x1p-100 && factor <= 0x1p100)) || !(term <= 0x1p100)) return false;
  return least > 0x1p-20 * term + 0x1p-100;
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
