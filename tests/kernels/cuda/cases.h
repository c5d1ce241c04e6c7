// Shapes and data that the tests on the host and on a GPU share. All of it is a function of a seed and uses no library
// whose last bit could differ, so that results can be compared between machines.

#ifndef SYNCBN_TESTS_KERNELS_CUDA_CASES_H_
#define SYNCBN_TESTS_KERNELS_CUDA_CASES_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/batch_norm.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::testing {

using kernels::DataType;
using kernels::Layout;
using kernels::TensorShape;

inline constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16};

inline std::string Describe(const TensorShape& shape) {
  static const char* const kNames[] = {"f32", "f64", "f16", "bf16"};
  return std::to_string(shape.batch) + "x" + std::to_string(shape.channels) + "x" + std::to_string(shape.spatial) +
         (shape.layout == Layout::kChannelsLast ? " last " : " first ") + kNames[static_cast<int>(shape.type)];
}

// Small shapes that meet every path: one and many channels, tiles and splits, one level of merging and two, rows that
// end within a vector, planes that begin within one, tensors smaller than a vector, and no values at all.
inline std::vector<TensorShape> SmallShapes(DataType type) {
  struct Extents {
    int64_t batch, channels, spatial;
  };
  static const Extents kExtents[] = {
      {1, 1, 1},     {2, 1, 3},     {3, 2, 1},    {1, 5, 1},      {4, 3, 4},     {7, 3, 49},    {5, 8, 9},
      {2, 17, 25},   {3, 64, 49},   {16, 4, 196}, {2, 6, 784},    {33, 27, 1},   {100, 128, 1}, {3, 1023, 2},
      {2, 300, 7},   {9, 1, 5000},  {6, 2, 8191}, {1, 3, 70000},  {200, 33, 16}, {0, 4, 16},    {3, 4, 0},
      {50, 2048, 1}, {2, 40, 2049}, {700, 1, 1},  {1, 1, 560000},
  };
  std::vector<TensorShape> shapes;
  for (const Extents& extents : kExtents) {
    for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      TensorShape shape;
      shape.batch = extents.batch;
      shape.channels = extents.channels;
      shape.spatial = extents.spatial;
      shape.type = type;
      shape.layout = layout;
      shapes.push_back(shape);
    }
  }
  return shapes;
}

// Counter-based random numbers (splitmix64).
inline uint64_t Hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Zero mean, unit variance, bell-shaped (a sum of four uniform numbers), a multiple of 2^-16.
inline double Normal(uint64_t seed, uint64_t i) {
  const uint64_t bits = Hash(seed * 0x100000001b3u + i);
  const int64_t sum =
      static_cast<int64_t>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
  return static_cast<double>(sum - 2 * 0xffff) * (1.7320508075688772 / 65536.0);
}

// A tensor's memory: elements of one type, `misalignment` elements past a 16-byte boundary.
class Tensor {
 public:
  Tensor(DataType type, int64_t size, int misalignment = 0)
      : type_(type),
        size_(size),
        skip_(misalignment * kernels::SizeOf(type)),
        memory_(skip_ + size * kernels::SizeOf(type)) {}

  void* data() { return bytes(); }
  const void* data() const { return const_cast<Tensor*>(this)->bytes(); }
  int64_t size() const { return size_; }
  DataType type() const { return type_; }
  size_t byte_size() const { return size_ * kernels::SizeOf(type_); }

  double Get(int64_t i) const {
    const void* p = data();
    switch (type_) {
      case DataType::kFloat32:
        return static_cast<const float*>(p)[i];
      case DataType::kFloat64:
        return static_cast<const double*>(p)[i];
      case DataType::kFloat16:
        return kernels::cuda::Widen(static_cast<const kernels::cuda::Float16*>(p)[i]);
      case DataType::kBFloat16:
        return kernels::cuda::Widen(static_cast<const kernels::cuda::BFloat16*>(p)[i]);
    }
    return 0;
  }
  void Set(int64_t i, double value) {
    void* p = data();
    using namespace kernels::cuda;  // NOLINT: the element types.
    switch (type_) {
      case DataType::kFloat32:
        static_cast<float*>(p)[i] = static_cast<float>(value);
        break;
      case DataType::kFloat64:
        static_cast<double*>(p)[i] = value;
        break;
      case DataType::kFloat16:
        static_cast<Float16*>(p)[i] = Narrow<Float16>::From(static_cast<float>(value));
        break;
      case DataType::kBFloat16:
        static_cast<BFloat16*>(p)[i] = Narrow<BFloat16>::From(static_cast<float>(value));
        break;
    }
  }
  std::vector<double> Values() const {
    std::vector<double> values(size_);
    for (int64_t i = 0; i < size_; ++i) values[i] = Get(i);
    return values;
  }
  bool operator==(const Tensor& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), byte_size()) == 0;
  }

 private:
  char* bytes() { return reinterpret_cast<char*>(memory_.data()) + skip_; }

  DataType type_;
  int64_t size_;
  size_t skip_;
  // Operator new gives 16-byte boundaries, and not a byte more than asked for: a sanitizer sees every access outside.
  std::vector<unsigned char> memory_;
};

inline Tensor RandomTensor(const TensorShape& shape, uint64_t seed, double mean, double deviation,
                           int misalignment = 0) {
  Tensor tensor(shape.type, shape.size(), misalignment);
  for (int64_t i = 0; i < shape.size(); ++i) tensor.Set(i, mean + deviation * Normal(seed, i));
  return tensor;
}

// Per-channel numbers: multiples of 2^-16 of about unit size, away from 0.
inline std::vector<double> RandomVector(int64_t channels, uint64_t seed, double mean, double deviation) {
  std::vector<double> values(channels);
  for (int64_t c = 0; c < channels; ++c) values[c] = mean + deviation * Normal(seed, c);
  return values;
}

// FNV-1a.
inline uint64_t Checksum(const void* data, size_t bytes, uint64_t sum = 0xcbf29ce484222325u) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) sum = (sum ^ p[i]) * 0x100000001b3u;
  return sum;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_KERNELS_CUDA_CASES_H_
