// The second half of a reduction over channels: from one partial result for each thread to one for each channel, in the
// launch that made them.
//
//   1. The members of a block, which hold partial results of the same channels, merge in a binary tree in shared
//      memory.
//   2. Each block writes its tile's partial results to the workspace and counts itself in. The last block of the tile
//      merges them, by index and not by arrival, so no bit of the result depends on which block is last. With many
//      splits the merging is done in two levels, so that one block does not read for long.
//   3. If a channel occurs in several columns (C not a multiple of the vector), the last of all blocks merges these.
//
// The only atomic operations count blocks, on integers. Counters return to 0 by themselves.

#ifndef SYNCBN_KERNELS_CUDA_REDUCE_CUH_
#define SYNCBN_KERNELS_CUDA_REDUCE_CUH_

#include <cstdint>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/moments.h"

namespace syncbn::kernels::cuda {

// Threads that write in one step of the tree, at most: half a block.
inline constexpr int kTreeSlots = kMaxThreads / 2;

// The memory through which a reduction's blocks tell each other their results, and the signal to the host.
struct ReduceWorkspace {
  uint32_t* counters = nullptr;  // [0] tiles, [1] tiles again for the signal, then one a tile, then one a group.
  double* partials = nullptr;
  volatile uint32_t* flag = nullptr;  // Receives flag_value once the results are written. Null: no signal.
  uint32_t flag_value = 0;
};

// A thread's place in its block's matrix. Neighbours in memory are neighbours in thread number: columns of a row, or
// members of a plane.
struct Place {
  int member = 0;
  int column = 0;
};

// A thread's partial results: kValues channels of Partial, which has kWords doubles, Combine(a, b), and
// CombineAll(partials, other) for all channels, where other(v, w) is word w of channel v. Its place is looked up where
// it is needed, by a multiplication: kept here, it would take registers from the loop over the tensor.
template <typename Partial, int kValues>
struct ReduceState {
  Partial partial[kValues];
};

template <typename Partial>
SYNCBN_HOST_DEVICE inline void StoreSlot(const Partial& partial, int64_t slot, int values, int value, double* base) {
#pragma unroll
  for (int w = 0; w < Partial::kWords; ++w) base[(slot * Partial::kWords + w) * values + value] = partial.word[w];
}

template <typename Partial>
SYNCBN_HOST_DEVICE inline Partial LoadSlot(const double* base, int64_t slot, int values, int value) {
  Partial partial;
#pragma unroll
  for (int w = 0; w < Partial::kWords; ++w) {
    partial.word[w] = LoadCoherent(base + (slot * Partial::kWords + w) * values + value);
  }
  return partial;
}

// The quotient and the rest of a thread's number by the divisor.
SYNCBN_HOST_DEVICE inline Place DivideThread(const FastDivide& divide, int thread) {
  const int quotient = static_cast<int>(divide.Small(static_cast<uint32_t>(thread)));
  return {quotient, thread - quotient * static_cast<int>(divide.divisor)};
}

template <Mapping kMapping>
SYNCBN_HOST_DEVICE inline Place PlaceOf(const ReducePlan& plan, int thread) {
  const Place at = DivideThread(plan.divide_place, thread);
  return kMapping == Mapping::kRows ? at : Place{at.column, at.member};
}

// Merges partial[0 .. kValues) over the members, by the threads' places, place(thread); the result is in member 0.
// Member m takes from m + s, for s = ..., 4, 2, 1. Threads whose member is not below `members` take no part.
template <int kValues, typename Partial, typename Block, typename PlaceOfThread>
SYNCBN_HOST_DEVICE inline void MergeMembers(Block& block, int members, int columns, PlaceOfThread place) {
  using State = typename Block::StateType;
  int stride = 1;
  while (stride * 2 < members) stride *= 2;
  for (; members > 1 && stride >= 1; stride /= 2) {
    block.Each([&](int thread, State& state) {
      const Place at = place(thread);
      if (at.member < stride || at.member >= members || at.member >= 2 * stride) return;
      const int slot = (at.member - stride) * columns + at.column;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
#pragma unroll
        for (int w = 0; w < Partial::kWords; ++w) {
          block.shared()[(v * Partial::kWords + w) * kTreeSlots + slot] = state.partial[v].word[w];
        }
      }
    });
    block.Each([&](int thread, State& state) {
      const Place at = place(thread);
      if (at.member >= stride || at.member + stride >= members) return;
      const double* const slot = block.shared() + at.member * columns + at.column;
      Partial::template CombineAll<kValues>(
          state.partial, [slot](int v, int w) { return slot[(v * Partial::kWords + w) * kTreeSlots]; });
    });
  }
}

// Merges `count` slots of the workspace from `first` on. The total of accumulator e is then in partial[0] of thread e.
template <typename Partial, typename Block>
SYNCBN_HOST_DEVICE inline void MergeSlots(Block& block, const ReducePlan& plan, const double* partials, int64_t first,
                                          int count) {
  using State = typename Block::StateType;
  const int values = plan.tile_values;
  const auto place = [&plan](int thread) { return DivideThread(plan.divide_values, thread); };
  block.Each([&](int thread, State& state) {
    const Place at = place(thread);
    Partial total = Partial::Empty();
    if (at.member < plan.helpers) {
#pragma unroll 2
      for (int i = at.member; i < count; i += plan.helpers) {
        total = Partial::Combine(total, LoadSlot<Partial>(partials, first + i, values, at.column));
      }
    }
    state.partial[0] = total;
  });
  MergeMembers<1, Partial>(block, plan.helpers, values, place);
}

