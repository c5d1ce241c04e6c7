// The division of an operation into thread blocks: a pure function of the tensor's shape, computed on the host.
//
// Nothing here asks which GPU will run it. The order in which numbers are added follows from the plan alone, so a plan
// that does not know the GPU gives the same bits on every model, and can be tested where there is none.

#ifndef SYNCBN_KERNELS_CUDA_PLAN_H_
#define SYNCBN_KERNELS_CUDA_PLAN_H_

#include <cstddef>
#include <cstdint>

#include "kernels/batch_norm.h"
#include "kernels/cuda/fast_divide.h"
#include "kernels/cuda/tuning.h"

namespace syncbn::kernels::cuda {

// The two ways to find the channel of an element.
enum class Mapping : uint8_t {
  // Channels last, or no spatial extent. The tensor is a stream of vectors whose channels repeat after `columns`
  // vectors (the least common multiple of C and the vector's width): a matrix of `rows` x `columns` vectors, in which a
  // thread stays in its column and so keeps its channels. Less than one row may be left over, `tail` elements.
  kRows = 0,
  // Channels first. Runs ("planes") of `spatial` elements have one channel. A vector at either end of a plane may
  // reach into the next, so its elements are masked.
  kPlanes = 1,
};

// Threads of a block, at most. A block may use a few less (3 channels: 85 * 3 = 255).
inline constexpr int kMaxThreads = 256;
// Elements that one thread moves with one instruction: 16 bytes of them.
constexpr int VectorWidth(DataType type) { return static_cast<int>(16 / SizeOf(type)); }
// Blocks that an SM can hold at once, for which the compiler leaves registers. In rows a thread keeps the sums or
// coefficients of up to eight channels and may use 128 registers, in planes 64.
SYNCBN_HOST_DEVICE constexpr int BlocksPerSm(Mapping mapping) {
  return mapping == Mapping::kRows ? SYNCBN_TUNE_ROWS_BLOCKS : SYNCBN_TUNE_PLANES_BLOCKS;
}
// Vectors of each tensor that a thread loads before it uses the first, if it reads `bytes` of all tensors for one: in
// every operation an SM has as much under way.
SYNCBN_HOST_DEVICE constexpr int Unroll(Mapping mapping, int bytes) {
  const int unroll = SYNCBN_TUNE_UNDER_WAY * 1024 / kMaxThreads / (BlocksPerSm(mapping) * bytes);
  return unroll < 1 ? 1 : unroll;
}
// Sums that a reduction makes of each channel: of the values about a pivot and of their squares, or of dy and of its
// products.
inline constexpr int kReduceSums = 2;
// Channels that a thread of a reduction has sums of.
template <Mapping kMapping, typename T>
SYNCBN_HOST_DEVICE constexpr int ValuesOfThread() {
  return kMapping == Mapping::kRows ? static_cast<int>(16 / sizeof(T)) : 1;
}
// Planes whose coefficients a block of an element-wise operation holds in shared memory, at most.
inline constexpr int kMaxPlanes = 512;

// The plan of a reduction over each channel. Blocks form a matrix of `tiles` (of channels) x `splits` (of values); in
// one, threads form a matrix of `members` x `tile_columns`, and a member's values are added in the order of memory.
// A split works on batches split, split + splits, ... of members * unroll vectors.
struct ReducePlan {
  Mapping mapping = Mapping::kRows;
  int64_t size = 0;
  int64_t channels = 0;
  // kRows: vectors in a row, whole rows, elements after them, and how often a channel occurs in a row.
  int64_t columns = 0;
  int64_t rows = 0;
  int64_t tail = 0;
  int replicas = 1;
  // kPlanes: elements in a plane, and vectors that a plane can touch; `units` = batch * vectors of one channel.
  int64_t spatial = 0;
  int64_t units = 0;
  FastDivide vectors_per_plane;
  bool small = false;  // Places in the tensor, and units, have 31 bits.
  bool whole = false;  // Planes are whole vectors, and units < 2^31: nearly all tensors but those with 7 x 7 planes.
  // Common.
  int vector_width = 1;
  int unroll = 1;
  int tile_columns = 1;  // kRows: vectors; kPlanes: channels.
  int tile_values = 1;   // Channels of a tile, replicas counted: tile_columns * vector_width, or tile_columns.
  int members = 1;
  int64_t batches = 0;
  int64_t tiles = 1;
  int splits = 1;
  // Values of each channel, of the whole tensor.
  int64_t count = 0;
  // A tile's channels have two sums each: its accumulators. The sums of a tile's splits are added up by groups of
  // `group`, then the groups; at once if groups == 1. As many threads share the adding of one accumulator, over a
  // block's members and over slots in memory.
  int accumulators = kReduceSums;
  int group = 1;
  int groups = 1;
  int member_helpers = 1;
  int slot_helpers = 1;
  // Divisions by tile_columns (kRows) or members (kPlanes); by tile_columns; by tile_values; by group; by accumulators;
  // and by accumulators (kRows) or member_helpers (kPlanes).
  FastDivide divide_place;
  FastDivide divide_columns;
  FastDivide divide_values;
  FastDivide divide_group;
  FastDivide divide_accumulators;
  FastDivide divide_member_helpers;

  SYNCBN_HOST_DEVICE int threads() const { return members * tile_columns; }
  int64_t blocks() const { return tiles * splits; }
};

// `tensors`: the number of tensors read, 1 (statistics) or 2 (backward).
ReducePlan PlanReduce(const TensorShape& shape, int tensors);

// Bytes of workspace that a reduction with this plan uses, and the part of it, at the front, that holds counters.
inline constexpr size_t kCounterBytes = 8192;
size_t WorkspaceBytes(const ReducePlan& plan);

// The number of planes that meet in a vector of an element-wise operation: one, up to two, or more.
enum class Meeting : uint8_t { kNever = 0, kOfTwo = 1, kOfMany = 2 };

// The plan of an element-wise operation.
struct ElementPlan {
  Mapping mapping = Mapping::kRows;
  int64_t size = 0;
  int64_t channels = 0;
  int vector_width = 1;
  int unroll = 1;
  int64_t tiles = 1;
  int splits = 1;
  int block_threads = 0;
  // kRows, as above.
  int64_t columns = 0;
  int64_t rows = 0;
  int64_t tail = 0;
  int tile_columns = 1;
  int members = 1;
  int64_t batches = 0;
  FastDivide divide_place;
  // kPlanes: a tile is `tile_elements` consecutive elements, which touch at most `max_planes` planes; one split.
  int64_t spatial = 0;
  FastDivide divide_spatial;
  FastDivide divide_channels;
  Meeting meeting = Meeting::kNever;
  int tile_elements = 0;
  int max_planes = 0;

  // 0 for a tensor without elements.
  int64_t blocks() const { return tiles * splits; }
};

// `vector_width` is VectorWidth(type), or 8 for a forward pass that writes a ReLU mask: a thread then owns whole bytes
// of it. `bytes`: the bytes read for a vector, of all tensors.
ElementPlan PlanElement(const TensorShape& shape, int vector_width, int bytes);

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_PLAN_H_
