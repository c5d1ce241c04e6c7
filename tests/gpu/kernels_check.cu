// The kernels on a GPU: the bits that the host executor has, on aligned and unaligned memory; a float64 oracle; the
// same bits a hundred times beside kernels that compete for the machine; results and signal in host memory; more than
// 2^32 elements.
//
//   kernels_check CHECKSUMS [--quick | --sanitize | --probe]
//
// --quick: smaller tensors, fewer repetitions. --sanitize: likewise, and each shape in one type, which
// compute-sanitizer has time for. --probe: one small kernel, to see if anything runs at all.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/batch_norm.h"
#include "kernels/cuda/batch_norm.h"
#include "kernels/finalize.h"
#include "tests/gpu/device.h"
#include "tests/kernels/cuda/cases.h"
#include "tests/kernels/cuda/checksums.h"
#include "tests/testing/batch_norm_oracle.h"

namespace syncbn::testing {
namespace {

using Doubles = std::vector<double>;

int g_passed = 0;
int g_failed = 0;

void Check(bool good, const std::string& what) {
  ++(good ? g_passed : g_failed);
  if (!good && g_failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

void CheckChecksums(const char* path, int misalignment) {
  std::ifstream file(path);
  std::vector<std::string> recorded;
  for (std::string line; std::getline(file, line);) recorded.push_back(line);
  GpuBackend backend(misalignment);
  const std::vector<std::string> computed = ComputeChecksums(backend);
  Check(computed.size() == recorded.size(), "the number of recorded checksums");
  for (size_t i = 0; i < computed.size() && i < recorded.size(); ++i) {
    Check(computed[i] == recorded[i],
          computed[i] + " instead of " + recorded[i] + ", misalignment " + std::to_string(misalignment));
  }
}

// Largest |actual - expected| / (bound for each element).
template <typename Bound>
double WorstRatio(const Doubles& actual, const Wide& expected, Bound bound) {
  double worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double ratio = std::fabs(static_cast<double>(actual[i] - expected[i])) / bound(i);
    if (!(ratio <= worst)) worst = ratio;  // A NaN stays.
  }
  return worst;
}

void CheckOracle(const TensorShape& shape, double mean_over_deviation) {
  const OracleShape oracle{static_cast<size_t>(shape.batch), static_cast<size_t>(shape.channels),
                           static_cast<size_t>(shape.spatial), shape.layout == Layout::kChannelsLast};
  const std::string name = Describe(shape) + " mean " + std::to_string(mean_over_deviation);
  const Tensor x = RandomTensor(shape, 31, mean_over_deviation, 1.0), dy = RandomTensor(shape, 32, 0.1, 1.0);
  GpuBackend gpu;
  Doubles mean(shape.channels), m2(shape.channels), sum_dy(shape.channels), sum_xmu(shape.channels);
  gpu.Stats(shape, x.data(), mean.data(), m2.data());
  const OracleStats stats = Stats(oracle, x.Values());
  Check(WorstRatio(mean, stats.mean, [&](size_t) { return 1e-6; }) <= 1, "mean of " + name);
  Check(WorstRatio(m2, stats.m2, [&](size_t c) { return 1e-6 * static_cast<double>(stats.m2[c]) + 1e-300; }) <= 1,
        "m2 of " + name);

  const double roundoff = shape.type == DataType::kFloat64   ? 0x1p-53
                          : shape.type == DataType::kFloat32 ? 0x1p-24
                          : shape.type == DataType::kFloat16 ? 0x1p-11
                                                             : 0x1p-8;
  const double working = shape.type == DataType::kFloat64 ? 0x1p-53 : 0x1p-24;
  const Doubles scale = RandomVector(shape.channels, 33, 0.5, 0.2), shift = RandomVector(shape.channels, 34, 0.1, 0.5);
  const Doubles mean_dy = RandomVector(shape.channels, 35, 0.1, 0.1);
  const Doubles projection = RandomVector(shape.channels, 36, 0.0, 0.1);
  Tensor y(shape.type, shape.size()), dx(shape.type, shape.size());
  gpu.Elemt(shape, x.data(), {mean.data(), scale.data(), shift.data()}, kernels::Epilogue(), y.data());
  const Wide forward = Forward(oracle, x.Values(), mean, scale, shift, {}, false);
  Check(WorstRatio(y.Values(), forward,
                   [&](size_t i) {
                     return roundoff * std::fabs(static_cast<double>(forward[i])) + 64 * working +
                            0x1p-24 * (roundoff == 0x1p-11);
                   }) <= 1,
        "elemt of " + name);

  const std::vector<bool> open(shape.size(), true);
  gpu.BackwardReduce(shape, dy.data(), x.data(), mean.data(), kernels::ReluGate(), sum_dy.data(), sum_xmu.data());
  const OracleSums sums = testing::BackwardReduce(oracle, dy.Values(), x.Values(), mean, open);
  Check(WorstRatio(sum_dy, sums.sum_dy,
                   [&](size_t c) { return 20 * working * static_cast<double>(sums.magnitude_dy[c]) + 1e-300; }) <= 1,
        "sum_dy of " + name);
  Check(WorstRatio(sum_xmu, sums.sum_dy_xmu,
                   [&](size_t c) {
                     return 20 * working * static_cast<double>(sums.magnitude_dy_xmu[c] + sums.magnitude_dy[c]) +
                            1e-300;
                   }) <= 1,
        "sum_dy_xmu of " + name);

  gpu.BackwardElemt(shape, dy.data(), x.data(), {mean.data(), scale.data(), mean_dy.data(), projection.data()},
                    kernels::ReluGate(), dx.data(), nullptr);
  const Wide backward = Backward(oracle, dy.Values(), x.Values(), mean, scale, mean_dy, projection, open);
  Check(WorstRatio(dx.Values(), backward,
                   [&](size_t i) {
                     return roundoff * std::fabs(static_cast<double>(backward[i])) + 64 * working +
                            0x1p-24 * (roundoff == 0x1p-11);
                   }) <= 1,
        "backward elemt of " + name);
}

// One finalization's vectors, on the host and on the GPU.
struct Finalized {
  explicit Finalized(int64_t channels, DataType type)
      : mean(channels), scale(channels), shift(channels), running_mean(type, channels), running_var(type, channels) {
    for (int64_t c = 0; c < channels; ++c) {
      running_mean.Set(c, Normal(43, c));
      running_var.Set(c, 1 + 0.1 * Normal(44, c));
    }
  }
  Doubles mean, scale, shift;
  Tensor running_mean, running_var;
};

// The GPU's coefficients and running statistics have the host's bits.
void CheckFinalize(DataType type) {
  const int64_t channels = 1000;
  const size_t bytes = channels * sizeof(double);
  const Doubles mean = RandomVector(channels, 41, 1, 1), var = RandomVector(channels, 42, 0.6, 0.1);
  Finalized host(channels, type), copied = host;
  const DeviceBuffer d_mean(bytes, 0, mean.data()), d_var(bytes, 0, var.data());
  const DeviceBuffer o_mean(bytes), o_scale(bytes), o_shift(bytes);
  const DeviceBuffer o_running_mean(host.running_mean.byte_size(), 0, host.running_mean.data());
  const DeviceBuffer o_running_var(host.running_var.byte_size(), 0, host.running_var.data());
  int64_t batches = 7;
  const DeviceBuffer o_batches(sizeof(batches), 0, &batches);

  kernels::FinalizeForwardArguments arguments;
  arguments.channels = channels;
  arguments.count = 100;
  arguments.mean = {mean.data(), DataType::kFloat64};
  arguments.var = {var.data(), DataType::kFloat64};
  arguments.out_mean = host.mean.data();
  arguments.out_scale = host.scale.data();
  arguments.out_shift = host.shift.data();
  arguments.running_mean = {host.running_mean.data(), type};
  arguments.running_var = {host.running_var.data(), type};
  arguments.batches = &batches;
  arguments.cumulative = true;
  for (int64_t c = 0; c < channels; ++c) kernels::FinalizeForwardChannel(arguments, c);

  arguments.mean.data = d_mean.data();
  arguments.var.data = d_var.data();
  arguments.out_mean = o_mean.doubles();
  arguments.out_scale = o_scale.doubles();
  arguments.out_shift = o_shift.doubles();
  arguments.running_mean.data = o_running_mean.data();
  arguments.running_var.data = o_running_var.data();
  arguments.batches = reinterpret_cast<int64_t*>(o_batches.doubles());
  Require(kernels::cuda::FinalizeForward(kernels::cuda::Context(), arguments), "finalize forward");
  o_scale.CopyTo(copied.scale.data());
  o_running_mean.CopyTo(copied.running_mean.data());
  o_running_var.CopyTo(copied.running_var.data());
  Check(copied.scale == host.scale, "finalize forward: the host's coefficients");
  Check(copied.running_mean == host.running_mean && copied.running_var == host.running_var,
        "finalize forward: the host's running statistics");

  arguments.count = 0;  // A batch that the running statistics do not take is counted out again.
  Require(kernels::cuda::FinalizeForward(kernels::cuda::Context(), arguments), "finalize forward");
  o_batches.CopyTo(&batches);
  Check(batches == 6, "finalize forward: the number of batches");
}

__global__ void NoiseKernel(float* data, int64_t size, int rounds) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  float value = static_cast<float>(i);
  for (int r = 0; r < rounds; ++r) value = value * 1.0001f + 0.5f;
  if (i < size) data[i] += value;
}

// The same bits however blocks are scheduled.
void CheckDeterminism(const TensorShape& shape, int runs) {
  const Tensor x = RandomTensor(shape, 51, 1, 1), dy = RandomTensor(shape, 52, 0, 1);
  const size_t bytes = shape.channels * sizeof(double);
  const DeviceBuffer dx(x.byte_size(), 0, x.data()), ddy(dy.byte_size(), 0, dy.data());
  const DeviceBuffer mean(bytes), m2(bytes), sum_dy(bytes), sum_xmu(bytes), noise(size_t{4} << 20);
  const DeviceBuffer out_y(x.byte_size()), out_dx(x.byte_size());
  const Doubles factors = RandomVector(shape.channels, 53, 0.5, 0.2);
  const DeviceBuffer d_factors(bytes, 0, factors.data());
  const size_t workspace_bytes = kernels::cuda::WorkspaceBytes(shape);
  const DeviceBuffer workspace(workspace_bytes);
  Require(cudaMemset(workspace.data(), 0, workspace_bytes), "cudaMemset");
  Require(cudaMemset(noise.data(), 0, size_t{4} << 20), "cudaMemset");
  cudaStream_t stream, other;
  Require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Require(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "stream");
  Require(cudaDeviceSynchronize(), "synchronize");
  kernels::cuda::Context context;
  context.stream = stream;
  context.workspace = workspace.data();
  context.workspace_bytes = workspace_bytes;
  uint64_t first = 0;
  for (int run = 0; run < runs; ++run) {
    // Nothing, little or much of the machine is taken.
    if (run % 3 != 0) {
      Launch(NoiseKernel, 37 * (run % 29 + 1), 128, other, static_cast<float*>(noise.data()), int64_t{1} << 20,
             100 * (run % 17));
    }
    Require(kernels::cuda::BatchNormStats(context, shape, dx.data(), mean.doubles(), m2.doubles()), "stats");
    Require(kernels::cuda::BatchNormBackwardReduce(context, shape, ddy.data(), dx.data(), mean.doubles(),
                                                   kernels::ReluGate(), sum_dy.doubles(), sum_xmu.doubles()),
            "backward reduce");
    const kernels::ForwardCoefficients forward{mean.doubles(), d_factors.doubles(), d_factors.doubles()};
    Require(kernels::cuda::BatchNormElemt(context, shape, dx.data(), forward, kernels::Epilogue(), out_y.data()),
            "elemt");
    const kernels::BackwardCoefficients backward{mean.doubles(), d_factors.doubles(), d_factors.doubles(),
                                                 d_factors.doubles()};
    Require(kernels::cuda::BatchNormBackwardElemt(context, shape, ddy.data(), dx.data(), backward, kernels::ReluGate(),
                                                  out_dx.data(), nullptr),
            "backward elemt");
    Require(cudaStreamSynchronize(stream), "synchronize");
    uint64_t sum = 0xcbf29ce484222325u;
    Doubles host(shape.channels);
    for (const DeviceBuffer* buffer : {&mean, &m2, &sum_dy, &sum_xmu}) {
      buffer->CopyTo(host.data());
      sum = Checksum(host.data(), bytes, sum);
    }
    std::vector<uint64_t> words((x.byte_size() + 7) / 8, 0);
    for (const DeviceBuffer* buffer : {&out_y, &out_dx}) {
      buffer->CopyTo(words.data());
      for (const uint64_t word : words) sum = (sum ^ word) * 0x100000001b3u;
    }
    if (run == 0) first = sum;
    Check(sum == first, "equal bits, run " + std::to_string(run) + " of " + Describe(shape));
  }
  Require(cudaDeviceSynchronize(), "synchronize");
  cudaStreamDestroy(stream);
  cudaStreamDestroy(other);
}

// Results and flag in mapped host memory, read without a call to CUDA once the flag is up.
void CheckSignal(const TensorShape& shape) {
  const Tensor x = RandomTensor(shape, 61, 1, 1);
  const DeviceBuffer dx(x.byte_size(), 0, x.data());
  Doubles mean(shape.channels), m2(shape.channels);
  GpuBackend plain;
  plain.Stats(shape, x.data(), mean.data(), m2.data());
  const size_t bytes = shape.channels * sizeof(double);
  char* pinned = nullptr;
  Require(cudaHostAlloc(reinterpret_cast<void**>(&pinned), 2 * bytes + 64, cudaHostAllocMapped), "cudaHostAlloc");
  std::memset(pinned, 0xff, 2 * bytes + 64);
  double* const host_mean = reinterpret_cast<double*>(pinned);
  double* const host_m2 = host_mean + shape.channels;
  uint32_t* const flag = reinterpret_cast<uint32_t*>(pinned + 2 * bytes);
  const size_t workspace_bytes = kernels::cuda::WorkspaceBytes(shape);
  const DeviceBuffer workspace(workspace_bytes);
  Require(cudaMemset(workspace.data(), 0, workspace_bytes), "cudaMemset");
  kernels::cuda::Context context;
  context.workspace = workspace.data();
  context.workspace_bytes = workspace_bytes;
  for (uint32_t epoch = 1; epoch <= 20; ++epoch) {
    std::memset(pinned, 0xff, 2 * bytes);
    context.signal = {flag, epoch};
    Require(kernels::cuda::BatchNormStats(context, shape, dx.data(), host_mean, host_m2), "stats");
    int64_t polls = 0;
    while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != epoch && ++polls < 2000000000) {
    }
    Check(std::memcmp(host_mean, mean.data(), bytes) == 0 && std::memcmp(host_m2, m2.data(), bytes) == 0,
          "results behind the flag, " + Describe(shape));
    Require(cudaDeviceSynchronize(), "synchronize");
  }
  cudaFreeHost(pinned);
}

__global__ void FillKernel(uint16_t* data, int64_t size) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    data[i] = i % 2 ? 0x4000 : 0x3f80;  // bfloat16 2 and 1.
  }
}

