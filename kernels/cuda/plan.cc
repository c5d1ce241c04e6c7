#include "kernels/cuda/plan.h"

#include <algorithm>
#include <numeric>

#include "kernels/cuda/batch_norm.h"

namespace syncbn::kernels::cuda {
namespace {

// Blocks to aim for. An H100 or H200 has 132 multiprocessors; other models run the same blocks in more waves or fewer.
constexpr int64_t kProcessors = 132;
constexpr int64_t ReduceBlocks(Mapping mapping) { return kProcessors * BlocksPerSm(mapping); }
constexpr int64_t kMaxTileColumns = SYNCBN_TUNE_TILE_COLUMNS;
// The same of an element-wise operation, whose blocks need no meeting.
constexpr int64_t kElementTileColumns = 16;
constexpr int64_t kMaxSplits = 65535;  // The second extent of a grid.
constexpr int kMergeAtOnce = SYNCBN_TUNE_MERGE_AT_ONCE;
constexpr int kMergeGroup = 16;
// No tile has more accumulators than a block has threads.
static_assert(kMaxTileColumns * kMaxTileColumns <= kMaxThreads, "a column of 16-bit values has 16 accumulators");

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool IsRows(const TensorShape& shape) { return shape.layout == Layout::kChannelsLast || shape.spatial <= 1; }

// The matrix of vectors that kRows works on.
template <typename Plan>
void SetRows(const TensorShape& shape, int width, int unroll, int64_t most_columns, Plan* plan) {
  const int64_t row_elements = std::lcm(shape.channels, static_cast<int64_t>(width));
  plan->columns = row_elements / width;
  plan->rows = shape.size() / row_elements;
  plan->tail = shape.size() % row_elements;
  plan->tiles = CeilDiv(plan->columns, most_columns);
  plan->tile_columns = static_cast<int>(CeilDiv(plan->columns, plan->tiles));
  plan->tiles = CeilDiv(plan->columns, plan->tile_columns);
  plan->members = kMaxThreads / plan->tile_columns;
  plan->batches = CeilDiv(plan->rows, int64_t{plan->members} * unroll);
  plan->divide_place = FastDivide::By(plan->tile_columns);
}

// Blocks of a reduction that share a tile's batches: each has a few, but in rows one is enough if there are more
// processors than blocks. (A channel in planes that fits one block needs no meeting of blocks.)
int Splits(Mapping mapping, int64_t tiles, int64_t batches) {
  int64_t useful = std::max<int64_t>(1, CeilDiv(batches, SYNCBN_TUNE_LEAST_BATCHES));
  if (mapping == Mapping::kRows) useful = std::max(useful, std::min(batches, CeilDiv(kProcessors, tiles)));
  return static_cast<int>(std::clamp<int64_t>(ReduceBlocks(mapping) / tiles, 1, useful));
}

// Threads that share the adding of `terms` for each accumulator: the parts they leave are then no more than theirs.
int Helpers(int accumulators, int threads, int terms) {
  int helpers = 1;
  while (4 * helpers * helpers <= terms && 2 * helpers * accumulators <= threads) helpers *= 2;
  return helpers;
}

void SetPlanes(const TensorShape& shape, ReducePlan* plan) {
  const int64_t width = plan->vector_width;
  // A plane that starts on a vector's boundary whatever its channel touches spatial/width vectors, others one more.
  const int64_t vectors = shape.spatial % width == 0 ? shape.spatial / width : (shape.spatial + width - 2) / width + 1;
  int64_t lanes = 2;  // As many threads as accumulators.
  while (lanes < vectors && lanes < kMaxThreads) lanes *= 2;
  plan->tile_columns = static_cast<int>(std::min(kMaxThreads / lanes, shape.channels));
  plan->tiles = CeilDiv(shape.channels, plan->tile_columns);
  plan->members = kMaxThreads / plan->tile_columns;
  plan->divide_place = FastDivide::By(plan->members);
  plan->spatial = shape.spatial;
  plan->units = shape.batch * vectors;
  plan->vectors_per_plane = FastDivide::By(vectors);
  constexpr int64_t kMost = int64_t{1} << 30;  // A vector may reach beyond the end.
  plan->small = shape.size() < kMost && plan->units < kMost;
  plan->whole = shape.spatial % width == 0 && plan->units < (int64_t{1} << 31);
  plan->batches = CeilDiv(plan->units, int64_t{plan->members} * plan->unroll);
}

}  // namespace

ReducePlan PlanReduce(const TensorShape& shape, int tensors) {
  ReducePlan plan;
  plan.size = shape.size();
  plan.channels = shape.channels;
  plan.count = shape.batch * shape.spatial;
  plan.vector_width = VectorWidth(shape.type);
  if (IsRows(shape)) {
    plan.mapping = Mapping::kRows;
    plan.unroll = Unroll(Mapping::kRows, 16 * tensors);
    SetRows(shape, plan.vector_width, plan.unroll, kMaxTileColumns, &plan);
    plan.replicas = static_cast<int>(plan.columns * plan.vector_width / plan.channels);
    plan.tile_values = plan.tile_columns * plan.vector_width;
    plan.splits = Splits(Mapping::kRows, plan.tiles, plan.batches);
  } else {
    plan.mapping = Mapping::kPlanes;
    plan.unroll = Unroll(Mapping::kPlanes, 16 * tensors);
    SetPlanes(shape, &plan);
    plan.tile_values = plan.tile_columns;
    plan.splits = Splits(Mapping::kPlanes, plan.tiles, plan.batches);
  }
  plan.group = plan.splits > kMergeAtOnce ? kMergeGroup : plan.splits;
  plan.groups = static_cast<int>(CeilDiv(plan.splits, plan.group));
  plan.accumulators = plan.tile_values * kReduceSums;
  plan.member_helpers = Helpers(plan.accumulators, plan.threads(), plan.members);
  plan.slot_helpers = Helpers(plan.accumulators, plan.threads(), plan.group);
  plan.divide_columns = FastDivide::By(plan.tile_columns);
  plan.divide_values = FastDivide::By(plan.tile_values);
  plan.divide_group = FastDivide::By(plan.group);
  plan.divide_accumulators = FastDivide::By(plan.accumulators);
  plan.divide_member_helpers =
      plan.mapping == Mapping::kRows ? plan.divide_accumulators : FastDivide::By(plan.member_helpers);
  return plan;
}

size_t WorkspaceBytes(const ReducePlan& plan) {
  if (plan.splits == 1 && plan.replicas == 1) return kCounterBytes;
  // The accumulators of each split, of each group, and of each tile.
  const size_t slots = plan.tiles * (int64_t{plan.splits} + plan.groups + 1);
  return kCounterBytes + slots * plan.accumulators * sizeof(double);
}

size_t WorkspaceBytes(const TensorShape& shape) {
  return std::max(WorkspaceBytes(PlanReduce(shape, 1)), WorkspaceBytes(PlanReduce(shape, 2)));
}

ElementPlan PlanElement(const TensorShape& shape, int vector_width, int bytes) {
  ElementPlan plan;
  plan.size = shape.size();
  plan.channels = shape.channels;
  plan.vector_width = vector_width;
  plan.mapping = IsRows(shape) ? Mapping::kRows : Mapping::kPlanes;
  plan.unroll = Unroll(plan.mapping, bytes);
  if (plan.mapping == Mapping::kRows) {
    SetRows(shape, vector_width, plan.unroll, kElementTileColumns, &plan);
    // A batch for each block, so that it does not matter how many of them a processor takes at a time.
    plan.splits = static_cast<int>(std::clamp<int64_t>(plan.batches, 1, kMaxSplits));
    plan.block_threads = plan.members * plan.tile_columns;
    if (plan.size == 0) plan.tiles = 0;
    return plan;
  }
  plan.spatial = shape.spatial;
  plan.divide_spatial = FastDivide::By(shape.spatial);
  plan.divide_channels = FastDivide::By(shape.channels);
  if (shape.spatial % vector_width != 0) {
    plan.meeting = shape.spatial >= vector_width ? Meeting::kOfTwo : Meeting::kOfMany;
  }
  // A thread has fewer vectors if there were fewer blocks than processors can hold otherwise.
  const int64_t vectors = CeilDiv(plan.size, int64_t{vector_width} * kMaxThreads);
  const int64_t each = std::clamp<int64_t>(vectors / (2 * kProcessors), 1, plan.unroll);
  const int64_t fits = (kMaxPlanes - 2) * shape.spatial / vector_width * vector_width;  // A multiple of the vector.
  plan.tile_elements = static_cast<int>(std::min(each * kMaxThreads * vector_width, fits));
  plan.max_planes = static_cast<int>(std::min<int64_t>(kMaxPlanes, plan.tile_elements / shape.spatial + 2));
  plan.block_threads = kMaxThreads;
  plan.tiles = CeilDiv(plan.size, plan.tile_elements);
  return plan;
}

}  // namespace syncbn::kernels::cuda
