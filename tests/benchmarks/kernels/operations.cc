// The CPU's operations for ctypes: those of a forward pass, and those of a backward pass. Beside a layer's they leave
// out what does not grow with the batch: from the moments to the coefficients.

#include <cstdint>

#include "kernels/cpu/batch_norm.h"

extern "C" {

struct Pass {
  int64_t batch, channels, spatial;
  int32_t type, layout;  // A DataType and a Layout.
  int32_t num_threads;
  const void* x;
  const void* dy;
  void* out;  // y or dx.
  // [channels] each.
  const double *mean, *scale, *shift;
  double *first, *second;  // Written: what the reduction gives.
};

void forward_operations(const Pass* pass) {
  using namespace syncbn::kernels;
  const TensorShape shape = {pass->batch, pass->channels, pass->spatial, static_cast<DataType>(pass->type),
                             static_cast<Layout>(pass->layout)};
  const cpu::Context context = {pass->num_threads};
  cpu::BatchNormStats(context, shape, pass->x, pass->first, pass->second);
  cpu::BatchNormElemt(context, shape, pass->x, {pass->mean, pass->scale, pass->shift}, {}, pass->out);
}

void backward_operations(const Pass* pass) {
  using namespace syncbn::kernels;
  const TensorShape shape = {pass->batch, pass->channels, pass->spatial, static_cast<DataType>(pass->type),
                             static_cast<Layout>(pass->layout)};
  const cpu::Context context = {pass->num_threads};
  cpu::BatchNormBackwardReduce(context, shape, pass->dy, pass->x, pass->mean, {}, pass->first, pass->second);
  cpu::BatchNormBackwardElemt(context, shape, pass->dy, pass->x, {pass->mean, pass->scale, pass->shift, pass->shift},
                              {}, pass->out, nullptr);
}

}  // extern "C"
