// The division of an operation's work into units. A plan depends on the shape alone, never on the number of threads or
// on the machine, and partial results are merged in the order of the plan, so results are equal for any number of
// threads.

#ifndef SYNCBN_KERNELS_CPU_PLAN_H_
#define SYNCBN_KERNELS_CPU_PLAN_H_

#include <cstdint>

#include "kernels/batch_norm.h"

namespace syncbn::kernels::cpu {

// The most counters of a unit, channels last.
constexpr int64_t kMaxBlock = 128;

// Half-open.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// A reduction over part of a tensor, seen as [rows, width, columns] in memory: `width` counters side by side, each
// reducing rows * columns values. Channels first: rows is the batch, columns the spatial extent. Channels last: columns
// is 1 and width the number of channels, or a small multiple (`fold`) of it, where adjacent rows are taken as one so
// that they fill whole vectors; counter j then belongs to channel j % channels.
//
// A *chunk* is a range of rows by a range of columns that fits the first-level cache; a *split* is a run of chunks; a
// *unit*, which one thread does, is a split of a block of counters.
struct ReductionPlan {
  int64_t first_element = 0;  // The part's first element in the tensor.
  int64_t rows = 0;
  int64_t width = 0;
  int64_t columns = 1;
  int64_t fold = 1;
  bool counters_adjacent = false;  // columns == 1: vectors run over counters, not over one counter's values.

  int64_t chunk_rows = 1;
  int64_t chunk_columns = 1;
  int64_t chunks_per_split = 1;
  int64_t block = 1;  // Counters in a unit.

  int64_t end_element() const { return first_element + rows * width * columns; }
  int64_t column_chunks() const;
  int64_t chunks() const;
  int64_t splits() const;
  int64_t blocks() const;
  int64_t units() const { return splits() * blocks(); }

  int64_t SplitOf(int64_t unit) const { return unit / blocks(); }
  Range CountersOf(int64_t unit) const;
  Range ChunksOf(int64_t split) const;
  Range RowsOf(int64_t chunk) const;
  Range ColumnsOf(int64_t chunk) const;
  // Returns the number of values that each counter sees in a chunk.
  int64_t CountOf(int64_t chunk) const { return RowsOf(chunk).size() * ColumnsOf(chunk).size(); }
  int64_t CountOfSplit(int64_t split) const;
};

// A tensor's reduction: the body, and the few rows that folding leaves over (rows == 0 if none).
struct Reduction {
  ReductionPlan body;
  ReductionPlan rest;
};

Reduction PlanReduction(const TensorShape& shape);

// Tells whether a reduction computes in float32: of all types but float64, where each channel has so many values that
// the rounding errors, of which there are hundreds then, cancel. Of float32 statistics these are differences alone.
bool ReducesInFloat32(const TensorShape& shape);

// An elementwise operation over a tensor of `size` elements: units are runs of elements in memory order that begin at
// multiples of 8, so that no two units share a byte of a bit mask. Coefficients lie in a table: those of element i are
// entry (i / repeat) % period.
struct ElementwisePlan {
  int64_t size = 0;
  int64_t repeat = 1;  // Channels first: the spatial extent.
  int64_t period = 1;  // The number of channels, or a multiple of it where that is small and repeat is 1.

  static constexpr int64_t kUnit = int64_t{1} << 15;

  int64_t units() const { return (size + kUnit - 1) / kUnit; }
  Range ElementsOf(int64_t unit) const;
};

ElementwisePlan PlanElementwise(const TensorShape& shape);

}  // namespace syncbn::kernels::cpu

#endif  // SYNCBN_KERNELS_CPU_PLAN_H_
