#include "kernels/cpu/plan.h"

#include <algorithm>
#include <numeric>

namespace syncbn::kernels::cpu {
namespace {

constexpr int64_t kLanes = 8;                    // Lanes of the logical vector.
constexpr int64_t kChunkValues = 8192;           // Values of one channel, channels first.
constexpr int64_t kChunkElements = 1024;         // Elements of a block of channels, channels last.
constexpr int64_t kSingleLanes = 16;             // Lanes of the logical vector, and elements of such a block, where
constexpr int64_t kSingleChunkElements = 32768;  // a reduction adds up in float32.
constexpr int64_t kSingleValues = 256;           // The fewest values of a channel that it does so for.
constexpr int64_t kUnitElements = int64_t{1} << 15;
constexpr int64_t kUnits = 256;  // The most units where they would be small: enough for any host's cores.

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// Splits the chunks so that there are about kUnits units, none much under kUnitElements.
void ChooseSplits(ReductionPlan* plan) {
  const int64_t chunks = plan->chunks();
  if (chunks == 0) return;
  const int64_t wanted = std::max<int64_t>(1, kUnits / plan->blocks());
  const int64_t chunk_elements = plan->chunk_rows * plan->chunk_columns * plan->block;
  plan->chunks_per_split = std::max(CeilDiv(chunks, wanted), CeilDiv(kUnitElements, chunk_elements));
}

ReductionPlan PlanChannelsFirst(int64_t batch, int64_t channels, int64_t spatial) {
  ReductionPlan plan;
  plan.rows = spatial == 0 ? 0 : batch;
  plan.width = channels;
  plan.columns = std::max<int64_t>(spatial, 1);
  const int64_t pieces = CeilDiv(plan.columns, kChunkValues);
  plan.chunk_columns = std::min(plan.columns, CeilDiv(CeilDiv(plan.columns, pieces), kLanes) * kLanes);
  plan.chunk_rows = std::max<int64_t>(1, std::min(plan.rows, kChunkValues / plan.chunk_columns));
  // As many channels as lie side by side in a unit's memory: one channel's rows lie far apart.
  const int64_t row_elements = plan.chunk_rows * plan.columns;
  plan.block = std::clamp<int64_t>(kUnitElements / row_elements, 1, channels);
  ChooseSplits(&plan);
  return plan;
}

ReductionPlan PlanChannelsLast(int64_t first_element, int64_t rows, int64_t channels, int64_t fold,
                               int64_t chunk_elements) {
  ReductionPlan plan;
  plan.first_element = first_element;
  plan.rows = rows;
  plan.width = channels * fold;
  plan.fold = fold;
  plan.counters_adjacent = true;
  plan.block = std::min(plan.width, kMaxBlock);
  plan.chunk_rows = std::clamp<int64_t>(chunk_elements / plan.block, 1, 256);
  ChooseSplits(&plan);
  return plan;
}

}  // namespace

int64_t ReductionPlan::column_chunks() const { return CeilDiv(columns, chunk_columns); }
int64_t ReductionPlan::chunks() const { return CeilDiv(rows, chunk_rows) * column_chunks(); }
int64_t ReductionPlan::splits() const { return CeilDiv(chunks(), chunks_per_split); }
int64_t ReductionPlan::blocks() const { return CeilDiv(width, block); }

Range ReductionPlan::CountersOf(int64_t unit) const {
  const int64_t begin = unit % blocks() * block;
  return {begin, std::min(begin + block, width)};
}

Range ReductionPlan::ChunksOf(int64_t split) const {
  const int64_t begin = split * chunks_per_split;
  return {begin, std::min(begin + chunks_per_split, chunks())};
}

Range ReductionPlan::RowsOf(int64_t chunk) const {
  const int64_t begin = chunk / column_chunks() * chunk_rows;
  return {begin, std::min(begin + chunk_rows, rows)};
}

Range ReductionPlan::ColumnsOf(int64_t chunk) const {
  const int64_t begin = chunk % column_chunks() * chunk_columns;
  return {begin, std::min(begin + chunk_columns, columns)};
}

int64_t ReductionPlan::CountOfSplit(int64_t split) const {
  int64_t count = 0;
  const Range range = ChunksOf(split);
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) count += CountOf(chunk);
  return count;
}

Reduction PlanReduction(const TensorShape& shape) {
  Reduction reduction;
  const int64_t values = shape.values_per_channel();
  if (shape.channels == 1) {
    reduction.body = PlanChannelsFirst(1, 1, values);
    return reduction;
  }
  if (shape.layout == Layout::kChannelsFirst && shape.spatial != 1) {
    reduction.body = PlanChannelsFirst(shape.batch, shape.channels, shape.spatial);
    return reduction;
  }
  const int64_t channels = shape.channels;
  const bool single = ReducesInFloat32(shape);
  const int64_t lanes = single ? kSingleLanes : kLanes;
  const int64_t chunk_elements = single ? kSingleChunkElements : kChunkElements;
  int64_t fold = channels < 8 * kLanes ? lanes / std::gcd(channels, lanes) : 1;
  if (values < fold) fold = 1;
  const int64_t rest = values % fold;
  reduction.body = PlanChannelsLast(0, values / fold, channels, fold, chunk_elements);
  reduction.rest = PlanChannelsLast((values - rest) * channels, rest, channels, 1, chunk_elements);
  return reduction;
}

bool ReducesInFloat32(const TensorShape& shape) {
  return shape.type != DataType::kFloat64 && shape.values_per_channel() >= kSingleValues;
}

Range ElementwisePlan::ElementsOf(int64_t unit) const {
  const int64_t begin = unit * kUnit;
  return {begin, std::min(begin + kUnit, size)};
}

ElementwisePlan PlanElementwise(const TensorShape& shape) {
  ElementwisePlan plan;
  plan.size = shape.size();
  plan.period = shape.channels;
  if (shape.channels == 1) {
    plan.repeat = std::max<int64_t>(plan.size, 1);
  } else if (shape.layout == Layout::kChannelsFirst) {
    plan.repeat = std::max<int64_t>(shape.spatial, 1);
  }
  // A table of a few hundred entries, whole vectors long, keeps the inner loop from ending every few elements.
  constexpr int64_t kTable = 256;
  if (plan.repeat == 1 && shape.channels < kTable) {
    const int64_t whole = shape.channels * (kLanes / std::gcd(shape.channels, kLanes));
    plan.period = whole * CeilDiv(kTable, whole);
  }
  return plan;
}

}  // namespace syncbn::kernels::cpu
