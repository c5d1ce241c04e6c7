#include "kernels/cuda/plan.h"

#include <algorithm>
#include <numeric>

#include "kernels/cuda/batch_norm.h"

namespace syncbn::kernels::cuda {
namespace {

// Blocks to aim for. An H100 or H200 has 132 multiprocessors; other models run the same blocks in more waves or fewer.
constexpr int64_t kProcessors = 132;
constexpr int64_t ReduceBlocks(Mapping mapping) { return kProcessors * BlocksPerSm(mapping); }
constexpr int64_t kRowElementBlocks = 4 * kProcessors * BlocksPerSm(Mapping::kRows);
constexpr int64_t kMaxTileColumns = SYNCBN_TUNE_TILE_COLUMNS;
constexpr int kMergeAtOnce = SYNCBN_TUNE_MERGE_AT_ONCE;
constexpr int kMergeGroup = 16;
// Threads that share the merging of one accumulator, at most.
constexpr int kMaxHelpers = 16;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool IsRows(const TensorShape& shape) { return shape.layout == Layout::kChannelsLast || shape.spatial <= 1; }

// The matrix of vectors that kRows works on.
template <typename Plan>
void SetRows(const TensorShape& shape, int width, int unroll, Plan* plan) {
  const int64_t row_elements = std::lcm(shape.channels, static_cast<int64_t>(width));
  plan->columns = row_elements / width;
  plan->rows = shape.size() / row_elements;
  plan->tail = shape.size() % row_elements;
  plan->tiles = CeilDiv(plan->columns, kMaxTileColumns);
  plan->tile_columns = static_cast<int>(CeilDiv(plan->columns, plan->tiles));
  plan->tiles = CeilDiv(plan->columns, plan->tile_columns);
  plan->members = kMaxThreads / plan->tile_columns;
  plan->batches = CeilDiv(plan->rows, int64_t{plan->members} * unroll);
  plan->divide_place = FastDivide::By(plan->tile_columns);
}

int Splits(int64_t target, int64_t tiles, int64_t batches) {
  const int64_t useful = std::max<int64_t>(1, CeilDiv(batches, SYNCBN_TUNE_LEAST_BATCHES));
  return static_cast<int>(std::clamp<int64_t>(target / tiles, 1, useful));
}

void SetPlanes(const TensorShape& shape, ReducePlan* plan) {
  const int64_t width = plan->vector_width;
  // A plane that starts on a vector's boundary whatever its channel touches spatial/width vectors, others one more.
  const int64_t vectors = shape.spatial % width == 0 ? shape.spatial / width : (shape.spatial + width - 2) / width + 1;
  int64_t lanes = 1;
  while (lanes < vectors && lanes < kMaxThreads) lanes *= 2;
  plan->tile_columns = static_cast<int>(std::min(kMaxThreads / lanes, shape.channels));
  plan->tiles = CeilDiv(shape.channels, plan->tile_columns);
  plan->members = kMaxThreads / plan->tile_columns;
  plan->divide_place = FastDivide::By(plan->members);
  plan->spatial = shape.spatial;
  plan->units = shape.batch * vectors;
  plan->vectors_per_plane = FastDivide::By(vectors);
  plan->whole = shape.spatial % width == 0 && plan->units < (int64_t{1} << 31);
  plan->batches = CeilDiv(plan->units, int64_t{plan->members} * plan->unroll);
}

}  // namespace

ReducePlan PlanReduce(const TensorShape& shape, int tensors) {
  ReducePlan plan;
  plan.size = shape.size();
  plan.channels = shape.channels;
  plan.vector_width = VectorWidth(shape.type);
  if (IsRows(shape)) {
    plan.mapping = Mapping::kRows;
    plan.unroll = Unroll(Mapping::kRows, 16 * tensors);
    SetRows(shape, plan.vector_width, plan.unroll, &plan);
    plan.replicas = static_cast<int>(plan.columns * plan.vector_width / plan.channels);
    plan.tile_values = plan.tile_columns * plan.vector_width;
    plan.splits = Splits(ReduceBlocks(Mapping::kRows), plan.tiles, plan.batches);
  } else {
    plan.mapping = Mapping::kPlanes;
    plan.unroll = Unroll(Mapping::kPlanes, 16 * tensors);
    SetPlanes(shape, &plan);
    plan.tile_values = plan.tile_columns;
    plan.splits = Splits(ReduceBlocks(Mapping::kPlanes), plan.tiles, plan.batches);
  }
  plan.group = plan.splits > kMergeAtOnce ? kMergeGroup : plan.splits;
  plan.groups = static_cast<int>(CeilDiv(plan.splits, plan.group));
  plan.helpers = std::min(kMaxHelpers, plan.threads() / plan.tile_values);
  plan.divide_values = FastDivide::By(plan.tile_values);
  plan.divide_group = FastDivide::By(plan.group);
  return plan;
}

size_t WorkspaceBytes(const ReducePlan& plan) {
  if (plan.splits == 1 && plan.replicas == 1) return kCounterBytes;
  // Three doubles for each accumulator of each split, of each group, and of each tile.
  const size_t slots = plan.tiles * (int64_t{plan.splits} + plan.groups + 1);
  return kCounterBytes + slots * plan.tile_values * 3 * sizeof(double);
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
    SetRows(shape, vector_width, plan.unroll, &plan);
    plan.splits = Splits(kRowElementBlocks, plan.tiles, plan.batches);
    plan.block_threads = plan.members * plan.tile_columns;
    if (plan.size == 0) plan.tiles = 0;
    return plan;
  }
  plan.spatial = shape.spatial;
  plan.divide_spatial = FastDivide::By(shape.spatial);
  const int64_t most = int64_t{kMaxThreads} * plan.unroll * vector_width;
  const int64_t fits = (kMaxPlanes - 2) * shape.spatial / vector_width * vector_width;  // A multiple of the vector.
  plan.tile_elements = static_cast<int>(std::min(most, fits));
  plan.max_planes = static_cast<int>(std::min<int64_t>(kMaxPlanes, plan.tile_elements / shape.spatial + 2));
  plan.block_threads = kMaxThreads;
  plan.tiles = CeilDiv(plan.size, plan.tile_elements);
  return plan;
}

}  // namespace syncbn::kernels::cuda
