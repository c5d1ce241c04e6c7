// Vectors of parameters: one value of a floating-point type for each channel, in memory that belongs to someone else.
// For host and device.

#ifndef SYNCBN_KERNELS_VECTOR_VIEW_H_
#define SYNCBN_KERNELS_VECTOR_VIEW_H_

#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/half.h"
#include "kernels/host_device.h"

namespace syncbn::kernels {

// A vector to read. `data` null: absent.
struct ConstVectorView {
  const void* data = nullptr;
  DataType type = DataType::kFloat32;

  SYNCBN_HOST_DEVICE bool present() const { return data != nullptr; }

  // The element as float64, exactly. Requires present(), and memory that the caller can reach.
  SYNCBN_HOST_DEVICE double Get(int64_t channel) const {
    switch (type) {
      case DataType::kFloat32:
        return static_cast<const float*>(data)[channel];
      case DataType::kFloat64:
        return static_cast<const double*>(data)[channel];
      case DataType::kFloat16:
        return Float16ToDouble(static_cast<const uint16_t*>(data)[channel]);
      case DataType::kBFloat16:
        return BFloat16ToDouble(static_cast<const uint16_t*>(data)[channel]);
    }
    return 0.0;
  }
  SYNCBN_HOST_DEVICE double GetOr(double absent, int64_t channel) const { return present() ? Get(channel) : absent; }
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
