// The size of this machine's caches.

#ifndef SYNCBN_KERNELS_CPU_CACHE_SIZE_H_
#define SYNCBN_KERNELS_CPU_CACHE_SIZE_H_

#include <cstdint>

namespace syncbn::kernels::cpu {

// Returns the bytes of the largest cache of a processor, or 32 MiB if the system does not tell.
//
// Thread safety: any thread.
int64_t LargestCacheBytes();

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_CACHE_SIZE_H_
