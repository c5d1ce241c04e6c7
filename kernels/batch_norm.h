// The local half of a synchronized batch normalization: four operations over dense tensors. This header has their
// types; cpu/batch_norm.h and cuda/batch_norm.h declare the operations for a CPU and for a GPU.
//
//   forward:   BatchNormStats       x                -> mean, m2              per channel; then a round merges them
//              BatchNormElemt       x, coefficients  -> y                     (x - mean) * scale + shift [+ residual]
//              [ReLU]
//   backward:  BatchNormBackwardReduce  dy, x, mean  -> sum_dy, sum_dy_xmu    per channel; then a round sums them
//              BatchNormBackwardElemt   dy, x, coefficients -> dx [, d_residual]
//
// The vectors in between are float64 and per channel; finalize.h makes the coefficients from merged statistics. Results
// do not depend on the number of threads, nor on the model of the GPU. No operation allocates tensor-sized memory, and
// none checks more than Validate() does: the caller vouches for its pointers.

#ifndef SYNCBN_KERNELS_BATCH_NORM_H_
#define SYNCBN_KERNELS_BATCH_NORM_H_

#include <cstddef>
#include <cstdint>

namespace syncbn::kernels {

enum class DataType : uint8_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

constexpr size_t SizeOf(DataType type) { return type == DataType::kFloat64 ? 8 : type == DataType::kFloat32 ? 4 : 2; }

// The place of the channels in a dense tensor.
enum class Layout : uint8_t {
  kChannelsFirst = 0,  // [batch, channels, spatial]: NCHW and its kin. A 2-D tensor has spatial == 1.
  kChannelsLast = 1,   // [batch, spatial, channels]: NHWC and its kin.
};

// A dense tensor of rank 2 to 5, seen as three extents: height, width and depth make one `spatial`. Any extent may be 0
// except `channels`. The product may exceed 2^31.
struct TensorShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t spatial = 1;
  DataType type = DataType::kFloat32;
  Layout layout = Layout::kChannelsFirst;

  int64_t values_per_channel() const { return batch * spatial; }
  int64_t size() const { return batch * channels * spatial; }
};

// Returns the fault of a shape (channels < 1, a negative extent, a size past 2^62 elements) as a static string, or null
// if it has none.
const char* Validate(const TensorShape& shape);

// Per-channel coefficients of the forward pass: y = (x - mean) * scale + shift. Each points to `channels` doubles in
// the memory of the backend. scale = weight * invstd, shift = bias.
struct ForwardCoefficients {
  const double* mean = nullptr;
  const double* scale = nullptr;
  const double* shift = nullptr;
};

// Per-channel coefficients of the backward pass: dx = scale * (dy - mean_dy - (x - mean) * projection), where
// mean_dy = sum_dy/N and projection = invstd^2 * sum_dy_xmu/N. In evaluation mean_dy and projection are all 0.
struct BackwardCoefficients {
  const double* mean = nullptr;
  const double* scale = nullptr;
  const double* mean_dy = nullptr;
  const double* projection = nullptr;
};

// The operations that follow the normalization in the same pass over memory.
struct Epilogue {
  // Added before the activation; of x's shape, type and layout. Null: nothing is added.
  const void* residual = nullptr;
  bool relu = false;
  // With relu and a residual, backward cannot tell from x which outputs were positive: forward then writes one bit for
  // each element here (element i in memory order: bit i%8 of byte i/8; ReluMaskBytes in all) and backward reads it.
  // Null without a residual, or where no backward pass follows.
  uint8_t* relu_mask = nullptr;
};

constexpr size_t ReluMaskBytes(int64_t size) { return (static_cast<size_t>(size) + 7) / 8; }

// Tells the backward pass where ReLU let the gradient through: by the mask if there is one; else, with `forward` set,
// by computing the forward pass's output again, with the same arithmetic. Neither: there was no ReLU.
struct ReluGate {
  const uint8_t* mask = nullptr;
  ForwardCoefficients forward;
};

}  // namespace syncbn::kernels

#endif  // SYNCBN_KERNELS_BATCH_NORM_H_