// Mean 1.5 and M2 n/4, exactly, in every channel.
void CheckHuge(Layout layout) {
  TensorShape shape;
  shape.type = DataType::kBFloat16;
  shape.layout = layout;
  shape.channels = layout == Layout::kChannelsLast ? 33 : 32;
  shape.batch = 130;
  shape.spatial = 1048576;
  size_t free_bytes = 0, total = 0;
  Require(cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo");
  if (free_bytes < shape.size() * 2 + (size_t{1} << 30)) {
    std::printf("skipped: %s needs %.1f GB\n", Describe(shape).c_str(), shape.size() * 2e-9);
    return;
  }
  void* x = nullptr;
  Require(cudaMalloc(&x, shape.size() * 2), "cudaMalloc");
  Launch(FillKernel, 1024, 256, nullptr, static_cast<uint16_t*>(x), shape.size());
  const size_t bytes = shape.channels * sizeof(double), workspace_bytes = kernels::cuda::WorkspaceBytes(shape);
  const DeviceBuffer mean(bytes), m2(bytes), workspace(workspace_bytes);
  Require(cudaMemset(workspace.data(), 0, workspace_bytes), "cudaMemset");
  kernels::cuda::Context context;
  context.workspace = workspace.data();
  context.workspace_bytes = workspace_bytes;
  Require(kernels::cuda::BatchNormStats(context, shape, x, mean.doubles(), m2.doubles()), "stats");
  Doubles host_mean(shape.channels), host_m2(shape.channels);
  mean.CopyTo(host_mean.data());
  m2.CopyTo(host_m2.data());
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double n = static_cast<double>(shape.values_per_channel());
    Check(std::fabs(host_mean[c] - 1.5) < 1e-9 && std::fabs(host_m2[c] / (n / 4) - 1) < 1e-9,
          "channel " + std::to_string(c) + " of " + Describe(shape));
  }
  cudaFree(x);
}

