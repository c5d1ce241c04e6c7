// Eight float64 lanes on the vectors of any target, and their loads and stores for each element type. Compiled once for
// each instruction set. All arithmetic is on these lanes, one IEEE operation at a time, so a result has the
// same bits on every target. (The bits of a NaN may differ.)

#if defined(SYNCBN_KERNELS_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_LANES_INL_H_
#undef SYNCBN_KERNELS_CPU_LANES_INL_H_
#else
#define SYNCBN_KERNELS_CPU_LANES_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/batch_norm.h"
#include "kernels/gate.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<double, 8>;
using DU = hn::Repartition<uint64_t, D>;
using Vector = hn::Vec<D>;

constexpr int64_t kLanes = 8;
constexpr size_t kWide = hn::MaxLanes(D());  // Lanes in one vector.
constexpr size_t kParts = 8 / kWide;

// The logical lanes of a type, numbered through the parts: eight of float64, sixteen of float32.
template <class Tag>
struct LanesOf {
  static constexpr size_t kCount = 64 / sizeof(hn::TFromD<Tag>) / hn::MaxLanes(Tag());
  hn::Vec<Tag> part[kCount];
};

using Lanes = LanesOf<D>;

// Unrolling of loops over vectors, and inlining of what such loops make long. Processors without vectors get neither:
// their kernels would have more code than all others together, and be no faster.
#undef SYNCBN_UNROLL
#undef SYNCBN_INLINE
#if HWY_TARGET == HWY_SCALAR
#define SYNCBN_UNROLL
#define SYNCBN_INLINE inline HWY_NOINLINE
#else
#define SYNCBN_UNROLL _Pragma("GCC unroll 16")
#define SYNCBN_INLINE HWY_INLINE
#endif

#define SYNCBN_FOR_PARTS(i) SYNCBN_FOR_PARTS_OF(D, i)
#define SYNCBN_FOR_PARTS_OF(Tag, i) SYNCBN_UNROLL for (size_t i = 0; (i) < LanesOf<Tag>::kCount; ++(i))

template <class Tag>
HWY_INLINE LanesOf<Tag> BroadcastTo(hn::TFromD<Tag> value) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = hn::Set(Tag(), value);
  return r;
}

HWY_INLINE Lanes Broadcast(double value) { return BroadcastTo<D>(value); }
HWY_INLINE Lanes Zero() { return Broadcast(0.0); }

template <class Tag>
HWY_INLINE LanesOf<Tag> operator+(const LanesOf<Tag>& a, const LanesOf<Tag>& b) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = hn::Add(a.part[i], b.part[i]);
  return r;
}

template <class Tag>
HWY_INLINE LanesOf<Tag> operator-(const LanesOf<Tag>& a, const LanesOf<Tag>& b) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = hn::Sub(a.part[i], b.part[i]);
  return r;
}

template <class Tag>
HWY_INLINE LanesOf<Tag> operator*(const LanesOf<Tag>& a, const LanesOf<Tag>& b) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = hn::Mul(a.part[i], b.part[i]);
  return r;
}

// Returns a - b by the units of multiplication: where every other operation is an addition, those would be idle. The
// product by 1 is exact.
template <class Tag>
HWY_INLINE hn::Vec<Tag> Minus(Tag /*tag*/, hn::Vec<Tag> a, hn::Vec<Tag> b) {
#if HWY_NATIVE_FMA
  return hn::MulSub(a, hn::Set(Tag(), 1), b);
#else
  return hn::Sub(a, b);
#endif
}

template <class Tag>
HWY_INLINE LanesOf<Tag> Minus(const LanesOf<Tag>& a, const LanesOf<Tag>& b) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = Minus(Tag(), a.part[i], b.part[i]);
  return r;
}

// Returns a * b + c. The product must be exact: a fused operation then has the bits of two.
HWY_INLINE Lanes MulAddExact(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::MulAdd(a.part[i], b.part[i], c.part[i]);
  return r;
}

HWY_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::Div(a.part[i], b.part[i]);
  return r;
}

// Returns v, and 0 where v is 0 or less; a NaN passes.
template <class Tag>
HWY_INLINE LanesOf<Tag> Relu(const LanesOf<Tag>& v) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) r.part[i] = hn::IfThenZeroElse(hn::Le(v.part[i], hn::Zero(Tag())), v.part[i]);
  return r;
}

// Returns v, and 0 where v is below 0; -0 and NaN pass.
HWY_INLINE Lanes NotBelowZero(const Lanes& v) {
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::IfThenZeroElse(hn::Lt(v.part[i], hn::Zero(D())), v.part[i]);
  return r;
}

