// The GPU backend of a build without CUDA.

#include "kernels/cuda/batch_norm.h"

namespace syncbn::kernels::cuda {

bool Available() { return false; }

const char* ErrorString(Error error) { return error == kSuccess ? "no error" : "built without CUDA"; }

Error BatchNormStats(const Context&, const TensorShape&, const void*, double*, double*) { return kNoCuda; }

Error BatchNormElemt(const Context&, const TensorShape&, const void*, const ForwardCoefficients&, const Epilogue&,
                     void*) {
  return kNoCuda;
}

Error BatchNormBackwardReduce(const Context&, const TensorShape&, const void*, const void*, const double*,
                              const ReluGate&, double*, double*) {
  return kNoCuda;
}

Error BatchNormBackwardElemt(const Context&, const TensorShape&, const void*, const void*, const BackwardCoefficients&,
                             const ReluGate&, void*, void*) {
  return kNoCuda;
}

Error FinalizeForward(const Context&, const FinalizeForwardArguments&) { return kNoCuda; }

Error FinalizeBackward(const Context&, const FinalizeBackwardArguments&) { return kNoCuda; }

Error Preload() { return kNoCuda; }

}  // namespace syncbn::kernels::cuda