int Run(const char* checksums, const std::string& option) {
  const bool probe = option == "--probe", sanitize = option == "--sanitize", quick = sanitize || option == "--quick";
  if (!kernels::cuda::Available()) {
    PrintWhyNoGpu();
    return 0;
  }
  cudaDeviceProp properties;
  Require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("GPU: %s, compute capability %d.%d, %d multiprocessors\n", properties.name, properties.major,
              properties.minor, properties.multiProcessorCount);
  for (const DataType type : kTypes) CheckFinalize(type);
  if (probe) return g_failed == 0 ? 0 : 1;
  const kernels::cuda::Error loaded = kernels::cuda::Preload();
  Check(loaded == kernels::cuda::kSuccess,
        std::string("every kernel is loaded: ") + kernels::cuda::ErrorString(loaded));
  for (const DataType type : kTypes) {
    int place = 0;
    for (const TensorShape& shape : SmallShapes(type)) {
      if (shape.size() == 0 || (quick && shape.size() > 20000)) continue;
      if (sanitize && place++ % 4 != static_cast<int>(type)) continue;
      for (const double mean : {0.0, 100.0}) {
        if (mean > 0 && (sanitize || type == DataType::kFloat16 || type == DataType::kBFloat16)) continue;
        CheckOracle(shape, mean);
      }
    }
  }
  std::printf("oracle: %d passed, %d failed\n", g_passed, g_failed);
  TensorShape shape;
  shape.batch = 8;
  shape.channels = 64;
  shape.spatial = quick ? 100 : 56 * 56;
  for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
    shape.layout = layout;
    CheckSignal(shape);
    CheckDeterminism(shape, quick ? 3 : 100);
    if (!quick) CheckHuge(layout);
  }
  shape.channels = 3;
  CheckDeterminism(shape, quick ? 3 : 100);
  if (!quick) {
    for (const int misalignment : {0, 1}) CheckChecksums(checksums, misalignment);
  }
  std::printf("kernels: %d passed, %d failed\n", g_passed, g_failed);
  return g_failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace syncbn::testing

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: kernels_check CHECKSUMS [--quick | --sanitize | --probe]\n");
    return 2;
  }
  return syncbn::testing::Run(argv[1], argc > 2 ? argv[2] : "");
}
