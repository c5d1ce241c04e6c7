// The block of threads that runs an algorithm, as an algorithm written for host and device sees it.
//
// An algorithm is a function template over a Block, which has
//   tile(), split()          the block's place in the grid, a matrix of tiles x splits;
//   shared()                 memory that its threads share;
//   Each(f)                  calls f(thread, state) for each thread with that thread's own State, then waits for all:
//                            a phase between two barriers;
//   Arrive(counter, n)       publishes the block's writes to the others and counts it in. True in the last of n blocks,
//                            which then sees the others' writes; the counter is then 0 again, ready for the next
//                            launch. Follows an Each, whose barrier it relies on;
//   Raise(flag, value)       tells the host that everything before is complete. Follows an Each or an Arrive.
// DeviceBlock, here, is a block on a GPU: Each is the thread's own call and __syncthreads(). The tests have another
// that loops over the threads, so that the same code runs without a GPU, with blocks in any order.

#ifndef SYNCBN_KERNELS_CUDA_BLOCK_CUH_
#define SYNCBN_KERNELS_CUDA_BLOCK_CUH_

#include <cstdint>

#include "kernels/host_device.h"

namespace syncbn::kernels::cuda {

// A double that another block wrote during this launch: read past the first-level cache, which is not coherent.
SYNCBN_HOST_DEVICE inline double LoadCoherent(const double* address) {
#if defined(__CUDA_ARCH__)
  return __ldcg(address);
#else
  return *address;
#endif
}

#if defined(__CUDACC__)

template <typename State>
class DeviceBlock {
 public:
  using StateType = State;

  SYNCBN_HOST_DEVICE explicit DeviceBlock(void* shared) : shared_(shared) {}

  SYNCBN_HOST_DEVICE int64_t tile() const {
#if defined(__CUDA_ARCH__)
    return blockIdx.x;
#else
    return 0;
#endif
  }
  SYNCBN_HOST_DEVICE int split() const {
#if defined(__CUDA_ARCH__)
    return static_cast<int>(blockIdx.y);
#else
    return 0;
#endif
  }

  SYNCBN_HOST_DEVICE double* shared() const { return static_cast<double*>(shared_); }

  template <typename Phase>
  SYNCBN_HOST_DEVICE void Each(Phase phase) {
#if defined(__CUDA_ARCH__)
    phase(static_cast<int>(threadIdx.x), state_);
    __syncthreads();
#endif
  }

  // One thread releases and acquires for the block: the barrier before puts the other threads' writes ahead of it, and
  // a release covers all that its thread has seen.
  SYNCBN_HOST_DEVICE bool Arrive(uint32_t* counter, int64_t parties) {
#if defined(__CUDA_ARCH__)
    __shared__ uint32_t before;
    const uint32_t last = static_cast<uint32_t>(parties) - 1;  // Wraps to 0 there.
    if (threadIdx.x == 0) {
      uint32_t old;
      asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
      before = old;
    }
    __syncthreads();
    return before == last;
#else
    return false;
#endif
  }

  // The one release for the host, which takes as long as its memory takes to answer. It covers what an Arrive has
  // acquired, the other blocks' writes to the host's memory included: PTX orders them through both scopes.
  SYNCBN_HOST_DEVICE void Raise(volatile uint32_t* flag, uint32_t value) {
#if defined(__CUDA_ARCH__)
    if (threadIdx.x == 0) asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
  }

 private:
  void* shared_;
  State state_;
};

#endif  // defined(__CUDACC__)

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_BLOCK_CUH_
