// The per-channel vectors of one pass.

#ifndef SYNCBN_CLIENT_CC_PASS_VECTORS_H_
#define SYNCBN_CLIENT_CC_PASS_VECTORS_H_

#include <cstddef>

namespace syncbn {

struct PassVectors {
  // The two results of the pass's reduction over this worker's tensor.
  double* local[2] = {};
  // The two results of the round, which finalizing operations read.
  const double* merged[2] = {};
  // The coefficients, which finalizing operations write: of the forward pass, and of the backward pass (with scale).
  double* mean = nullptr;
  double* scale = nullptr;
  double* shift = nullptr;
  double* mean_dy = nullptr;
  double* projection = nullptr;

  static constexpr size_t kCoefficients = 5;

  // Places the coefficients in memory for kCoefficients vectors of `capacity` elements.
  void PlaceCoefficients(double* memory, size_t capacity) {
    for (double** vector : {&mean, &scale, &shift, &mean_dy, &projection}) {
      *vector = memory;
      memory += capacity;
    }
  }
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_PASS_VECTORS_H_
