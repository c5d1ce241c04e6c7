// The Highway targets that the kernels are compiled for. Include this before hwy/highway.h.

#ifndef SYNCBN_KERNELS_CPU_TARGETS_H_
#define SYNCBN_KERNELS_CPU_TARGETS_H_

// Vectors of unknown length cannot be members of an array.
//
// Code for SSE4 beside that for SSSE3 would be a quarter of the kernels' and little faster. SSSE3 reaches more
// machines: Highway asks for AES and carry-less multiplication besides SSE4.2, which a virtual machine may not show.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSE4)

// For Highway, NEON has the cryptographic extension, without which it would offer code without vectors as well. The
// kernels have no cryptographic instruction: those for NEON run on every processor.
#ifdef __aarch64__
#define HWY_BASELINE_TARGETS HWY_NEON
#endif

#endif  // SYNCBN_KERNELS_CPU_TARGETS_H_
