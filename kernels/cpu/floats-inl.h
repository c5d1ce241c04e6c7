// Sixteen float32 lanes on the vectors of any target, and their loads and stores for the two 16-bit types. Compiled
// once for each instruction set. One IEEE operation at a time, as in lanes-inl.h, so a result has the same bits on
// every target. (The bits of a NaN may differ.)

#if defined(SYNCBN_KERNELS_CPU_FLOATS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SYNCBN_KERNELS_CPU_FLOATS_INL_H_
#undef SYNCBN_KERNELS_CPU_FLOATS_INL_H_
#else
#define SYNCBN_KERNELS_CPU_FLOATS_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {

using Floats = hn::CappedTag<float, 16>;
using FloatBits = hn::Repartition<uint32_t, Floats>;
using Halves = hn::Rebind<uint16_t, Floats>;

constexpr int64_t kFloatLanes = 16;
constexpr size_t kFloatsWide = hn::MaxLanes(Floats());  // Lanes in one vector.

using FloatLanes = LanesOf<Floats>;

#define SYNCBN_FOR_FLOATS(i) SYNCBN_FOR_PARTS_OF(Floats, i)

HWY_INLINE FloatLanes BroadcastFloat(float value) { return BroadcastTo<Floats>(value); }

// Returns v in the lanes i whose bit i is set, else 0.
HWY_INLINE FloatLanes KeepWhereSet(uint32_t bits, const FloatLanes& v) {
  alignas(64) static constexpr uint32_t kBit[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                                    256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  FloatLanes r;
  SYNCBN_FOR_FLOATS(i) {
    const auto set = hn::TestBit(hn::Set(FloatBits(), bits), hn::Load(FloatBits(), kBit + i * kFloatsWide));
    r.part[i] = hn::IfThenElseZero(hn::RebindMask(Floats(), set), v.part[i]);
  }
  return r;
}

// Returns a in the first n lanes, b in the others.
HWY_INLINE FloatLanes FirstOf(int64_t n, const FloatLanes& a, const FloatLanes& b) {
  alignas(64) static constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  FloatLanes r;
  SYNCBN_FOR_FLOATS(i) {
    const auto first = hn::Lt(hn::Load(Floats(), kIndex + i * kFloatsWide), hn::Set(Floats(), static_cast<float>(n)));
    r.part[i] = hn::IfThenElse(first, a.part[i], b.part[i]);
  }
  return r;
}

// Returns the smaller of |v| and `least` in each lane; which one beside a NaN is not said.
HWY_INLINE FloatLanes LeastSize(const FloatLanes& v, const FloatLanes& least) {
  FloatLanes r;
  SYNCBN_FOR_FLOATS(i) r.part[i] = hn::Min(hn::Abs(v.part[i]), least.part[i]);
  return r;
}

// Returns a mask whose bit i is set if lane i is above the threshold.
HWY_INLINE uint32_t BitsAbove(const FloatLanes& v, float threshold) {
  uint32_t bits = 0;
  SYNCBN_FOR_FLOATS(i) {
    uint8_t part[8] = {};
    hn::StoreMaskBits(Floats(), hn::Gt(v.part[i], hn::Set(Floats(), threshold)), part);
    bits |= (static_cast<uint32_t>(part[1]) << 8 | part[0]) << (i * kFloatsWide);
  }
  return bits;
}

HWY_INLINE FloatLanes LoadFloats(const float* p) {
  FloatLanes r;
  SYNCBN_FOR_FLOATS(i) r.part[i] = hn::LoadU(Floats(), p + i * kFloatsWide);
  return r;
}

HWY_INLINE void StoreFloats(const FloatLanes& v, float* p) {
  SYNCBN_FOR_FLOATS(i) hn::StoreU(v.part[i], Floats(), p + i * kFloatsWide);
}

// The traits of a 16-bit type: one part to float32, and to the type by one rounding to nearest even.
template <DataType type>
struct Half;

template <>
struct Half<DataType::kBFloat16> {
  static constexpr float kRoundsToZero = 0x1p-134f;

  static HWY_INLINE hn::Vec<Floats> Widen(hn::Vec<Halves> v) {
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(FloatBits(), v)));
  }
  // Returns the rounded number in the upper half of the bits; the lower half has no meaning.
  // A NaN's lower half must be 0, lest the addition carry into its sign: that holds for those that come from bfloat16,
  // from rounded coefficients, and from the processor.
  static HWY_INLINE hn::Vec<FloatBits> Round(hn::Vec<Floats> v) {
    const FloatBits du;
    const auto bits = hn::BitCast(du, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    return hn::Add(hn::Add(bits, hn::Set(du, 0x7FFF)), odd);
  }
  static HWY_INLINE hn::Vec<Halves> Narrow(hn::Vec<Floats> v) {
    return hn::TruncateTo(Halves(), hn::ShiftRight<16>(Round(v)));
  }
};

