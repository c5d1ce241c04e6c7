// The frame of the two element-wise operations: the vectors of each thread, and the place of its coefficients.
//
// An operation `Op` has
//   kWidth, kBytes         elements of a vector, and bytes that are read for one;
//   Lane                   the coefficients of a channel, and LaneAt(channel), which makes them from float64;
//   Input                  the data read for a vector, and Read(first, &input);
//   Write(first, input, lane_of)   computes and stores a vector; lane_of(i) is the Lane of its element i.
//
// A lane is a struct of values of type A alone.
//
// Rows: a thread stays in its column, so its coefficients stay in registers; a block makes each of them once, and its
// threads find theirs in shared memory. Planes: a block takes a run of up to 16 KB and keeps the coefficients of the
// planes in it in shared memory; which plane an element is in costs a multiplication. In both the first vectors are
// asked for before the coefficients, so that all are under way at once.
// Both go backwards through memory: the reduction that came before went forwards, so the end of the tensor is what the
// cache still holds.
// Every element is computed by one thread from its own inputs, so there is no order that could matter.

#ifndef SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_
#define SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

template <typename Op, int kUnroll>
struct ElementState {
  typename Op::Input input[kUnroll];
};

// Bytes of shared memory that an operation's blocks need.
template <typename Op>
size_t ElementSharedBytes(const ElementPlan& plan) {
  const int lanes = plan.mapping == Mapping::kRows ? plan.tile_columns * plan.vector_width : plan.max_planes;
  return lanes * sizeof(typename Op::Lane);
}

// The lanes of a tile's values in shared memory, each of their members by itself, so that a thread reads those of its
// column in whole vectors.
template <typename Op>
class TileLanes {
  using Lane = typename Op::Lane;
  using A = typename Op::A;

 public:
  SYNCBN_HOST_DEVICE TileLanes(double* shared, const ElementPlan& plan)
      : members_(reinterpret_cast<A*>(shared)), values_(plan.tile_columns * Op::kWidth) {}

  SYNCBN_HOST_DEVICE void Store(int value, const Lane& lane) const {
    const Parts parts = BitCast<Parts>(lane);
#pragma unroll
    for (int k = 0; k < kParts; ++k) members_[k * values_ + value] = parts.part[k];
  }

  SYNCBN_HOST_DEVICE void Load(int column, Lane* lanes) const {
    Parts parts[Op::kWidth];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      Vector<A, Op::kWidth> vector;
      memcpy(vector.words, __builtin_assume_aligned(members_ + k * values_ + column * Op::kWidth, 16),
             sizeof(vector.words));
#pragma unroll
      for (int v = 0; v < Op::kWidth; ++v) parts[v].part[k] = vector.Get(v);
    }
#pragma unroll
    for (int v = 0; v < Op::kWidth; ++v) lanes[v] = BitCast<Lane>(parts[v]);
  }

 private:
  static constexpr int kParts = static_cast<int>(sizeof(Lane) / sizeof(A));
  struct Parts {
    A part[kParts];
  };

  A* const members_;
  const int values_;
};

