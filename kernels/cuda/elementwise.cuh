// The frame of the two element-wise operations: the vectors of each thread, and the place of its coefficients.
//
// An operation `Op` has
//   kWidth, kBytes         elements of a vector, and bytes that are read for one;
//   Lane                   the coefficients of a channel, and LaneAt(channel), which makes them from float64;
//   Input                  the data read for a vector, and Read(first, &input);
//   Write(first, input, lane_of)   computes and stores a vector; lane_of(i) is the Lane of its element i.
//
// Rows: a thread stays in its column, so its coefficients stay in registers. Planes: a block takes a run of up to 16 KB
// and keeps the coefficients of the planes in it in shared memory; which plane an element is in costs a multiplication.
// Both go backwards through memory: the reduction that came before went forwards, so the end of the tensor is what the
// cache still holds.
// Every element is computed by one thread from its own inputs, so there is no order that could matter.

#ifndef SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_
#define SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_

#include <cstdint>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/coefficients.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

template <typename Op, int kUnroll>
struct ElementState {
  typename Op::Input input[kUnroll];
};

template <typename Op>
SYNCBN_HOST_DEVICE inline void ElementsOfColumn(const ElementPlan& plan, const Op& op, int64_t tile, int split,
                                                int thread) {
  constexpr int kWidth = Op::kWidth;
  constexpr int kUnroll = Unroll(Mapping::kRows, Op::kBytes);
  const int member = static_cast<int>(plan.divide_place.Small(static_cast<uint32_t>(thread)));
  const int64_t column = (tile - member) * plan.tile_columns + thread;
  if (column >= plan.columns) return;
  typename Op::Lane lanes[kWidth];
  EachChannelOfColumn<kWidth>(plan, column, [&](int v, int64_t channel) { lanes[v] = op.LaneAt(channel); });
  const auto lane_of = [&lanes](int v) { return lanes[v]; };
  if (split == 0 && member == 0 && column * kWidth < plan.tail) {
    typename Op::Input input;
    const int64_t first = (plan.rows * plan.columns + column) * kWidth;
    op.Read(first, &input);
    op.Write(first, input, lane_of);
  }
  for (int64_t batch = plan.batches - 1 - split; batch >= 0; batch -= plan.splits) {
    const int64_t row = batch * plan.members * kUnroll + member;
    typename Op::Input input[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * plan.members;
      if (r < plan.rows) op.Read((r * plan.columns + column) * kWidth, &input[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * plan.members;
      if (r < plan.rows) op.Write((r * plan.columns + column) * kWidth, input[u], lane_of);
    }
  }
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
  const int64_t first_plane = begin / plan.spatial;
  const int64_t offset = begin - first_plane * plan.spatial;  // The tile's offset in its first plane.
  block.Each([&](int thread, State& state) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + (u * kMaxThreads + thread) * kWidth;
      if (first < end) op.Read(first, &state.input[u]);
    }
    const int planes = static_cast<int>((end - 1) / plan.spatial - first_plane) + 1;
    for (int p = thread; p < planes; p += kMaxThreads) lanes[p] = op.LaneAt((first_plane + p) % plan.channels);
  });
  block.Each([&](int thread, State& state) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + (u * kMaxThreads + thread) * kWidth;
      if (first >= end) continue;
      const int64_t within = offset + (first - begin);
      const int64_t plane = plan.divide_spatial(within);
      const int64_t left = (plane + 1) * plan.spatial - within;  // Elements left in this plane.
      if (left >= kWidth) {
        const Lane lane = lanes[plane];
        op.Write(first, state.input[u], [&lane](int) { return lane; });
      } else {
        const int64_t last = (end - 1) / plan.spatial - first_plane;
        op.Write(first, state.input[u], [&](int v) {
          const int64_t p = plan.divide_spatial(within + v);
          return lanes[p < last ? p : last];  // Elements past the end of the tensor are computed and not stored.
        });
      }
    }
  });
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_ELEMENTWISE_CUH_
