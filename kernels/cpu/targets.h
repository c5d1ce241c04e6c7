// The Highway targets that the kernels are compiled for. Include this before hwy/highway.h.

#ifndef SYNCBN_KERNELS_CPU_TARGETS_H_
#define SYNCBN_KERNELS_CPU_TARGETS_H_

// Vectors of unknown length cannot be members of an array. Processors that have SSSE3 and not SSE4.1 were last sold
// around 2008; code for them would be a fifth of the kernels', and they run without vectors.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3)

#endif  // SYNCBN_KERNELS_CPU_TARGETS_H_