template <typename Op, typename Block>
SYNCBN_HOST_DEVICE inline void ElementsOfRows(Block& block, const ElementPlan& plan, const Op& op) {
  constexpr int kWidth = Op::kWidth;
  constexpr int kUnroll = Unroll(Mapping::kRows, Op::kBytes);
  using State = typename Block::StateType;
  const TileLanes<Op> tile_lanes(block.shared(), plan);
  const int64_t first_column = block.tile() * plan.tile_columns;
  // Calls f(u, first) for the vectors of a batch in a thread's column, first being a vector's first element.
  const auto each_vector = [&](int64_t batch, int member, int64_t column, auto f) {
    const int64_t row = batch * plan.members * kUnroll + member;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * plan.members;
      if (r < plan.rows) f(u, (r * plan.columns + column) * kWidth);
    }
  };
  const int64_t first_batch = plan.batches - 1 - block.split();
  block.Each([&](int thread, State& state) {
    const int member = static_cast<int>(plan.divide_place.Small(static_cast<uint32_t>(thread)));
    const int64_t column = first_column + thread - member * plan.tile_columns;
    if (first_batch >= 0 && column < plan.columns) {
      each_vector(first_batch, member, column, [&](int u, int64_t first) { op.Read(first, &state.input[u]); });
    }
    for (int value = thread; value < plan.tile_columns * kWidth; value += plan.block_threads) {
      const int64_t channel = first_column * kWidth + value;
      if (channel < plan.columns * kWidth) {
        tile_lanes.Store(value, op.LaneAt(channel < plan.channels ? channel : channel % plan.channels));
      }
    }
  });
  block.Each([&](int thread, State& state) {
    const int member = static_cast<int>(plan.divide_place.Small(static_cast<uint32_t>(thread)));
    const int in_tile = thread - member * plan.tile_columns;
    const int64_t column = first_column + in_tile;
    if (column >= plan.columns) return;
    typename Op::Lane lanes[kWidth];
    tile_lanes.Load(in_tile, lanes);
    const auto lane_of = [&lanes](int v) { return lanes[v]; };
    // Written so, since nvcc puts the vectors into memory if the loop ends with the reading.
    for (int64_t batch = first_batch; batch >= 0; batch -= plan.splits) {
      if (batch != first_batch) {
        each_vector(batch, member, column, [&](int u, int64_t first) { op.Read(first, &state.input[u]); });
      }
      each_vector(batch, member, column, [&](int u, int64_t first) { op.Write(first, state.input[u], lane_of); });
    }
    if (block.split() == 0 && member == 0 && column * kWidth < plan.tail) {
      const int64_t first = (plan.rows * plan.columns + column) * kWidth;
      op.Read(first, &state.input[0]);
      op.Write(first, state.input[0], lane_of);
    }
  });
}

template <typename Op, typename Block>
SYNCBN_HOST_DEVICE inline void ElementsOfPlanes(Block& block, const ElementPlan& plan, const Op& op) {
  constexpr int kWidth = Op::kWidth;
  constexpr int kUnroll = Unroll(Mapping::kPlanes, Op::kBytes);
  using State = typename Block::StateType;
  using Lane = typename Op::Lane;
  Lane* const lanes = reinterpret_cast<Lane*>(block.shared());
  const int64_t begin = (plan.tiles - 1 - block.tile()) * plan.tile_elements;
  const int64_t end = begin + plan.tile_elements < plan.size ? begin + plan.tile_elements : plan.size;
  const int64_t first_plane = plan.divide_spatial(begin);
  const int64_t last = plan.divide_spatial(end - 1) - first_plane;  // The tile's last plane, from its first on.
  block.Each([&](int thread, State& state) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + (u * kMaxThreads + thread) * kWidth;
      if (first < end) op.Read(first, &state.input[u]);
    }
    for (int64_t p = thread; p <= last; p += kMaxThreads) {
      const int64_t plane = first_plane + p;
      lanes[p] = op.LaneAt(plane - plan.divide_channels(plane) * plan.channels);
    }
  });
  block.Each([&](int thread, State& state) {
    const int64_t offset = begin - first_plane * plan.spatial;  // The tile's offset in its first plane.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + (u * kMaxThreads + thread) * kWidth;
      if (first >= end) continue;
      const int64_t within = offset + (first - begin);
      const int64_t plane = plan.divide_spatial(within);
      const int64_t left = (plane + 1) * plan.spatial - within;  // Elements left in this plane.
      if (plan.meeting == Meeting::kNever) {
        const Lane lane = lanes[plane];
        op.Write(first, state.input[u], [&lane](int) { return lane; });
      } else if (plan.meeting == Meeting::kOfTwo) {
        // All threads go this way, be there a second plane in their vector or not.
        const Lane lane = lanes[plane];
        const Lane next = lanes[plane < last ? plane + 1 : last];
        op.Write(first, state.input[u], [&](int v) { return v < left ? lane : next; });
      } else {
        op.Write(first, state.input[u], [&](int v) {
          const int64_t p = plan.divide_spatial(within + v);
          return lanes[p < last ? p : last];  // Elements past the end of the tensor are computed and not stored.
        });
      }
    }
  });
}

// The work of one block.
template <Mapping kMapping, typename Op, typename Block>
SYNCBN_HOST_DEVICE inline void ElementsOfBlock(Block& block, const ElementPlan& plan, const Op& op) {
  if constexpr (kMapping == Mapping::kRows) {
    ElementsOfRows(block, plan, op);
  } else {
    ElementsOfPlanes(block, plan, op);
  }
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_
