// Which of Highway's targets the kernels are compiled for. To be included before hwy/highway.h.

#ifndef SYNCBN_KERNELS_CPU_TARGETS_H_
#define SYNCBN_KERNELS_CPU_TARGETS_H_

// Vectors of unknown length cannot be members of an array. Under a sanitizer, two targets stand for all: each costs the
// compiler minutes there.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HWY_DISABLED_TARGETS \
  (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3 | HWY_SSE4 | HWY_AVX3)
#else
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif

#endif  // SYNCBN_KERNELS_CPU_TARGETS_H_
