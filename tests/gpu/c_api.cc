// The kernels behind C functions, for tests/gpu/bench.py to call through ctypes. Pointers are to device memory,
// `stream` is a cudaStream_t; the results are error codes.

#include <cstddef>
#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/batch_norm.h"

namespace {

using syncbn::kernels::DataType;
using syncbn::kernels::FinalizeBackwardArguments;
using syncbn::kernels::FinalizeForwardArguments;
using syncbn::kernels::Layout;
using syncbn::kernels::TensorShape;
namespace cuda = syncbn::kernels::cuda;

cuda::Context MakeContext(void* stream, void* workspace, size_t workspace_bytes) {
  cuda::Context context;
  context.stream = static_cast<CUstream_st*>(stream);
  context.workspace = workspace;
  context.workspace_bytes = workspace_bytes;
  return context;
}

}  // namespace

extern "C" {

// As bench.py declares it.
struct BenchShape {
  int64_t batch, channels, spatial;
  int32_t type, layout;
};

static TensorShape Convert(const BenchShape* shape) {
  TensorShape converted;
  converted.batch = shape->batch;
  converted.channels = shape->channels;
  converted.spatial = shape->spatial;
  converted.type = static_cast<DataType>(shape->type);
  converted.layout = static_cast<Layout>(shape->layout);
  return converted;
}

size_t bench_workspace_bytes(const BenchShape* shape) { return cuda::WorkspaceBytes(Convert(shape)); }

const char* bench_error_string(int error) { return cuda::ErrorString(error); }

int bench_stats(const BenchShape* shape, void* stream, void* workspace, size_t workspace_bytes, const void* x,
                double* mean, double* m2, uint32_t* flag) {
  cuda::Context context = MakeContext(stream, workspace, workspace_bytes);
  context.signal.flag = flag;
  context.signal.value = 1;
  return cuda::BatchNormStats(context, Convert(shape), x, mean, m2);
}

int bench_elemt(const BenchShape* shape, void* stream, const void* x, const double* mean, const double* scale,
                const double* shift, const void* residual, int relu, uint8_t* mask, void* y) {
  syncbn::kernels::Epilogue epilogue;
  epilogue.residual = residual;
  epilogue.relu = relu != 0;
  epilogue.relu_mask = mask;
  return cuda::BatchNormElemt(MakeContext(stream, nullptr, 0), Convert(shape), x, {mean, scale, shift}, epilogue, y);
}

int bench_backward_reduce(const BenchShape* shape, void* stream, void* workspace, size_t workspace_bytes,
                          const void* dy, const void* x, const double* mean, const uint8_t* mask, double* sum_dy,
                          double* sum_dy_xmu) {
  syncbn::kernels::ReluGate gate;
  gate.mask = mask;
  return cuda::BatchNormBackwardReduce(MakeContext(stream, workspace, workspace_bytes), Convert(shape), dy, x, mean,
                                       gate, sum_dy, sum_dy_xmu);
}

int bench_backward_elemt(const BenchShape* shape, void* stream, const void* dy, const void* x, const double* mean,
                         const double* scale, const double* mean_dy, const double* projection, const uint8_t* mask,
                         void* dx, void* d_residual) {
  syncbn::kernels::ReluGate gate;
  gate.mask = mask;
  return cuda::BatchNormBackwardElemt(MakeContext(stream, nullptr, 0), Convert(shape), dy, x,
                                      {mean, scale, mean_dy, projection}, gate, dx, d_residual);
}

// float32 weight and bias; running statistics are not kept.
int bench_finalize_forward(const BenchShape* shape, void* stream, size_t count, const double* mean, const double* var,
                           const float* weight, const float* bias, double* out_mean, double* out_scale,
                           double* out_shift) {
  FinalizeForwardArguments arguments;
  arguments.channels = shape->channels;
  arguments.count = static_cast<int64_t>(count);
  arguments.mean = {mean, DataType::kFloat64};
  arguments.var = {var, DataType::kFloat64};
  arguments.weight = {weight, DataType::kFloat32};
  arguments.bias = {bias, DataType::kFloat32};
  arguments.out_mean = out_mean;
  arguments.out_scale = out_scale;
  arguments.out_shift = out_shift;
  return cuda::FinalizeForward(MakeContext(stream, nullptr, 0), arguments);
}

// With the gradients of float32 weight and bias.
int bench_finalize_backward(const BenchShape* shape, void* stream, size_t count, const double* var,
                            const double* sum_dy, const double* sum_dy_xmu, const float* weight, double* out_scale,
                            double* out_mean_dy, double* out_projection, float* weight_gradient, float* bias_gradient) {
  FinalizeBackwardArguments arguments;
  arguments.channels = shape->channels;
  arguments.count = static_cast<int64_t>(count);
  arguments.var = {var, DataType::kFloat64};
  arguments.sum_dy = arguments.local_sum_dy = sum_dy;
  arguments.sum_dy_xmu = arguments.local_sum_dy_xmu = sum_dy_xmu;
  arguments.weight = {weight, DataType::kFloat32};
  arguments.out_scale = out_scale;
  arguments.out_mean_dy = out_mean_dy;
  arguments.out_projection = out_projection;
  arguments.weight_gradient = {weight_gradient, DataType::kFloat32};
  arguments.bias_gradient = {bias_gradient, DataType::kFloat32};
  return cuda::FinalizeBackward(MakeContext(stream, nullptr, 0), arguments);
}

}  // extern "C"
