// The scalar types of tensors, and vectors of them, for host and device.
//
// The host's versions exist so that tests can run the kernels' arithmetic without a GPU; they give the same bits.

#ifndef SYNCBN_KERNELS_CUDA_SCALAR_TYPES_CUH_
#define SYNCBN_KERNELS_CUDA_SCALAR_TYPES_CUH_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/tuning.h"
#include "kernels/host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace syncbn::kernels::cuda {

// Storage of 16-bit floats, as bits.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
SYNCBN_HOST_DEVICE inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SYNCBN_HOST_DEVICE inline float Widen(float value) { return value; }
SYNCBN_HOST_DEVICE inline double Widen(double value) { return value; }
SYNCBN_HOST_DEVICE inline float Widen(BFloat16 value) {
  return BitCast<float>(static_cast<uint32_t>(value.bits) << 16);
}
SYNCBN_HOST_DEVICE inline float Widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return BitCast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return BitCast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact.
  return sign ? -subnormal : subnormal;
#endif
}

// Narrow<T>: round to nearest, ties to even.
template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  SYNCBN_HOST_DEVICE static float From(float value) { return value; }
};
template <>
struct Narrow<double> {
  SYNCBN_HOST_DEVICE static double From(double value) { return value; }
};
template <>
struct Narrow<BFloat16> {
  SYNCBN_HOST_DEVICE static BFloat16 From(float value) {
#if defined(__CUDA_ARCH__)
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = BitCast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fff};
    return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};
template <>
struct Narrow<Float16> {
  SYNCBN_HOST_DEVICE static Float16 From(float value) {
#if defined(__CUDA_ARCH__)
    return Float16{__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = BitCast<uint32_t>(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return Float16{0x7fff};
    if (magnitude >= 0x47800000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the sum.
      const float shifted = BitCast<float>(magnitude) + 0.5f;
      return Float16{static_cast<uint16_t>(sign | (BitCast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return Float16{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
  }
};

// The type that elements of type T are computed in.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

SYNCBN_HOST_DEVICE inline float FusedMultiplyAdd(float a, float b, float c) { return fmaf(a, b, c); }
SYNCBN_HOST_DEVICE inline double FusedMultiplyAdd(double a, double b, double c) { return fma(a, b, c); }

// kWidth consecutive elements, kept as whole 16-byte words until they are needed: a register holds two 16-bit elements.
template <typename T, int kWidth>
struct alignas(16) Vector {
  static constexpr int kWords = kWidth * static_cast<int>(sizeof(T)) / 4;
  static_assert(kWords % 4 == 0, "a vector is a multiple of 16 bytes");
  uint32_t words[kWords];

  SYNCBN_HOST_DEVICE Accumulator<T> Get(int i) const {
    if constexpr (sizeof(T) == 8) {
      return BitCast<double>(static_cast<uint64_t>(words[2 * i + 1]) << 32 | words[2 * i]);
    } else if constexpr (sizeof(T) == 4) {
      return BitCast<float>(words[i]);
    } else {
      return Widen(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }

  // Sets element i. A 16-bit element is set once, on a vector that began as zeros.
  SYNCBN_HOST_DEVICE void Set(int i, T value) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = BitCast<uint64_t>(value);
      words[2 * i] = static_cast<uint32_t>(bits);
      words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      words[i] = BitCast<uint32_t>(value);
    } else {
      words[i / 2] |= static_cast<uint32_t>(value.bits) << (i % 2 * 16);
    }
  }

  SYNCBN_HOST_DEVICE void Clear() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = 0;
  }
};

// Loads a vector from a 16-byte boundary.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void LoadWhole(const T* data, Vector<T, kWidth>* vector) {
#if defined(__CUDA_ARCH__)
  const uint4* source = reinterpret_cast<const uint4*>(data);
#pragma unroll
  for (int w = 0; w < vector->kWords / 4; ++w) {
    const uint4 words = SYNCBN_TUNE_LOADS_LEAVE_FIRST ? __ldcs(source + w) : source[w];
    vector->words[4 * w] = words.x;
    vector->words[4 * w + 1] = words.y;
    vector->words[4 * w + 2] = words.z;
    vector->words[4 * w + 3] = words.w;
  }
#else
  memcpy(vector->words, data, sizeof(vector->words));
#endif
}

// Loads elements first .. first + kWidth - 1 of data, of which those not below `limit` read as 0. `aligned`: data +
// first lies on a 16-byte boundary.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void Load(const T* data, int64_t first, int64_t limit, bool aligned,
                                    Vector<T, kWidth>* vector) {
  if (aligned && first + kWidth <= limit) {
    LoadWhole(data + first, vector);
    return;
  }
  vector->Clear();
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (first + i < limit) vector->Set(i, data[first + i]);
  }
}

// Stores the elements below `limit`.
template <typename T, int kWidth>
SYNCBN_HOST_DEVICE inline void Store(const Vector<T, kWidth>& vector, int64_t first, int64_t limit, bool aligned,
                                     T* data) {
  if (aligned && first + kWidth <= limit) {
#if defined(__CUDA_ARCH__)
    uint4* target = reinterpret_cast<uint4*>(data + first);
#pragma unroll
    for (int w = 0; w < vector.kWords / 4; ++w) {
      const uint4 words =
          make_uint4(vector.words[4 * w], vector.words[4 * w + 1], vector.words[4 * w + 2], vector.words[4 * w + 3]);
      if (SYNCBN_TUNE_STORES_LEAVE_FIRST) {
        __stcs(target + w, words);
      } else {
        target[w] = words;
      }
    }
#else
    memcpy(data + first, vector.words, sizeof(vector.words));
#endif
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (first + i >= limit) continue;
    if constexpr (sizeof(T) == 2) {
      data[first + i] = T{static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))};
    } else {
      data[first + i] = vector.Get(i);
    }
  }
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_SCALAR_TYPES_CUH_
