// Runs independent blocks of work on the caller's thread and on a pool of threads that the process shares.

#ifndef SYNCBN_KERNELS_CPU_PARALLEL_H_
#define SYNCBN_KERNELS_CPU_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace syncbn::kernels::cpu {

// Calls run(block) once for each block in [0, blocks), on the caller's thread and on up to num_threads - 1 others, and
// returns when all calls have. Which thread runs which block is not defined; all of them run in the caller's
// floating-point environment. The pool starts with the first call that needs it, grows to the largest number asked for
// (at most 255 threads) and lives as long as the process; after fork() the child starts its own. With num_threads <= 1
// or one block the pool is not touched. May be called from several threads at once; `run` may not call it.
void ParallelFor(int num_threads, int64_t blocks, const std::function<void(int64_t)>& run);

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_PARALLEL_H_
