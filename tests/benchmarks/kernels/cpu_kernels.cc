// Bytes that the CPU's operations move in a second, next to a memcpy of the same tensor. Arguments: the shape (an index
// into kShapes), the type (a DataType), the number of threads.

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/batch_norm.h"

namespace syncbn::kernels {
namespace {

constexpr TensorShape kShapes[] = {
    {32, 64, 56 * 56, DataType::kFloat32, Layout::kChannelsFirst},
    {32, 64, 56 * 56, DataType::kFloat32, Layout::kChannelsLast},
    {32, 2048, 7 * 7, DataType::kFloat32, Layout::kChannelsFirst},
    {4096, 1024, 1, DataType::kFloat32, Layout::kChannelsLast},
    {32, 3, 224 * 224, DataType::kFloat32, Layout::kChannelsLast},
};

struct Problem {
  explicit Problem(const benchmark::State& state) : shape(kShapes[state.range(0)]) {
    shape.type = static_cast<DataType>(state.range(1));
    context.num_threads = static_cast<int>(state.range(2));
    const size_t bytes = static_cast<size_t>(shape.size()) * SizeOf(shape.type);
    for (std::vector<uint8_t>* tensor : {&x, &dy, &out}) tensor->resize(bytes);
    for (int64_t i = 0; i < shape.size(); ++i) {
      Put(&x, i, std::sin(static_cast<double>(i)));
      Put(&dy, i, std::cos(static_cast<double>(i)));
    }
  }

  // 16-bit tensors get the upper half of a float, which is a sound number in both types.
  void Put(std::vector<uint8_t>* tensor, int64_t i, double value) {
    const float single = static_cast<float>(value);
    uint8_t* const to = tensor->data() + static_cast<size_t>(i) * SizeOf(shape.type);
    if (shape.type == DataType::kFloat64) {
      std::memcpy(to, &value, 8);
    } else if (shape.type == DataType::kFloat32) {
      std::memcpy(to, &single, 4);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &single, 4);
      const uint16_t upper = static_cast<uint16_t>(bits >> 16);
      std::memcpy(to, &upper, 2);
    }
  }

  // `tensors` read or written by each iteration.
  void Report(benchmark::State* state, int tensors) const {
    state->SetBytesProcessed(state->iterations() * tensors * static_cast<int64_t>(x.size()));
    state->SetLabel(std::to_string(shape.batch) + "x" + std::to_string(shape.channels) + "x" +
                    std::to_string(shape.spatial) + (shape.layout == Layout::kChannelsLast ? " last " : " first ") +
                    std::to_string(8 * SizeOf(shape.type)) + " bits, " + cpu::InstructionSet());
  }

  TensorShape shape;
  cpu::Context context;
  std::vector<uint8_t> x, dy, out;
  const std::vector<double> vector = std::vector<double>(4096, 0.5);
  std::vector<double> first = vector, second = vector;
  const ForwardCoefficients forward = {vector.data(), vector.data(), vector.data()};
  const BackwardCoefficients backward = {vector.data(), vector.data(), vector.data(), vector.data()};
};

void Memcpy(benchmark::State& state) {
  Problem p(state);
  for (auto _ : state) {
    std::memcpy(p.out.data(), p.x.data(), p.x.size());
    benchmark::ClobberMemory();
  }
  p.Report(&state, 2);
}

void Stats(benchmark::State& state) {
  Problem p(state);
  for (auto _ : state) cpu::BatchNormStats(p.context, p.shape, p.x.data(), p.first.data(), p.second.data());
  p.Report(&state, 1);
}

void Elemt(benchmark::State& state) {
  Problem p(state);
  for (auto _ : state) {
    cpu::BatchNormElemt(p.context, p.shape, p.x.data(), p.forward, {nullptr, true, nullptr}, p.out.data());
  }
  p.Report(&state, 2);
}

void BackwardReduce(benchmark::State& state) {
  Problem p(state);
  for (auto _ : state) {
    cpu::BatchNormBackwardReduce(p.context, p.shape, p.dy.data(), p.x.data(), p.vector.data(), {nullptr, p.forward},
                                 p.first.data(), p.second.data());
  }
  p.Report(&state, 2);
}

void BackwardElemt(benchmark::State& state) {
  Problem p(state);
  for (auto _ : state) {
    cpu::BatchNormBackwardElemt(p.context, p.shape, p.dy.data(), p.x.data(), p.backward, {nullptr, p.forward},
                                p.out.data(), nullptr);
  }
  p.Report(&state, 3);
}

void Sweep(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
  for (int shape = 0; shape < 5; ++shape) {
    for (int threads : {1, 2}) benchmark->Args({shape, static_cast<int>(DataType::kFloat32), threads});
  }
  for (DataType type : {DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16}) {
    benchmark->Args({0, static_cast<int>(type), 1});
  }
}

BENCHMARK(Memcpy)->UseRealTime()->Unit(benchmark::kMillisecond)->Args({0, 0, 1});
BENCHMARK(Stats)->Apply(Sweep);
BENCHMARK(Elemt)->Apply(Sweep);
BENCHMARK(BackwardReduce)->Apply(Sweep);
BENCHMARK(BackwardElemt)->Apply(Sweep);

}  // namespace
}  // namespace syncbn::kernels

BENCHMARK_MAIN();