// Returns v where x > threshold, else 0.
template <class Tag>
HWY_INLINE LanesOf<Tag> KeepWhereAbove(const LanesOf<Tag>& x, hn::TFromD<Tag> threshold, const LanesOf<Tag>& v) {
  LanesOf<Tag> r;
  SYNCBN_FOR_PARTS_OF(Tag, i) {
    r.part[i] = hn::IfThenElseZero(hn::Gt(x.part[i], hn::Set(Tag(), threshold)), v.part[i]);
  }
  return r;
}

// Returns v in the lanes i whose bit i is set, else 0.
HWY_INLINE Lanes KeepWhereSet(uint32_t bits, const Lanes& v) {
  alignas(64) static constexpr uint64_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  Lanes r;
  SYNCBN_FOR_PARTS(i) {
    const auto set = hn::TestBit(hn::Set(DU(), bits), hn::Load(DU(), kBit + i * kWide));
    r.part[i] = hn::IfThenElseZero(hn::RebindMask(D(), set), v.part[i]);
  }
  return r;
}

// Returns v in the first n lanes, 0 in the others.
HWY_INLINE Lanes KeepFirst(int64_t n, const Lanes& v) { return KeepWhereSet((1u << n) - 1, v); }

// Returns a mask whose bit i is set if lane i is above 0.
HWY_INLINE uint8_t BitsAboveZero(const Lanes& v) {
  uint32_t bits = 0;
  SYNCBN_FOR_PARTS(i) {
    uint8_t part[8];
    hn::StoreMaskBits(D(), hn::Gt(v.part[i], hn::Zero(D())), part);
    bits |= static_cast<uint32_t>(part[0]) << (i * kWide);
  }
  return static_cast<uint8_t>(bits);
}

HWY_INLINE Lanes LoadDoubles(const double* p) {
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::LoadU(D(), p + i * kWide);
  return r;
}

// Copies n < 16 elements. Fixed sizes, because a call of memcpy for each row's last few elements costs more than the
// row.
template <int64_t kSize>
HWY_INLINE void CopyFew(uint8_t* to, const uint8_t* from, int64_t n) {
  int64_t at = 0;
  if ((n & 8) != 0) {
    std::memcpy(to, from, 8 * kSize);
    at = 8 * kSize;
  }
  if ((n & 4) != 0) {
    std::memcpy(to + at, from + at, 4 * kSize);
    at += 4 * kSize;
  }
  if ((n & 2) != 0) {
    std::memcpy(to + at, from + at, 2 * kSize);
    at += 2 * kSize;
  }
  if ((n & 1) != 0) std::memcpy(to + at, from + at, kSize);
}

// The first n of eight; the others are 0.
HWY_INLINE Lanes LoadDoubles(const double* p, int64_t n) {
  if (n == kLanes) return LoadDoubles(p);
  double buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(double));
  return LoadDoubles(buffer);
}

HWY_INLINE void StoreDoubles(const Lanes& v, double* p) {
  SYNCBN_FOR_PARTS(i) hn::StoreU(v.part[i], D(), p + i * kWide);
}

HWY_INLINE void StoreDoubles(const Lanes& v, double* p, int64_t n) {
  if (n == kLanes) return StoreDoubles(v, p);
  double buffer[kLanes];
  StoreDoubles(v, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(double));
}

// The lanes' sum, always by the same tree.
HWY_INLINE double Sum(const Lanes& v) {
  double lane[kLanes];
  StoreDoubles(v, lane);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Vectors of narrower types with as many lanes as one part.
using DF = hn::Rebind<float, D>;
using DU32 = hn::Rebind<uint32_t, D>;
using DU16 = hn::Rebind<uint16_t, D>;

// Elements may lie at any address, so they are read and written as bytes. Scalars have no vectors of bytes.
template <class Tag>
HWY_INLINE hn::Vec<Tag> LoadBytes(const uint8_t* p) {
#if HWY_TARGET == HWY_SCALAR
  hn::TFromD<Tag> element;
  std::memcpy(&element, p, sizeof(element));
  return hn::Set(Tag(), element);
#else
  return hn::BitCast(Tag(), hn::LoadU(hn::Repartition<uint8_t, Tag>(), p));
#endif
}

template <class Tag>
HWY_INLINE void StoreBytes(hn::Vec<Tag> v, uint8_t* p) {
#if HWY_TARGET == HWY_SCALAR
  const hn::TFromD<Tag> element = hn::GetLane(v);
  std::memcpy(p, &element, sizeof(element));
#else
  const hn::Repartition<uint8_t, Tag> bytes;
  hn::StoreU(hn::BitCast(bytes, v), bytes, p);
#endif
}

// To float, to nearest even. Highway's emulation saturates where the hardware overflows to infinity.
HWY_INLINE hn::Vec<DF> ToFloat(Vector v) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  double from[kWide];
  float to[kWide];
  hn::StoreU(v, D(), from);
  for (size_t i = 0; i < kWide; ++i) to[i] = static_cast<float>(from[i]);
  return hn::LoadU(DF(), to);
#else
  return hn::DemoteTo(DF(), v);
#endif
}