// From member 0's partial[0 .. kValues) to partial[0] of thread e.
template <Mapping kMapping, int kValues, typename Partial, typename Block>
SYNCBN_HOST_DEVICE inline void SpreadValues(Block& block, const ReducePlan& plan) {
  using State = typename Block::StateType;
  block.Each([&](int thread, State& state) {
    const Place at = PlaceOf<kMapping>(plan, thread);
    if (at.member != 0) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
#pragma unroll
      for (int w = 0; w < Partial::kWords; ++w) {
        block.shared()[w * kMaxThreads + at.column * kValues + v] = state.partial[v].word[w];
      }
    }
  });
  block.Each([&](int thread, State& state) {
    if (thread >= plan.tile_values) return;
#pragma unroll
    for (int w = 0; w < Partial::kWords; ++w) {
      state.partial[0].word[w] = block.shared()[w * kMaxThreads + thread];
    }
  });
}

// Doubles of shared memory that the functions above need.
template <typename Partial, int kValues>
inline constexpr int kReduceSharedDoubles = Partial::kWords*(kValues > 2 ? kValues * kTreeSlots : kMaxThreads);

// Merges the splits of the block's tile, if this block is the last of them. True: the totals are in partial[0] of
// thread e. False: another block goes on.
template <Mapping kMapping, int kValues, typename Partial, typename Block>
SYNCBN_HOST_DEVICE inline bool MergeSplits(Block& block, const ReducePlan& plan, const ReduceWorkspace& workspace) {
  using State = typename Block::StateType;
  const int64_t tile = block.tile();
  const int split = block.split();
  if (plan.splits == 1) {
    SpreadValues<kMapping, kValues, Partial>(block, plan);
    return true;
  }
  block.Each([&](int thread, State& state) {
    const Place at = PlaceOf<kMapping>(plan, thread);
    if (at.member != 0) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      StoreSlot(state.partial[v], tile * plan.splits + split, plan.tile_values, at.column * kValues + v,
                workspace.partials);
    }
  });
  uint32_t* const tile_counter = workspace.counters + 2 + tile;
  if (plan.groups == 1) {
    if (!block.Arrive(tile_counter, plan.splits, false)) return false;
    MergeSlots<Partial>(block, plan, workspace.partials, tile * plan.splits, plan.splits);
    return true;
  }
  const int group = static_cast<int>(plan.divide_group.Small(static_cast<uint32_t>(split)));
  const int first = group * plan.group;
  const int in_group = plan.splits - first < plan.group ? plan.splits - first : plan.group;
  uint32_t* const group_counter = workspace.counters + 2 + plan.tiles + tile * plan.groups + group;
  if (!block.Arrive(group_counter, in_group, false)) return false;
  MergeSlots<Partial>(block, plan, workspace.partials, tile * plan.splits + first, in_group);
  const int64_t group_slots = plan.tiles * plan.splits + tile * plan.groups;
  block.Each([&](int thread, State& state) {
    if (thread >= plan.tile_values) return;
    StoreSlot(state.partial[0], group_slots + group, plan.tile_values, thread, workspace.partials);
  });
  if (!block.Arrive(tile_counter, plan.groups, false)) return false;
  MergeSlots<Partial>(block, plan, workspace.partials, group_slots, plan.groups);
  return true;
}

// Everything after the threads' own partial results. output(channel, total) is called once for each channel.
template <Mapping kMapping, int kValues, typename Partial, typename Block, typename Output>
SYNCBN_HOST_DEVICE inline void FinishReduction(Block& block, const ReducePlan& plan, const ReduceWorkspace& workspace,
                                               Output output) {
  using State = typename Block::StateType;
  MergeMembers<kValues, Partial>(block, plan.members, plan.tile_columns,
                                 [&plan](int thread) { return PlaceOf<kMapping>(plan, thread); });
  if (!MergeSplits<kMapping, kValues, Partial>(block, plan, workspace)) return;
  const int64_t tile = block.tile();
  const bool signals = workspace.flag != nullptr;
  if (plan.replicas == 1) {
    block.Each([&](int thread, State& state) {
      const int64_t channel = tile * plan.tile_values + thread;
      if (thread < plan.tile_values && channel < plan.channels) output(channel, state.partial[0]);
    });
    if (!signals || !block.Arrive(workspace.counters + 1, plan.tiles, true)) return;
  } else {
    const int64_t tile_slots = plan.tiles * (plan.splits + plan.groups);
    block.Each([&](int thread, State& state) {
      if (thread < plan.tile_values) {
        StoreSlot(state.partial[0], tile_slots + tile, plan.tile_values, thread, workspace.partials);
      }
    });
    if (!block.Arrive(workspace.counters, plan.tiles, false)) return;
    block.Each([&](int thread, State&) {
      for (int64_t channel = thread; channel < plan.channels; channel += plan.threads()) {
        Partial total = Partial::Empty();
        for (int r = 0; r < plan.replicas; ++r) {
          const int64_t value = channel + r * plan.channels;
          total =
              Partial::Combine(total, LoadSlot<Partial>(workspace.partials, tile_slots + value / plan.tile_values,
                                                        plan.tile_values, static_cast<int>(value % plan.tile_values)));
        }
        output(channel, total);
      }
    });
    if (!signals) return;
  }
  block.Raise(workspace.flag, workspace.flag_value);
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_REDUCE_CUH_