template <>
struct Half<DataType::kFloat16> {
  static constexpr float kRoundsToZero = 0x1p-25f;

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
  using Native = hn::Rebind<hwy::float16_t, Floats>;
  static HWY_INLINE hn::Vec<Floats> Widen(hn::Vec<Halves> v) {
    return hn::PromoteTo(Floats(), hn::BitCast(Native(), v));
  }
  static HWY_INLINE hn::Vec<Halves> Narrow(hn::Vec<Floats> v) {
    return hn::BitCast(Halves(), hn::DemoteTo(Native(), v));
  }
#else
  static HWY_INLINE hn::Vec<Floats> Widen(hn::Vec<Halves> v) { return WidenFloat16<Floats>(v); }
  // A subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the sum.
  static HWY_INLINE hn::Vec<Halves> Narrow(hn::Vec<Floats> v) {
    const FloatBits du;
    const Floats df;
    const auto sign = hn::And(hn::ShiftRight<16>(hn::BitCast(du, v)), hn::Set(du, 0x8000));
    const auto magnitude = hn::Min(hn::Abs(v), hn::Set(df, 0x1p16f));
    const auto bits = hn::BitCast(du, magnitude);
    const auto odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(du, 1));
    const auto rounded = hn::Sub(hn::Add(hn::Add(bits, hn::Set(du, 0xFFF)), odd), hn::Set(du, 0x38000000));
    const auto normal = hn::ShiftRight<13>(rounded);
    const auto subnormal = hn::Sub(hn::BitCast(du, hn::Add(magnitude, hn::Set(df, 0.5f))), hn::Set(du, 0x3F000000));
    const auto is_subnormal = hn::RebindMask(du, hn::Lt(magnitude, hn::Set(df, 0x1p-14f)));
    const auto number = hn::IfThenElse(is_subnormal, subnormal, normal);
    const auto is_nan = hn::RebindMask(du, hn::Ne(v, v));
    return hn::TruncateTo(Halves(), hn::Or(hn::IfThenElse(is_nan, hn::Set(du, 0x7E00), number), sign));
  }
#endif
};

template <DataType type>
HWY_INLINE FloatLanes LoadAsFloats(const uint8_t* p) {
  FloatLanes r;
  SYNCBN_FOR_FLOATS(i) {
    if constexpr (type == DataType::kFloat32) {
      r.part[i] = LoadBytes<Floats>(p + i * kFloatsWide * 4);
    } else {
      r.part[i] = Half<type>::Widen(LoadBytes<Halves>(p + i * kFloatsWide * 2));
    }
  }
  return r;
}

// The first n of sixteen elements; the other lanes are 0 and their memory is not touched.
template <DataType type>
HWY_INLINE FloatLanes LoadAsFloats(const uint8_t* p, int64_t n) {
  alignas(64) uint8_t buffer[kFloatLanes * SizeOf(type)] = {};
  CopyFew<SizeOf(type)>(buffer, p, n);
  return LoadAsFloats<type>(buffer);
}

// Rounds to the type.
template <DataType type>
HWY_INLINE FloatLanes RoundFloats(const FloatLanes& v) {
  if constexpr (type == DataType::kFloat32) {
    return v;
  } else {
    FloatLanes r;
    SYNCBN_FOR_FLOATS(i) r.part[i] = Half<type>::Widen(Half<type>::Narrow(v.part[i]));
    return r;
  }
}

template <DataType type>
HWY_INLINE void StoreHalves(const FloatLanes& v, uint8_t* p) {
  SYNCBN_FOR_FLOATS(i) StoreBytes<Halves>(Half<type>::Narrow(v.part[i]), p + i * kFloatsWide * 2);
}

template <DataType type>
HWY_INLINE void StoreHalves(const FloatLanes& v, uint8_t* p, int64_t n) {
  alignas(64) uint8_t buffer[kFloatLanes * 2];
  StoreHalves<type>(v, buffer);
  CopyFew<2>(p, buffer, n);
}

// The lanes of 32 adjacent bfloat16: the even elements, and the odd ones. A pair of elements is a 32-bit word, so this
// takes half the instructions of two groups of adjacent elements, which are spread out and packed.
struct FloatLanePair {
  FloatLanes even, odd;
};

HWY_INLINE FloatLanePair LoadPairs(const uint8_t* p) {
  const FloatBits du;
  FloatLanePair r;
  SYNCBN_FOR_FLOATS(i) {
    const auto words = LoadBytes<FloatBits>(p + i * kFloatsWide * 4);
    r.even.part[i] = hn::BitCast(Floats(), hn::ShiftLeft<16>(words));
    r.odd.part[i] = hn::BitCast(Floats(), hn::And(words, hn::Set(du, 0xFFFF0000)));
  }
  return r;
}

HWY_INLINE void StorePairs(const FloatLanePair& v, uint8_t* p) {
  const FloatBits du;
  SYNCBN_FOR_FLOATS(i) {
    const auto even = hn::ShiftRight<16>(Half<DataType::kBFloat16>::Round(v.even.part[i]));
    const auto odd = Half<DataType::kBFloat16>::Round(v.odd.part[i]);
    StoreBytes<FloatBits>(hn::OrAnd(even, odd, hn::Set(du, 0xFFFF0000)), p + i * kFloatsWide * 4);
  }
}

// Returns the forward pass's output before a residual and a ReLU. The coefficients are those of RoundedForward.
HWY_INLINE FloatLanes Affine(const FloatLanes& x, const FloatLanes& mean, const FloatLanes& scale,
                             const FloatLanes& shift) {
  return (x - mean) * scale + shift;
}

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
