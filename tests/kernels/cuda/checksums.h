// One checksum for each operation, type and shape of cases.h, by whichever backend computes them: the host executor in
// CI, or a GPU.

#ifndef SYNCBN_TESTS_KERNELS_CUDA_CHECKSUMS_H_
#define SYNCBN_TESTS_KERNELS_CUDA_CHECKSUMS_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/batch_norm.h"
#include "tests/kernels/cuda/cases.h"

namespace syncbn::testing {

// A Backend has Stats, Elemt, BackwardReduce and BackwardElemt with the parameters of kernels/batch_norm.h less the
// context, over host memory. Lines are "operation shape checksum".
template <typename Backend>
std::vector<std::string> ComputeChecksums(Backend& backend) {
  std::vector<std::string> lines;
  for (const DataType type : kTypes) {
    for (const TensorShape& shape : SmallShapes(type)) {
      if (shape.size() == 0) continue;
      const auto add = [&](const char* operation, uint64_t sum) {
        char hex[20];
        std::snprintf(hex, sizeof(hex), "%016llx", static_cast<unsigned long long>(sum));
        lines.push_back(std::string(operation) + " " + Describe(shape) + " " + hex);
      };
      const size_t bytes = shape.channels * sizeof(double);
      const Tensor x = RandomTensor(shape, 21, 2.0, 1.5), dy = RandomTensor(shape, 22, 0.1, 1.0);
      const Tensor residual = RandomTensor(shape, 23, 0.0, 1.0);
      std::vector<double> mean(shape.channels), m2(shape.channels), sum_dy(shape.channels), sum_xmu(shape.channels);
      const std::vector<double> scale = RandomVector(shape.channels, 24, 0.5, 0.2);
      const std::vector<double> shift = RandomVector(shape.channels, 25, 0.1, 0.5);
      const std::vector<double> mean_dy = RandomVector(shape.channels, 26, 0.1, 0.1);
      const std::vector<double> projection = RandomVector(shape.channels, 27, 0.0, 0.1);
      std::vector<uint8_t> mask(kernels::ReluMaskBytes(shape.size()));
      const kernels::ForwardCoefficients forward{mean.data(), scale.data(), shift.data()};
      const kernels::BackwardCoefficients backward{mean.data(), scale.data(), mean_dy.data(), projection.data()};

      backend.Stats(shape, x.data(), mean.data(), m2.data());
      add("stats", Checksum(m2.data(), bytes, Checksum(mean.data(), bytes)));

      kernels::Epilogue epilogue;
      epilogue.residual = residual.data();
      epilogue.relu = true;
      epilogue.relu_mask = mask.data();
      Tensor y(type, shape.size());
      backend.Elemt(shape, x.data(), forward, epilogue, y.data());
      add("elemt", Checksum(mask.data(), mask.size(), Checksum(y.data(), y.byte_size())));
      backend.Elemt(shape, x.data(), forward, kernels::Epilogue(), y.data());
      add("elemt_plain", Checksum(y.data(), y.byte_size()));

      kernels::ReluGate gates[3];
      gates[1].mask = mask.data();
      gates[2].forward = forward;
      for (const kernels::ReluGate& gate : gates) {
        backend.BackwardReduce(shape, dy.data(), x.data(), mean.data(), gate, sum_dy.data(), sum_xmu.data());
        add("backward_reduce", Checksum(sum_xmu.data(), bytes, Checksum(sum_dy.data(), bytes)));
        Tensor dx(type, shape.size()), d_residual(type, shape.size());
        backend.BackwardElemt(shape, dy.data(), x.data(), backward, gate, dx.data(), d_residual.data());
        add("backward_elemt", Checksum(d_residual.data(), dx.byte_size(), Checksum(dx.data(), dx.byte_size())));
      }
    }
  }
  return lines;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_KERNELS_CUDA_CHECKSUMS_H_