// Rounds to a multiple of the last place of a type with `fraction_bits`, whose smallest normal is 2^min_exponent, once
// and to nearest even: adding 1.5 * 2^52 such places leaves no room for anything below them. A value that is too large
// for the type stays too large.
HWY_INLINE Vector RoundTo(Vector v, int fraction_bits, double min_normal) {
  const DU du;
  const Vector power = hn::BitCast(D(), hn::And(hn::BitCast(du, v), hn::Set(du, uint64_t{0x7FF} << 52)));
  const Vector bounded =
      hn::Min(hn::Max(power, hn::Set(D(), min_normal)), hn::Set(D(), 3.402823669209384634634e38 /* 2^128 */));
  const double places = 1.5 * static_cast<double>(uint64_t{1} << (52 - fraction_bits));
  const Vector big = hn::Mul(bounded, hn::Set(D(), places));
  return hn::CopySign(hn::Sub(hn::Add(v, big), big), v);
}

// Returns the float32 values of float16 bits. The bits moved into a float's place are the value times 2^-112,
// subnormals included.
template <class Tag>
HWY_INLINE hn::Vec<Tag> WidenFloat16(hn::Vec<hn::Rebind<uint16_t, Tag>> bits) {
  const hn::Repartition<uint32_t, Tag> du;
  const auto half = hn::PromoteTo(du, bits);
  const auto moved = hn::ShiftLeft<13>(hn::And(half, hn::Set(du, 0x7FFF)));
  const auto scaled = hn::BitCast(du, hn::Mul(hn::BitCast(Tag(), moved), hn::Set(Tag(), 0x1p112f)));
  const auto exponent = hn::Set(du, 0x7C00);
  const auto finite = hn::Ne(hn::And(half, exponent), exponent);
  const auto magnitude = hn::IfThenElse(finite, scaled, hn::Or(moved, hn::Set(du, 0x7F800000)));
  const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(du, 0x8000)));
  return hn::BitCast(Tag(), hn::Or(magnitude, sign));
}

// The traits of a type: one part from bytes and to bytes, and the largest double that does not round to above 0.
template <DataType type>
struct Element;

template <>
struct Element<DataType::kFloat64> {
  static constexpr int64_t kSize = 8;
  static constexpr double kRoundsToZero = 0.0;
  static HWY_INLINE Vector Load(const uint8_t* p) { return LoadBytes<D>(p); }
  static HWY_INLINE void Store(Vector v, uint8_t* p) { StoreBytes<D>(v, p); }
};

template <>
struct Element<DataType::kFloat32> {
  static constexpr int64_t kSize = 4;
  static constexpr double kRoundsToZero = 0x1p-150;
  static HWY_INLINE Vector Load(const uint8_t* p) { return hn::PromoteTo(D(), LoadBytes<DF>(p)); }
  static HWY_INLINE void Store(Vector v, uint8_t* p) { StoreBytes<DF>(ToFloat(v), p); }
};

template <>
struct Element<DataType::kBFloat16> {
  static constexpr int64_t kSize = 2;
  static constexpr double kRoundsToZero = 0x1p-134;
  static HWY_INLINE Vector Load(const uint8_t* p) {
    const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(DU32(), LoadBytes<DU16>(p)));
    return hn::PromoteTo(D(), hn::BitCast(DF(), bits));
  }
  static HWY_INLINE void Store(Vector v, uint8_t* p) {
    const auto bits = hn::BitCast(DU32(), ToFloat(RoundTo(v, 7, 0x1p-126)));
    StoreBytes<DU16>(hn::TruncateTo(DU16(), hn::ShiftRight<16>(bits)), p);
  }
};

