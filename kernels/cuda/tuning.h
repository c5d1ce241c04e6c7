// Choices that only a GPU can settle, in one place and as macros: tools/gpu_check times libraries built with others
// (tests/gpu/variants.txt). The first six decide the order of additions, and so the last bits of results.

#ifndef SYNCBN_KERNELS_CUDA_TUNING_H_
#define SYNCBN_KERNELS_CUDA_TUNING_H_

// Blocks that an SM can hold at once, for which the compiler leaves registers, by mapping.
#ifndef SYNCBN_TUNE_ROWS_BLOCKS
#define SYNCBN_TUNE_ROWS_BLOCKS 2
#endif
#ifndef SYNCBN_TUNE_PLANES_BLOCKS
#define SYNCBN_TUNE_PLANES_BLOCKS 4
#endif
// Bytes that an SM has under way in every operation, in KB.
#ifndef SYNCBN_TUNE_UNDER_WAY
#define SYNCBN_TUNE_UNDER_WAY 64
#endif
// Vectors of a row that one block takes, 16 at most: 8 are a line of 128 contiguous bytes at a time, and few channels,
// so that the block which adds up a tile has little to read. On an H100 2 microseconds less than 16 took with 1,024
// channels of bfloat16.
#ifndef SYNCBN_TUNE_TILE_COLUMNS
#define SYNCBN_TUNE_TILE_COLUMNS 8
#endif
// Batches that a block of a reduction has at least, where the tensor allows it.
#ifndef SYNCBN_TUNE_LEAST_BATCHES
#define SYNCBN_TUNE_LEAST_BATCHES 2
#endif
// Partial results that one block merges without help.
#ifndef SYNCBN_TUNE_MERGE_AT_ONCE
#define SYNCBN_TUNE_MERGE_AT_ONCE 32
#endif
// 1: what is stored is the first to leave the cache.
#ifndef SYNCBN_TUNE_STORES_LEAVE_FIRST
#define SYNCBN_TUNE_STORES_LEAVE_FIRST 1
#endif
// 1: what is loaded is the first to leave the cache.
#ifndef SYNCBN_TUNE_LOADS_LEAVE_FIRST
#define SYNCBN_TUNE_LOADS_LEAVE_FIRST 0
#endif

#endif  // SYNCBN_KERNELS_CUDA_TUNING_H_
