// Vectors of parameters: one value of a floating-point type for each channel, in memory that belongs to someone else.
// For host and device.

#ifndef SYNCBN_KERNELS_VECTOR_VIEW_H_
#define SYNCBN_KERNELS_VECTOR_VIEW_H_

#include <cstdint>
#include <cstring>

#include "kernels/batch_norm.h"
#include "kernels/half.h"
#include "kernels/host_device.h"

namespace syncbn::kernels {

// A vector to read. `data` null: absent.
struct ConstVectorView {
  const void* data = nullptr;
  DataType type = DataType::kFloat32;

  SYNCBN_HOST_DEVICE bool present() const { return data != nullptr; }

  // The element's bits, so that several can be read before the first is converted, which waits for it. Requires
  // present(), and memory that the caller can reach.
  SYNCBN_HOST_DEVICE uint64_t Bits(int64_t channel) const {
    switch (type) {
      case DataType::kFloat32:
        return BitsOf<uint32_t>(static_cast<const float*>(data)[channel]);
      case DataType::kFloat64:
        return BitsOf<uint64_t>(static_cast<const double*>(data)[channel]);
      case DataType::kFloat16:
      case DataType::kBFloat16:
        return static_cast<const uint16_t*>(data)[channel];
    }
    return 0;
  }
  // An element of those bits as float64, exactly.
  SYNCBN_HOST_DEVICE double Value(uint64_t bits) const {
    switch (type) {
      case DataType::kFloat32:
        return ValueOf<float>(static_cast<uint32_t>(bits));
      case DataType::kFloat64:
        return ValueOf<double>(bits);
      case DataType::kFloat16:
        return Float16ToDouble(static_cast<uint16_t>(bits));
      case DataType::kBFloat16:
        return BFloat16ToDouble(static_cast<uint16_t>(bits));
    }
    return 0.0;
  }
  SYNCBN_HOST_DEVICE uint64_t BitsOrNone(int64_t channel) const { return present() ? Bits(channel) : 0; }
  SYNCBN_HOST_DEVICE double ValueOr(double absent, uint64_t bits) const { return present() ? Value(bits) : absent; }

  // The element as float64, exactly. Requires what Bits requires.
  SYNCBN_HOST_DEVICE double Get(int64_t channel) const { return Value(Bits(channel)); }
  SYNCBN_HOST_DEVICE double GetOr(double absent, int64_t channel) const { return present() ? Get(channel) : absent; }

 private:
  template <typename Bits, typename Value>
  SYNCBN_HOST_DEVICE static Bits BitsOf(Value value) {
    static_assert(sizeof(Bits) == sizeof(Value), "bits of the value's size");
    Bits bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  template <typename Value, typename Bits>
  SYNCBN_HOST_DEVICE static double ValueOf(Bits bits) {
    return static_cast<double>(BitsOf<Value>(bits));
  }
};

// A vector to read or write.
struct VectorView {
  void* data = nullptr;
  DataType type = DataType::kFloat32;

  SYNCBN_HOST_DEVICE bool present() const { return data != nullptr; }
  // Implicit, as a span of mutable elements becomes one of constant elements.
  // NOLINTNEXTLINE(google-explicit-constructor)
  SYNCBN_HOST_DEVICE operator ConstVectorView() const { return {data, type}; }

  SYNCBN_HOST_DEVICE double Get(int64_t channel) const { return ConstVectorView(*this).Get(channel); }

  // Rounds to the vector's type, once.
  SYNCBN_HOST_DEVICE void Set(int64_t channel, double value) const {
    switch (type) {
      case DataType::kFloat32:
        static_cast<float*>(data)[channel] = static_cast<float>(value);
        return;
      case DataType::kFloat64:
        static_cast<double*>(data)[channel] = value;
        return;
      case DataType::kFloat16:
        static_cast<uint16_t*>(data)[channel] = Float16FromDouble(value);
        return;
      case DataType::kBFloat16:
        static_cast<uint16_t*>(data)[channel] = BFloat16FromDouble(value);
        return;
    }
  }
};

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_VECTOR_VIEW_H_