template <>
struct Element<DataType::kFloat16> {
  static constexpr int64_t kSize = 2;
  static constexpr double kRoundsToZero = 0x1p-25;
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
  // The conversions of these targets are complete; those that Highway emulates know neither infinity nor NaN.
  using DH = hn::Rebind<hwy::float16_t, D>;
  static HWY_INLINE Vector Load(const uint8_t* p) {
    return hn::PromoteTo(D(), hn::PromoteTo(DF(), hn::BitCast(DH(), LoadBytes<DU16>(p))));
  }
  static HWY_INLINE void Store(Vector v, uint8_t* p) {
    const auto half = hn::DemoteTo(DH(), ToFloat(RoundTo(v, 10, 0x1p-14)));
    StoreBytes<DU16>(hn::BitCast(DU16(), half), p);
  }
#else
  static HWY_INLINE Vector Load(const uint8_t* p) { return hn::PromoteTo(D(), WidenFloat16<DF>(LoadBytes<DU16>(p))); }
  static HWY_INLINE void Store(Vector v, uint8_t* p) {
    const DU32 du;
    const auto rounded = ToFloat(RoundTo(v, 10, 0x1p-14));
    const auto sign = hn::And(hn::ShiftRight<16>(hn::BitCast(du, rounded)), hn::Set(du, 0x8000));
    const auto magnitude = hn::Abs(rounded);
    const auto moved = hn::ShiftRight<13>(hn::BitCast(du, hn::Mul(magnitude, hn::Set(DF(), 0x1p-112f))));
    const auto fits = hn::RebindMask(du, hn::Lt(magnitude, hn::Set(DF(), 0x1p16f)));
    const auto infinite = hn::RebindMask(du, hn::Ge(magnitude, hn::Set(DF(), 0x1p16f)));
    const auto other = hn::IfThenElse(infinite, hn::Set(du, 0x7C00), hn::Set(du, 0x7E00));
    StoreBytes<DU16>(hn::TruncateTo(DU16(), hn::Or(hn::IfThenElse(fits, moved, other), sign)), p);
  }
#endif
};

// Eight bfloat16 at once: where a vector has twice as many floats as doubles, the conversion of one part would use half
// of it.
using DF8 = hn::CappedTag<float, kLanes>;
constexpr size_t kFloats = hn::MaxLanes(DF8());  // In one vector of them: as many as doubles, or twice as many.

template <class Floats = DF8>
HWY_INLINE Lanes LoadBFloat16(const uint8_t* p) {
  using Bits = hn::Repartition<uint32_t, Floats>;
  Lanes r;
  for (size_t i = 0; i < kLanes / kFloats; ++i) {
    const auto upper = hn::PromoteTo(Bits(), LoadBytes<hn::Rebind<uint16_t, Floats>>(p + i * kFloats * 2));
    const auto v = hn::BitCast(Floats(), hn::ShiftLeft<16>(upper));
    if constexpr (kFloats == kWide) {
      r.part[i] = hn::PromoteTo(D(), v);
    }
#if HWY_TARGET != HWY_SCALAR  // Which has no halves.
    else {
      r.part[2 * i] = hn::PromoteTo(D(), hn::LowerHalf(v));
      r.part[2 * i + 1] = hn::PromoteTo(D(), hn::UpperHalf(DF(), v));
    }
#endif
  }
  return r;
}

// Rounds to float first, and from there to the nearest even bfloat16. That differs from rounding once only where the
// float lies half way between two bfloat16, so those lanes (and NaN, which the addition might carry into the sign) are
// stored the slow way.
template <class Floats = DF8>
HWY_INLINE void StoreBFloat16(const Lanes& v, uint8_t* p) {
  using Bits = hn::Repartition<uint32_t, Floats>;
  const Bits du;
  for (size_t i = 0; i < kLanes / kFloats; ++i) {
    hn::Vec<Floats> single;
    if constexpr (kFloats == kWide) {
      single = ToFloat(v.part[i]);
    }
#if HWY_TARGET != HWY_SCALAR
    else {
      single = hn::Combine(Floats(), ToFloat(v.part[2 * i + 1]), ToFloat(v.part[2 * i]));
    }
#endif
    const auto bits = hn::BitCast(du, single);
    const auto half_way = hn::Eq(hn::ShiftLeft<16>(bits), hn::Set(du, 0x80000000u));
    const auto not_a_number = hn::RebindMask(du, hn::Ne(single, single));
    if (HWY_UNLIKELY(!hn::AllFalse(du, hn::Or(half_way, not_a_number)))) {
      for (size_t j = i * (kFloats / kWide); j < (i + 1) * (kFloats / kWide); ++j) {
        Element<DataType::kBFloat16>::Store(v.part[j], p + j * kWide * 2);
      }
      continue;
    }
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Set(du, 0x8000u)));
    StoreBytes<hn::Rebind<uint16_t, Floats>>(hn::TruncateTo(hn::Rebind<uint16_t, Floats>(), rounded),
                                             p + i * kFloats * 2);
  }
}

