// The second half of a reduction over channels: from two sums for each channel of each thread to two for each channel,
// in the launch that made them.
//
//   1. The threads of a block put their sums into shared memory, and each accumulator, a sum of a channel, is added up
//      over the members, the threads that have parts of it.
//   2. Each block writes its tile's accumulators to the workspace and counts itself in. The last block of the tile adds
//      them up, by index and not by arrival, so no bit of the result depends on which block is last. With many splits
//      the adding is done in two levels, so that one block does not read for long.
//   3. If a channel occurs in several columns (C not a multiple of the vector), the last of all blocks adds these up.
//
// All that follows the last read of the tensor is a chain of steps that wait for each other, so there are few of them:
// additions alone, about a pivot that all blocks share (stats.cuh), and two or three barriers instead of one for each
// level of a tree.
//
// The only atomic operations count blocks, on integers. Counters return to 0 by themselves.

#ifndef SYNCBN_KERNELS_CUDA_REDUCE_CUH_
#define SYNCBN_KERNELS_CUDA_REDUCE_CUH_

#include <cstdint>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/plan.h"

namespace syncbn::kernels::cuda {

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

// The sums that a reduction makes of each channel.
inline constexpr int kSums = kReduceSums;
struct Sums {
  double word[kSums] = {0.0, 0.0};
};

// A number that a thread keeps between the phases of the end: the output of its channel needs it, and it is asked for
// early.
struct ReduceState {
  double prepared;
};

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

// Doubles of shared memory that a reduction needs: the threads' sums, the helpers' parts of accumulators, and totals.
template <int kValues>
inline constexpr int kReduceSharedDoubles = (kValues * kSums + 2) * kMaxThreads;

// Shared memory as a reduction of kValues channels a thread divides it.
template <int kValues>
struct ReduceShared {
  double* sums;
  double* parts;
  double* totals;
  SYNCBN_HOST_DEVICE explicit ReduceShared(double* shared)
      : sums(shared), parts(shared + kValues * kSums * kMaxThreads), totals(parts + kMaxThreads) {}
};

// Puts a thread's sums where AddMembers finds them, at the end of the phase that makes them.
template <int kValues, typename Block>
SYNCBN_HOST_DEVICE inline void StoreSums(Block& block, int thread, const Sums* sums) {
  double* const shared = ReduceShared<kValues>(block.shared()).sums;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
#pragma unroll
    for (int w = 0; w < kSums; ++w) shared[(v * kSums + w) * kMaxThreads + thread] = sums[v].word[w];
  }
}

// Adds up `count` terms, term(a, i), of each accumulator a, and calls write(a, total) for each. As many as `helpers`
// threads share an accumulator, each with every helpers-th term, and their parts meet in shared memory. place(thread)
// says which accumulator a thread helps with (`column`), and as which of its helpers (`member`).
template <typename Block, typename PlaceOfThread, typename Term, typename Write>
SYNCBN_HOST_DEVICE inline void AddUp(Block& block, int accumulators, int helpers, int count, double* parts,
                                     PlaceOfThread place, Term term, Write write) {
  using State = typename Block::StateType;
  block.Each([&](int thread, State&) {
    if (thread >= accumulators * helpers) return;
    const Place at = place(thread);
    double total = 0.0;
#pragma unroll 8
    for (int i = at.member; i < count; i += helpers) total += term(at.column, i);
    if (helpers == 1) {
      write(at.column, total);
    } else {
      parts[at.member * accumulators + at.column] = total;
    }
  });
  if (helpers == 1) return;
  block.Each([&](int thread, State&) {
    if (thread >= accumulators) return;
    double total = 0.0;
#pragma unroll 4
    for (int helper = 0; helper < helpers; ++helper) total += parts[helper * accumulators + thread];
    write(thread, total);
  });
}

// Adds up what StoreSums has stored; totals go to `totals`: accumulator a, the sum w of the channel that is element v
// of column c, is a = (v * kSums + w) * tile_columns + c.
template <Mapping kMapping, int kValues, typename Block>
SYNCBN_HOST_DEVICE inline void AddMembers(Block& block, const ReducePlan& plan, double* totals) {
  const ReduceShared<kValues> shared(block.shared());
  const int columns = plan.tile_columns;
  const int members = plan.members;
  // Helpers of an accumulator are neighbours if its members are, so that they read from different banks.
  const auto place = [&plan](int thread) {
    const Place at = DivideThread(plan.divide_member_helpers, thread);
    return kMapping == Mapping::kRows ? at : Place{at.column, at.member};
  };
  const auto term = [&](int a, int member) {
    const Place at = DivideThread(plan.divide_columns, a);
    const int thread = kMapping == Mapping::kRows ? member * columns + at.column : at.column * members + member;
    return shared.sums[at.member * kMaxThreads + thread];
  };
  AddUp(block, plan.accumulators, plan.member_helpers, members, shared.parts, place, term,
        [totals](int a, double total) { totals[a] = total; });
}

// Adds up `count` slots of the workspace from `first` on; totals go to `totals`.
template <typename Block>
SYNCBN_HOST_DEVICE inline void AddSlots(Block& block, const ReducePlan& plan, const double* partials, int64_t first,
                                        int count, double* parts, double* totals) {
  const int accumulators = plan.accumulators;
  const double* const slots = partials + first * accumulators;
  AddUp(
      block, accumulators, plan.slot_helpers, count, parts,
      [&plan](int thread) { return DivideThread(plan.divide_accumulators, thread); },
      [slots, accumulators](int a, int i) { return LoadCoherent(slots + i * accumulators + a); },
      [totals](int a, double total) { totals[a] = total; });
}

