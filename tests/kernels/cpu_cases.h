// Tensors and random problems for the tests of the CPU's operations.

#ifndef SYNCBN_TESTS_KERNELS_CPU_CASES_H_
#define SYNCBN_TESTS_KERNELS_CPU_CASES_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

// Before Highway, whose targets it limits.
// clang-format off
#include "kernels/cpu/targets.h"
// clang-format on

#include "hwy/highway.h"
#include "kernels/batch_norm.h"
#include "kernels/half.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::kernels::testing {

using Bytes = std::vector<uint8_t>;
using Doubles = std::vector<double>;

constexpr uint64_t kSeed = 4242;
constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16};

inline void Put(DataType type, double value, uint8_t* to) {
  const float single = static_cast<float>(value);
  const uint16_t half = type == DataType::kFloat16 ? Float16FromDouble(value) : BFloat16FromDouble(value);
  if (type == DataType::kFloat64) {
    std::memcpy(to, &value, 8);
  } else if (type == DataType::kFloat32) {
    std::memcpy(to, &single, 4);
  } else {
    std::memcpy(to, &half, 2);
  }
}

inline double Get(DataType type, const uint8_t* from) {
  if (type == DataType::kFloat64) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (type == DataType::kFloat32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  return type == DataType::kFloat16 ? Float16ToDouble(half) : BFloat16ToDouble(half);
}

// A tensor's bytes, `offset` past an address that malloc aligned.
class Tensor {
 public:
  Tensor(DataType type, size_t size, size_t offset = 0)
      : type_(type), offset_(offset), bytes_(size * Width() + offset) {}
  Tensor(DataType type, const Doubles& values, size_t offset = 0) : Tensor(type, values.size(), offset) {
    for (size_t i = 0; i < values.size(); ++i) Put(type, values[i], data() + i * Width());
  }

  uint8_t* data() { return bytes_.data() + offset_; }
  const uint8_t* data() const { return bytes_.data() + offset_; }
  size_t size() const { return (bytes_.size() - offset_) / Width(); }
  Bytes content() const { return Bytes(bytes_.begin() + static_cast<std::ptrdiff_t>(offset_), bytes_.end()); }

  Doubles values() const {
    Doubles values(size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = Get(type_, data() + i * Width());
    return values;
  }

 private:
  size_t Width() const { return SizeOf(type_); }

  DataType type_;
  size_t offset_;
  Bytes bytes_;
};

// One random problem: a shape and everything that the operations read.
struct Case {
  TensorShape shape;
  Doubles x, dy, residual;  // Exactly representable in the type.
  Doubles mean, scale, shift, mean_dy, projection;

  syncbn::testing::OracleShape oracle() const {
    return {static_cast<size_t>(shape.batch), static_cast<size_t>(shape.channels), static_cast<size_t>(shape.spatial),
            shape.layout == Layout::kChannelsLast};
  }
  ForwardCoefficients forward() const { return {mean.data(), scale.data(), shift.data()}; }
  BackwardCoefficients backward() const { return {mean.data(), scale.data(), mean_dy.data(), projection.data()}; }
  size_t channels() const { return static_cast<size_t>(shape.channels); }
  size_t size() const { return static_cast<size_t>(shape.size()); }
};

inline std::string Describe(const TensorShape& s) {
  const char* const types[] = {"float32", "float64", "float16", "bfloat16"};
  return std::to_string(s.batch) + "x" + std::to_string(s.channels) + "x" + std::to_string(s.spatial) + " " +
         types[static_cast<int>(s.type)] + (s.layout == Layout::kChannelsLast ? " channels last" : " channels first") +
         ", seed " + std::to_string(kSeed);
}

inline Doubles Draw(std::mt19937_64* rng, size_t size, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  Doubles values(size);
  for (double& v : values) v = normal(*rng);
  return values;
}

inline Doubles DrawTensor(std::mt19937_64* rng, const TensorShape& shape, double mean) {
  return Tensor(shape.type, Draw(rng, static_cast<size_t>(shape.size()), mean, 1.0)).values();
}

inline Case MakeCase(const TensorShape& shape, double mean, std::mt19937_64* rng) {
  Case c;
  c.shape = shape;
  c.x = DrawTensor(rng, shape, mean);
  c.dy = DrawTensor(rng, shape, 0.1);
  c.residual = DrawTensor(rng, shape, 0);
  c.mean = Draw(rng, c.channels(), mean, 0.1);
  c.scale = Draw(rng, c.channels(), 0, 2);
  c.shift = Draw(rng, c.channels(), 0, 1);
  c.mean_dy = Draw(rng, c.channels(), 0, 0.1);
  c.projection = Draw(rng, c.channels(), 0, 0.1);
  return c;
}

// Runs everything on one instruction set only, while it lives.
class OnTarget {
 public:
  explicit OnTarget(int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  ~OnTarget() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

}  // namespace syncbn::kernels::testing

#endif  // SYNCBN_TESTS_KERNELS_CPU_CASES_H_