template <DataType type>
HWY_INLINE Lanes Load(const uint8_t* p) {
  if constexpr (type == DataType::kBFloat16) return LoadBFloat16(p);
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = Element<type>::Load(p + i * kWide * Element<type>::kSize);
  return r;
}

// The first n of eight elements; the other lanes are 0 and their memory is not touched.
template <DataType type>
HWY_INLINE Lanes Load(const uint8_t* p, int64_t n) {
  alignas(64) uint8_t buffer[kLanes * Element<type>::kSize] = {};
  CopyFew<Element<type>::kSize>(buffer, p, n);
  return Load<type>(buffer);
}

// Loads a group of which n lanes count. Where all eight elements are the tensor's, they are loaded at once, and the
// other lanes have its next elements; else 0: to gather a few elements costs as much as several whole groups.
template <DataType type>
HWY_INLINE Lanes LoadPart(const uint8_t* p, int64_t n, bool readable) {
  return readable ? Load<type>(p) : Load<type>(p, n);
}

template <DataType type>
HWY_INLINE void Store(const Lanes& v, uint8_t* p) {
  if constexpr (type == DataType::kBFloat16) return StoreBFloat16(v, p);
  SYNCBN_FOR_PARTS(i) Element<type>::Store(v.part[i], p + i * kWide * Element<type>::kSize);
}

// Types whose vectors can be stored around the caches, and where. Types of 16 bits take as long to compute as to store.
template <DataType type>
constexpr bool kCanStream = type == DataType::kFloat32 && (HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3);
constexpr uintptr_t kStreamAlignment = 32;

// Stores around the caches if `streams`. Another thread may read what it stores after hwy::FlushStream.
template <DataType type, bool streams>
HWY_INLINE void StoreOrStream(const Lanes& v, uint8_t* p) {
  if constexpr (streams) {
    SYNCBN_FOR_PARTS(i) hn::Stream(ToFloat(v.part[i]), DF(), reinterpret_cast<float*>(p) + i * kWide);
  } else {
    Store<type>(v, p);
  }
}

template <DataType type>
HWY_INLINE void Store(const Lanes& v, uint8_t* p, int64_t n) {
  alignas(64) uint8_t buffer[kLanes * Element<type>::kSize];
  Store<type>(v, buffer);
  CopyFew<Element<type>::kSize>(p, buffer, n);
}

// n <= 16 bits of a bit mask from bit `index` on.
HWY_INLINE uint32_t MaskBits(const uint8_t* mask, int64_t index, int64_t n) {
  const uint8_t* p = mask + index / 8;
  const uint32_t shift = static_cast<uint32_t>(index % 8);
  uint32_t bits = p[0];
  if (shift + n > 8) bits |= static_cast<uint32_t>(p[1]) << 8;
  if (shift + n > 16) bits |= static_cast<uint32_t>(p[2]) << 16;
  return bits >> shift;
}

// Rounds to float32.
HWY_INLINE Lanes ToSingle(const Lanes& v) {
  Lanes r;
  SYNCBN_FOR_PARTS(i) r.part[i] = hn::PromoteTo(D(), ToFloat(v.part[i]));
  return r;
}

// The forward pass's coefficients of eight elements, as RoundedForward has them. `single`: they are float32, and so was
// the pass's arithmetic.
struct ForwardLanes {
  Lanes mean, scale, shift;
  bool single;
};

// Returns the forward pass's output before it was rounded to the type. An operation on float32 values gives the same
// bits in float64 with a rounding after it: 53 bits are more than twice 24 and two.
template <DataType type>
HWY_INLINE Lanes ForwardOutput(const Lanes& x, const ForwardLanes& forward) {
  if constexpr (type == DataType::kFloat32) return MulAddExact(x, forward.scale, forward.shift);
  if constexpr (SizeOf(type) == 2) {
    if (forward.single) {
      return ToSingle(ToSingle(ToSingle(x - forward.mean) * forward.scale) + forward.shift);
    }
  }
  return (x - forward.mean) * forward.scale + forward.shift;
}

// Returns dy where the gate is open, else 0. `index` is the first element's place in the tensor; n <= 8 elements count.
template <DataType type, Gate gate>
HWY_INLINE Lanes PassGate(const Lanes& dy, const Lanes& x, const ForwardLanes& forward, const uint8_t* mask,
                          int64_t index, int64_t n) {
  if constexpr (gate == Gate::kMask) {
    return KeepWhereSet(MaskBits(mask, index, n), dy);
  } else if constexpr (gate == Gate::kRecompute) {
    return KeepWhereAbove(ForwardOutput<type>(x, forward), Element<type>::kRoundsToZero, dy);
  } else {
    return dy;
  }
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