// Adds up the splits of the block's tile, whose sums are in their slots, if this block is the last of them. True:
// totals are in shared memory. False: another block goes on.
template <int kValues, typename Block>
SYNCBN_HOST_DEVICE inline bool AddSplits(Block& block, const ReducePlan& plan, const ReduceWorkspace& workspace) {
  const ReduceShared<kValues> shared(block.shared());
  const int64_t tile = block.tile();
  uint32_t* const tile_counter = workspace.counters + 2 + tile;
  const int64_t slots = tile * plan.splits;
  if (plan.groups == 1) {
    if (!block.Arrive(tile_counter, plan.splits)) return false;
    AddSlots(block, plan, workspace.partials, slots, plan.splits, shared.parts, shared.totals);
    return true;
  }
  const int group = static_cast<int>(plan.divide_group.Small(static_cast<uint32_t>(block.split())));
  const int first = group * plan.group;
  const int in_group = plan.splits - first < plan.group ? plan.splits - first : plan.group;
  uint32_t* const group_counter = workspace.counters + 2 + plan.tiles + tile * plan.groups + group;
  if (!block.Arrive(group_counter, in_group)) return false;
  const int64_t group_slots = plan.tiles * plan.splits + tile * plan.groups;
  AddSlots(block, plan, workspace.partials, slots + first, in_group, shared.parts,
           workspace.partials + (group_slots + group) * plan.accumulators);
  if (!block.Arrive(tile_counter, plan.groups)) return false;
  AddSlots(block, plan, workspace.partials, group_slots, plan.groups, shared.parts, shared.totals);
  return true;
}

// The two sums of value e of a tile, among its accumulators.
template <int kValues, typename Read>
SYNCBN_HOST_DEVICE inline Sums SumsOf(const ReducePlan& plan, int e, Read read) {
  Sums sums;
#pragma unroll
  for (int w = 0; w < kSums; ++w) {
    sums.word[w] = read((e % kValues * kSums + w) * plan.tile_columns + e / kValues);
  }
  return sums;
}

// The sums of a channel that occurs in several columns, from the totals of all tiles.
template <int kValues>
SYNCBN_HOST_DEVICE inline Sums SumsOfReplicas(const ReducePlan& plan, const double* tiles, int64_t channel) {
  Sums sums;
  for (int r = 0; r < plan.replicas; ++r) {
    const int64_t value = channel + r * plan.channels;
    const int64_t tile = plan.divide_values(value);
    const double* const slot = tiles + tile * plan.accumulators;
    const Sums more = SumsOf<kValues>(plan, static_cast<int>(value - tile * plan.tile_values),
                                      [slot](int a) { return LoadCoherent(slot + a); });
#pragma unroll
    for (int w = 0; w < kSums; ++w) sums.word[w] += more.word[w];
  }
  return sums;
}

// Everything after StoreSums. output.Write(channel, prepared, sums) is called once for each channel, with what
// output.Prepare(channel) has returned: a read from memory that takes place beside the adding.
template <Mapping kMapping, int kValues, typename Block, typename Output>
SYNCBN_HOST_DEVICE inline void FinishReduction(Block& block, const ReducePlan& plan, const ReduceWorkspace& workspace,
                                               const Output& output) {
  using State = typename Block::StateType;
  const ReduceShared<kValues> shared(block.shared());
  const int64_t tile = block.tile();
  const int64_t slot = tile * plan.splits + block.split();
  AddMembers<kMapping, kValues>(block, plan,
                                plan.splits == 1 ? shared.totals : workspace.partials + slot * plan.accumulators);
  if (plan.splits > 1 && !AddSplits<kValues>(block, plan, workspace)) return;
  const bool signals = workspace.flag != nullptr;
  if (plan.replicas == 1) {
    block.Each([&](int thread, State& state) {
      const int64_t channel = tile * plan.tile_values + thread;
      if (thread >= plan.tile_values || channel >= plan.channels) return;
      output.Write(channel, state.prepared, SumsOf<kValues>(plan, thread, [&](int a) { return shared.totals[a]; }));
    });
    if (!signals || (plan.tiles > 1 && !block.Arrive(workspace.counters + 1, plan.tiles))) return;
    block.Raise(workspace.flag, workspace.flag_value);
    return;
  }
  double* const tiles = workspace.partials + plan.tiles * (plan.splits + plan.groups) * plan.accumulators;
  block.Each([&](int thread, State&) {
    if (thread < plan.accumulators) tiles[tile * plan.accumulators + thread] = shared.totals[thread];
  });
  if (!block.Arrive(workspace.counters, plan.tiles)) return;
  block.Each([&](int thread, State&) {
    for (int64_t channel = thread; channel < plan.channels; channel += plan.threads()) {
      output.Write(channel, output.Prepare(channel), SumsOfReplicas<kValues>(plan, tiles, channel));
    }
  });
  if (signals) block.Raise(workspace.flag, workspace.flag_value);
}

// Returns what output.Prepare says for the channel that the thread will write, if any.
template <typename Output>
SYNCBN_HOST_DEVICE inline double PreparedFor(const ReducePlan& plan, int64_t tile, int thread, const Output& output) {
  const int64_t channel = tile * plan.tile_values + thread;
  return thread < plan.tile_values && channel < plan.channels ? output.Prepare(channel) : 0.0;
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_REDUCE_CUH_
