#include "kernels/cpu/half_elementwise.h"

#include <algorithm>
#include <cstring>

#include "kernels/gate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/half_elementwise.cc"
// clang-format off
#include "kernels/cpu/targets.h"
// clang-format on
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/floats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {
namespace {

constexpr int64_t kPairLanes = 2 * kFloatLanes;

// kTables coefficients of sixteen elements.
template <int kTables>
struct CoefficientLanes {
  FloatLanes of[kTables];
};

// The entries from one on, for sixteen elements.
template <int kTables>
HWY_INLINE CoefficientLanes<kTables> AdjacentAt(const float* const* tables, int64_t entry) {
  CoefficientLanes<kTables> r;
  _Pragma("GCC unroll 8") for (int t = 0; t < kTables; ++t) r.of[t] = LoadFloats(tables[t] + entry);
  return r;
}

// One entry for all.
template <int kTables>
HWY_INLINE CoefficientLanes<kTables> EqualAt(const float* const* tables, int64_t entry) {
  CoefficientLanes<kTables> r;
  _Pragma("GCC unroll 8") for (int t = 0; t < kTables; ++t) r.of[t] = BroadcastFloat(tables[t][entry]);
  return r;
}

// The entries of the even and of the odd ones of 32 elements.
template <int kTables>
struct CoefficientPair {
  CoefficientLanes<kTables> even, odd;
};

// An operation has its pointers in members of its own: what it stores are bytes, after which the compiler takes nothing
// behind a pointer for unchanged.

// Calls an operation for a unit's elements, sixteen at a time from the unit's first on: op.Group(i, coefficients), and
// op.Part(i, n, coefficients) for the tensor's last n < 16. Neighbouring elements have neighbouring coefficients.
template <class Op>
HWY_INLINE void EachGroupAdjacent(const ElementwisePlan& plan, const Range& elements, const Op& op) {
  const int64_t period = plan.period;
  int64_t entry = elements.begin % period;
  int64_t i = elements.begin;
  for (; i + kFloatLanes <= elements.end; i += kFloatLanes) {
    op.Group(i, AdjacentAt<Op::kTables>(op.tables, entry));
    entry += kFloatLanes;
    if (entry >= period) entry -= period;
  }
  if (i < elements.end) op.Part(i, elements.end - i, AdjacentAt<Op::kTables>(op.tables, entry));
}

// The same for 32 elements at a time: op.Pairs(i, coefficients). An operation's last elements are copied, so that
// there are always 32 of them.
template <class Op>
HWY_INLINE void EachPairAdjacent(const ElementwisePlan& plan, const Range& elements, const Op& op) {
  const int64_t period = plan.period;
  int64_t entry = elements.begin % period;
  int64_t i = elements.begin;
  for (; i + kPairLanes <= elements.end; i += kPairLanes) {
    op.Pairs(i, {AdjacentAt<Op::kTables>(op.tables, entry), AdjacentAt<Op::kTables>(op.tables, entry + kFloatLanes)});
    entry += kPairLanes;
    if (entry == period) entry = 0;
  }
  if (i < elements.end) {
    op.LastPairs(i, elements.end - i,
                 {AdjacentAt<Op::kTables>(op.tables, entry), AdjacentAt<Op::kTables>(op.tables, entry + kFloatLanes)});
  }
}

// The same for planes of plan.repeat elements with equal coefficients. A group may meet several planes.
template <bool kPairs, class Op>
HWY_INLINE void EachGroupOfPlanes(const ElementwisePlan& plan, const Range& elements, const Op& op) {
  int64_t entry = elements.begin / plan.repeat % plan.period;
  int64_t left = plan.repeat - elements.begin % plan.repeat;  // Elements of this plane.
  int64_t i = elements.begin;
  while (i < elements.end) {
    auto lanes = EqualAt<Op::kTables>(op.tables, entry);
    const int64_t end = i + std::min(left, elements.end - i) / kFloatLanes * kFloatLanes;
    left -= end - i;
    if (kPairs) {
      for (; i + kPairLanes <= end; i += kPairLanes) op.Pairs(i, {lanes, lanes});
    }
    for (; i < end; i += kFloatLanes) op.Group(i, lanes);
    const int64_t n = std::min(kFloatLanes, elements.end - i);
    if (n == 0) break;
    while (left < n) {
      entry = entry + 1 == plan.period ? 0 : entry + 1;
      const auto next = EqualAt<Op::kTables>(op.tables, entry);
      _Pragma("GCC unroll 8") for (int t = 0; t < Op::kTables; ++t) lanes.of[t] =
          FirstOf(left, lanes.of[t], next.of[t]);
      left += plan.repeat;
    }
    if (n == kFloatLanes) {
      op.Group(i, lanes);
    } else {
      op.Part(i, n, lanes);
    }
    left -= n;
    i += n;
  }
}

template <class Op>
HWY_INLINE void EachGroup(const ElementwisePlan& plan, int64_t unit, const Op& op, bool pairs) {
  const Range elements = plan.ElementsOf(unit);
  if constexpr (Op::kHasPairs) {
    if (pairs && plan.repeat == 1) return EachPairAdjacent(plan, elements, op);
    if (pairs) return EachGroupOfPlanes<true>(plan, elements, op);
  }
  if (plan.repeat == 1) {
    EachGroupAdjacent(plan, elements, op);
  } else {
    EachGroupOfPlanes<false>(plan, elements, op);
  }
}

// Fewer than 32 elements, and zeros.
struct FewPairs {
  alignas(64) uint8_t bytes[kPairLanes * 2] = {};

  FewPairs() = default;
  FewPairs(const uint8_t* from, int64_t n) { std::memcpy(bytes, from, static_cast<size_t>(n) * 2); }
};

template <DataType type, bool residual, bool relu>
struct ForwardOp {
  static constexpr int kTables = 3;
  static constexpr bool kHasPairs = type == DataType::kBFloat16;

  const float* const tables[kTables];
  const uint8_t* const x;
  const uint8_t* const added;
  uint8_t* const y;
  uint8_t* const mask;

  // The constructor is written out because an implicit one would not be compiled for the target.
  HWY_INLINE explicit ForwardOp(const HalfForwardArgs& args)
      : tables{args.coefficients.mean, args.coefficients.scale, args.coefficients.shift},
        x(args.x),
        added(static_cast<const uint8_t*>(args.epilogue.residual)),
        y(args.y),
        mask(relu ? args.epilogue.relu_mask : nullptr) {}

  static HWY_INLINE FloatLanes Output(const FloatLanes& in, const FloatLanes& more,
                                      const CoefficientLanes<kTables>& c) {
    FloatLanes out = Affine(in, c.of[0], c.of[1], c.of[2]);
    if constexpr (residual) out = out + more;
    if constexpr (relu) out = Relu(out);
    return out;
  }

  // A positive value may be rounded to 0.
  HWY_INLINE void WriteMask(const FloatLanes& out, int64_t i, int64_t n) const {
    if (mask == nullptr) return;
    const uint32_t bits = BitsAbove(out, Half<type>::kRoundsToZero) & ((1u << n) - 1);
    mask[i / 8] = static_cast<uint8_t>(bits);
    if (n > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }

  SYNCBN_INLINE void Group(int64_t i, const CoefficientLanes<kTables>& c) const {
    FloatLanes more = BroadcastFloat(0);
    if constexpr (residual) more = LoadAsFloats<type>(added + i * 2);
    const FloatLanes out = Output(LoadAsFloats<type>(x + i * 2), more, c);
    StoreHalves<type>(out, y + i * 2);
    WriteMask(out, i, kFloatLanes);
  }

  SYNCBN_INLINE void Part(int64_t i, int64_t n, const CoefficientLanes<kTables>& c) const {
    FloatLanes more = BroadcastFloat(0);
    if constexpr (residual) more = LoadAsFloats<type>(added + i * 2, n);
    const FloatLanes out = Output(LoadAsFloats<type>(x + i * 2, n), more, c);
    StoreHalves<type>(out, y + i * 2, n);
    WriteMask(out, i, n);
  }

  HWY_INLINE void Pairs(int64_t i, const CoefficientPair<kTables>& c) const {
    PairsAt(x + i * 2, residual ? added + i * 2 : nullptr, c, y + i * 2);
  }

  HWY_INLINE void LastPairs(int64_t i, int64_t n, const CoefficientPair<kTables>& c) const {
    const FewPairs in(x + i * 2, n), more(residual ? added + i * 2 : x + i * 2, n);
    FewPairs out;
    PairsAt(in.bytes, more.bytes, c, out.bytes);
    std::memcpy(y + i * 2, out.bytes, static_cast<size_t>(n) * 2);
  }

 private:
  static SYNCBN_INLINE void PairsAt(const uint8_t* from, const uint8_t* residuals, const CoefficientPair<kTables>& c,
                                    uint8_t* to) {
    FloatLanePair more = {BroadcastFloat(0), BroadcastFloat(0)};
    if constexpr (residual) more = LoadPairs(residuals);
    const FloatLanePair in = LoadPairs(from);
    StorePairs({Output(in.even, more.even, c.even), Output(in.odd, more.odd, c.odd)}, to);
  }
};

template <DataType type>
void ForwardOf(const HalfForwardArgs& args, int64_t unit) {
  const bool residual = args.epilogue.residual != nullptr;
  if (residual && args.epilogue.relu) return EachGroup(args.plan, unit, ForwardOp<type, true, true>(args), args.pairs);
  if (residual) return EachGroup(args.plan, unit, ForwardOp<type, true, false>(args), args.pairs);
  if (args.epilogue.relu) return EachGroup(args.plan, unit, ForwardOp<type, false, true>(args), args.pairs);
  return EachGroup(args.plan, unit, ForwardOp<type, false, false>(args), args.pairs);
}

template <DataType type, Gate gate>
struct BackwardOp {
  static constexpr int kTables = gate == Gate::kRecompute ? 7 : 4;
  static constexpr bool kHasPairs = type == DataType::kBFloat16 && gate != Gate::kMask;

  // The last three are not read unless the gate needs them.
  const float* const tables[7];
  const uint8_t* const dy;
  const uint8_t* const x;
  const uint8_t* const mask;
  uint8_t* const dx;
  uint8_t* const d_residual;

  HWY_INLINE explicit BackwardOp(const HalfBackwardArgs& args)
      : tables{args.coefficients.mean, args.coefficients.scale, args.coefficients.mean_dy, args.coefficients.projection,
               args.forward.mean,      args.forward.scale,      args.forward.shift},
        dy(args.dy),
        x(args.x),
        mask(args.mask),
        dx(args.dx),
        d_residual(args.d_residual) {}

  HWY_INLINE FloatLanes PassGate(const FloatLanes& gradient, const FloatLanes& in, int64_t i, int64_t n,
                                 const CoefficientLanes<kTables>& c) const {
    if constexpr (gate == Gate::kMask) {
      return KeepWhereSet(MaskBits(mask, i, n), gradient);
    } else if constexpr (gate == Gate::kRecompute) {
      return KeepWhereAbove(Affine(in, c.of[4], c.of[5], c.of[6]), Half<type>::kRoundsToZero, gradient);
    } else {
      return gradient;
    }
  }

  static HWY_INLINE FloatLanes Output(const FloatLanes& gradient, const FloatLanes& in,
                                      const CoefficientLanes<kTables>& c) {
    return c.of[1] * (gradient - c.of[2] - (in - c.of[0]) * c.of[3]);
  }

  SYNCBN_INLINE void Group(int64_t i, const CoefficientLanes<kTables>& c) const {
    const FloatLanes in = LoadAsFloats<type>(x + i * 2);
    const FloatLanes gradient = PassGate(LoadAsFloats<type>(dy + i * 2), in, i, kFloatLanes, c);
    StoreHalves<type>(Output(gradient, in, c), dx + i * 2);
    if (d_residual != nullptr) StoreHalves<type>(gradient, d_residual + i * 2);
  }

  SYNCBN_INLINE void Part(int64_t i, int64_t n, const CoefficientLanes<kTables>& c) const {
    const FloatLanes in = LoadAsFloats<type>(x + i * 2, n);
    const FloatLanes gradient = PassGate(LoadAsFloats<type>(dy + i * 2, n), in, i, n, c);
    StoreHalves<type>(Output(gradient, in, c), dx + i * 2, n);
    if (d_residual != nullptr) StoreHalves<type>(gradient, d_residual + i * 2, n);
  }

  HWY_INLINE void Pairs(int64_t i, const CoefficientPair<kTables>& c) const {
    PairsAt(dy + i * 2, x + i * 2, c, dx + i * 2, d_residual == nullptr ? nullptr : d_residual + i * 2);
  }

  HWY_INLINE void LastPairs(int64_t i, int64_t n, const CoefficientPair<kTables>& c) const {
    const FewPairs gradients(dy + i * 2, n), in(x + i * 2, n);
    FewPairs out, passed;
    PairsAt(gradients.bytes, in.bytes, c, out.bytes, passed.bytes);
    std::memcpy(dx + i * 2, out.bytes, static_cast<size_t>(n) * 2);
    if (d_residual != nullptr) std::memcpy(d_residual + i * 2, passed.bytes, static_cast<size_t>(n) * 2);
  }

 private:
  SYNCBN_INLINE void PairsAt(const uint8_t* gradients, const uint8_t* inputs, const CoefficientPair<kTables>& c,
                             uint8_t* to, uint8_t* passed) const {
    const FloatLanePair in = LoadPairs(inputs);
    FloatLanePair gradient = LoadPairs(gradients);
    gradient.even = PassGate(gradient.even, in.even, 0, kFloatLanes, c.even);
    gradient.odd = PassGate(gradient.odd, in.odd, 0, kFloatLanes, c.odd);
    StorePairs({Output(gradient.even, in.even, c.even), Output(gradient.odd, in.odd, c.odd)}, to);
    if (passed != nullptr) StorePairs(gradient, passed);
  }
};

template <DataType type>
void BackwardOf(const HalfBackwardArgs& args, int64_t unit) {
  if (args.mask != nullptr) return EachGroup(args.plan, unit, BackwardOp<type, Gate::kMask>(args), args.pairs);
  if (args.forward.mean != nullptr)
    return EachGroup(args.plan, unit, BackwardOp<type, Gate::kRecompute>(args), args.pairs);
  return EachGroup(args.plan, unit, BackwardOp<type, Gate::kNone>(args), args.pairs);
}

}  // namespace

void HalfForward(const HalfForwardArgs& args, int64_t unit) {
  if (args.type == DataType::kFloat16) return ForwardOf<DataType::kFloat16>(args, unit);
  return ForwardOf<DataType::kBFloat16>(args, unit);
}

void HalfBackward(const HalfBackwardArgs& args, int64_t unit) {
  if (args.type == DataType::kFloat16) return BackwardOf<DataType::kFloat16>(args, unit);
  return BackwardOf<DataType::kBFloat16>(args, unit);
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace syncbn::kernels::cpu {

HWY_EXPORT(HalfForward);
HWY_EXPORT(HalfBackward);

void HalfForwardUnit(const HalfForwardArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(HalfForward)(args, unit); }
void HalfBackwardUnit(const HalfBackwardArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(HalfBackward)(args, unit); }

}  // namespace syncbn::kernels::cpu

#endif  // HWY_ONCE
