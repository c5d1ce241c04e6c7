// Memory and errors of the tests on a GPU.

#ifndef SYNCBN_TESTS_GPU_DEVICE_H_
#define SYNCBN_TESTS_GPU_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels/batch_norm.h"
#include "kernels/cuda/batch_norm.h"

namespace syncbn::testing {

// Ends the process on an error of CUDA: nothing that follows would mean anything.
inline void Require(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "FAILED: %s: %s\n", what, kernels::cuda::ErrorString(error));
  std::exit(1);
}

// Prints that nothing runs, with CUDA's reason, where kernels::cuda::Available() is false.
inline void PrintWhyNoGpu() {
  int count = 0;
  const int error = cudaGetDeviceCount(&count);
  std::printf("skipped: CUDA finds no GPU (%s)\n", kernels::cuda::ErrorString(error));
}

#if defined(__CUDACC__)

template <typename... Parameters, typename... Arguments>
void Launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
  Require(cudaGetLastError(), "launch");
}

#else  // With host/cuda_runtime.h.

template <typename... Parameters, typename... Arguments>
void Launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  host_cuda::Enqueue(stream, [=] {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    }
  });
}

#endif

// Device memory, `skip` bytes past a 256-byte boundary, filled with 0xff (NaN in every type) unless it is copied to.
// With SYNCBN_UNFILLED=1 in the environment it is left as it is, so that initcheck can report reads of it.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes, size_t skip = 0, const void* host = nullptr) : bytes_(bytes), skip_(skip) {
    Require(cudaMalloc(&base_, bytes + skip + 1), "cudaMalloc");
    if (Fills()) Require(cudaMemset(base_, 0xff, bytes + skip), "cudaMemset");
    if (host != nullptr) Require(cudaMemcpy(data(), host, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  ~DeviceBuffer() { cudaFree(base_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return static_cast<char*>(base_) + skip_; }
  double* doubles() const { return static_cast<double*>(data()); }
  uint8_t* bytes() const { return static_cast<uint8_t*>(data()); }
  void CopyTo(void* host) const { Require(cudaMemcpy(host, data(), bytes_, cudaMemcpyDeviceToHost), "copy back"); }

 private:
  static bool Fills() {
    static const char* const unfilled = std::getenv("SYNCBN_UNFILLED");
    return unfilled == nullptr || *unfilled != '1';
  }

  void* base_ = nullptr;
  size_t bytes_;
  size_t skip_;
};

// The operations on the GPU as a Backend of tests/kernels/cuda/checksums.h, over host memory. `misalignment` is in
// elements. All share one workspace, which only its first use finds freshly zeroed.
class GpuBackend {
 public:
  explicit GpuBackend(int misalignment = 0) : misalignment_(misalignment), workspace_(kWorkspaceBytes) {
    Require(cudaMemset(workspace_.data(), 0, kWorkspaceBytes), "cudaMemset");
    context_.workspace = workspace_.data();
    context_.workspace_bytes = kWorkspaceBytes;
  }

  void Stats(const kernels::TensorShape& shape, const void* x, double* mean, double* m2) {
    const DeviceBuffer dx = Upload(shape, x);
    const DeviceBuffer out_mean(Vector(shape)), out_m2(Vector(shape));
    Require(kernels::cuda::BatchNormStats(context_, shape, dx.data(), out_mean.doubles(), out_m2.doubles()), "stats");
    out_mean.CopyTo(mean);
    out_m2.CopyTo(m2);
  }

  void Elemt(const kernels::TensorShape& shape, const void* x, const kernels::ForwardCoefficients& coefficients,
             const kernels::Epilogue& epilogue, void* y) {
    const DeviceBuffer dx = Upload(shape, x);
    const Forward forward(shape, coefficients);
    const DeviceBuffer residual = Upload(shape, epilogue.residual != nullptr ? epilogue.residual : x);
    const DeviceBuffer mask(kernels::ReluMaskBytes(shape.size()));
    const DeviceBuffer out = Upload(shape, nullptr);
    kernels::Epilogue device = epilogue;
    if (epilogue.residual != nullptr) device.residual = residual.data();
    if (epilogue.relu_mask != nullptr) device.relu_mask = mask.bytes();
    Require(kernels::cuda::BatchNormElemt(context_, shape, dx.data(), forward.view(), device, out.data()), "elemt");
    out.CopyTo(y);
    if (epilogue.relu_mask != nullptr) mask.CopyTo(epilogue.relu_mask);
  }

  void BackwardReduce(const kernels::TensorShape& shape, const void* dy, const void* x, const double* mean,
                      const kernels::ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
    const DeviceBuffer device_dy = Upload(shape, dy), device_x = Upload(shape, x);
    const DeviceBuffer device_mean(Vector(shape), 0, mean), out_dy(Vector(shape)), out_xmu(Vector(shape));
    const Gate device_gate(shape, gate, mean);
    Require(kernels::cuda::BatchNormBackwardReduce(context_, shape, device_dy.data(), device_x.data(),
                                                   device_mean.doubles(), device_gate.view(), out_dy.doubles(),
                                                   out_xmu.doubles()),
            "backward reduce");
    out_dy.CopyTo(sum_dy);
    out_xmu.CopyTo(sum_dy_xmu);
  }

  void BackwardElemt(const kernels::TensorShape& shape, const void* dy, const void* x,
                     const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate, void* dx,
                     void* d_residual) {
    const DeviceBuffer device_dy = Upload(shape, dy), device_x = Upload(shape, x);
    const DeviceBuffer mean(Vector(shape), 0, coefficients.mean), scale(Vector(shape), 0, coefficients.scale);
    const DeviceBuffer mean_dy(Vector(shape), 0, coefficients.mean_dy);
    const DeviceBuffer projection(Vector(shape), 0, coefficients.projection);
    const Gate device_gate(shape, gate, coefficients.mean);
    const DeviceBuffer out_dx = Upload(shape, nullptr), out_residual = Upload(shape, nullptr);
    Require(kernels::cuda::BatchNormBackwardElemt(
                context_, shape, device_dy.data(), device_x.data(),
                {mean.doubles(), scale.doubles(), mean_dy.doubles(), projection.doubles()}, device_gate.view(),
                out_dx.data(), d_residual != nullptr ? out_residual.data() : nullptr),
            "backward elemt");
    out_dx.CopyTo(dx);
    if (d_residual != nullptr) out_residual.CopyTo(d_residual);
  }

 private:
  static constexpr size_t kWorkspaceBytes = size_t{4} << 20;  // A launch says so if it is too small.

  struct Forward {
    Forward(const kernels::TensorShape& shape, const kernels::ForwardCoefficients& host)
        : mean(Vector(shape), 0, host.mean), scale(Vector(shape), 0, host.scale), shift(Vector(shape), 0, host.shift) {}
    kernels::ForwardCoefficients view() const { return {mean.doubles(), scale.doubles(), shift.doubles()}; }
    DeviceBuffer mean, scale, shift;
  };

  // `filler` replaces the vectors that the gate lacks.
  struct Gate {
    Gate(const kernels::TensorShape& shape, const kernels::ReluGate& host, const double* filler)
        : kind(host),
          mask(kernels::ReluMaskBytes(shape.size()), 0, host.mask),
          forward(shape,
                  host.forward.mean != nullptr ? host.forward : kernels::ForwardCoefficients{filler, filler, filler}) {}
    kernels::ReluGate view() const {
      kernels::ReluGate gate;
      if (kind.mask != nullptr) gate.mask = mask.bytes();
      if (kind.forward.mean != nullptr) gate.forward = forward.view();
      return gate;
    }
    kernels::ReluGate kind;
    DeviceBuffer mask;
    Forward forward;
  };

  static size_t Vector(const kernels::TensorShape& shape) { return shape.channels * sizeof(double); }

  DeviceBuffer Upload(const kernels::TensorShape& shape, const void* host) const {
    const size_t element = kernels::SizeOf(shape.type);
    return DeviceBuffer(shape.size() * element, misalignment_ * element, host);
  }

  int misalignment_;
  DeviceBuffer workspace_;
  kernels::cuda::Context context_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_GPU_DEVICE_H_
