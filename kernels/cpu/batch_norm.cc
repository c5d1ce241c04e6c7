// The four operations: plan, run the units, merge their partial results in the plan's order.

#include "kernels/cpu/batch_norm.h"

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "kernels/cpu/cache_size.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/half_elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/rounded.h"
#include "kernels/gate.h"
#include "kernels/moments.h"

namespace syncbn::kernels::cpu {
namespace {

const uint8_t* Bytes(const void* p) { return static_cast<const uint8_t*>(p); }

// Per-channel vectors repeated to the length of a plan's table. A vector that has this length already is not copied.
class Tables {
 public:
  Tables(int64_t channels, int64_t length) : channels_(channels), length_(length) {}

  const double* Of(const double* vector) {
    if (vector == nullptr || length_ == channels_) return vector;
    std::vector<double> table(static_cast<size_t>(length_));
    for (int64_t i = 0; i < length_; ++i) table[static_cast<size_t>(i)] = vector[i % channels_];
    tables_.push_back(std::move(table));
    return tables_.back().data();
  }

  ForwardCoefficients Of(const ForwardCoefficients& c) { return {Of(c.mean), Of(c.scale), Of(c.shift)}; }

  BackwardCoefficients Of(const BackwardCoefficients& c) {
    return {Of(c.mean), Of(c.scale), Of(c.mean_dy), Of(c.projection)};
  }

  ReluGate Of(const ReluGate& gate) { return {gate.mask, gate.mask != nullptr ? gate.forward : Of(gate.forward)}; }

 private:
  const int64_t channels_;
  const int64_t length_;
  std::vector<std::vector<double>> tables_;
};

// Rounded per-channel vectors as tables of `period` float32 entries, a multiple of `channels`, and the padding that
// FloatForward asks for.
class FloatTables {
 public:
  FloatTables(int64_t channels, const ElementwisePlan& plan, bool pairs)
      : channels_(static_cast<size_t>(channels)),
        length_(static_cast<size_t>(plan.period + FloatForward::kPadding)),
        even_first_(pairs && plan.repeat == 1) {}

  const float* Of(const double* vector) {
    if (vector == nullptr) return nullptr;
    tables_.emplace_back(length_ / kLine + 1);
    float* const table = tables_.back().data()->entries;
    for (size_t i = 0; i < length_; ++i) {
      table[i] = i < channels_ ? static_cast<float>(vector[i]) : table[i - channels_];
    }
    if (even_first_) PutEvenFirst(table);
    return table;
  }

  FloatForward Of(const ForwardCoefficients& c) { return {Of(c.mean), Of(c.scale), Of(c.shift)}; }

  FloatBackward Of(const BackwardCoefficients& c) { return {Of(c.mean), Of(c.scale), Of(c.mean_dy), Of(c.projection)}; }

 private:
  static constexpr size_t kLine = 16;
  // A line of cache: sixteen entries that are read at once shall not lie in two.
  struct alignas(64) Line {
    float entries[kLine];
  };

  // Reorders each 32 entries.
  void PutEvenFirst(float* table) const {
    constexpr size_t kPairs = 16;
    for (size_t i = 0; i + 2 * kPairs <= length_; i += 2 * kPairs) {
      float entries[2 * kPairs];
      std::copy_n(table + i, 2 * kPairs, entries);
      for (size_t j = 0; j < kPairs; ++j) {
        table[i + j] = entries[2 * j];
        table[i + kPairs + j] = entries[2 * j + 1];
      }
    }
  }

  const size_t channels_;
  const size_t length_;
  const bool even_first_;
  std::vector<std::vector<Line>> tables_;
};

// Tells whether outputs should not go into the caches: they would be out of them again before anybody reads them, and
// without them the inputs stay there for the next operation. Tensors may be null.
bool PassesCaches(const Context& context, const TensorShape& shape, std::initializer_list<const void*> inputs,
                  std::initializer_list<const void*> outputs) {
  int64_t tensors = 0;
  for (const void* const input : inputs) tensors += input != nullptr ? 1 : 0;
  for (const void* const output : outputs) {
    tensors += output != nullptr ? 1 : 0;
    if (output != nullptr && std::find(inputs.begin(), inputs.end(), output) != inputs.end()) return false;
  }
  const int64_t bytes = context.cache_bytes != 0 ? context.cache_bytes : LargestCacheBytes();
  return tensors * shape.size() * static_cast<int64_t>(SizeOf(shape.type)) > bytes;
}

// The partial results of one plan, [splits, width] each.
struct Partials {
  explicit Partials(const ReductionPlan& plan)
      : first(static_cast<size_t>(plan.splits() * plan.width)), second(first.size()) {}
  std::vector<double> first;
  std::vector<double> second;
};

template <typename Unit>
Partials Run(const Context& context, ReduceArgs args, const ReductionPlan& plan, int64_t channels, Unit unit) {
  Partials partials(plan);
  Tables tables(channels, plan.width);
  args.plan = &plan;
  args.mean = tables.Of(args.mean);
  args.gate = tables.Of(args.gate);
  args.first = partials.first.data();
  args.second = partials.second.data();
  ParallelFor(context.num_threads, plan.units(), [&](int64_t i) { unit(args, i); });
  return partials;
}

void MergeStats(const ReductionPlan& plan, const Partials& partials, int64_t channels, std::vector<int64_t>* counts,
                double* mean, double* m2) {
  for (int64_t split = 0; split < plan.splits(); ++split) {
    const int64_t count = plan.CountOfSplit(split);
    for (int64_t j = 0; j < plan.width; ++j) {
      const int64_t c = j % channels;
      int64_t& merged_count = (*counts)[static_cast<size_t>(c)];
      const size_t at = static_cast<size_t>(split * plan.width + j);
      const Moments merged = Merge({merged_count, mean[c], m2[c]}, {count, partials.first[at], partials.second[at]});
      merged_count = merged.count;
      mean[c] = merged.mean;
      m2[c] = merged.m2;
    }
  }
}

void AddSums(const ReductionPlan& plan, const Partials& partials, int64_t channels, double* first, double* second) {
  for (int64_t split = 0; split < plan.splits(); ++split) {
    for (int64_t j = 0; j < plan.width; ++j) {
      const size_t at = static_cast<size_t>(split * plan.width + j);
      first[j % channels] += partials.first[at];
      second[j % channels] += partials.second[at];
    }
  }
}

}  // namespace

void BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2) {
  const Reduction reduction = PlanReduction(shape);
  ReduceArgs args;
  args.type = shape.type;
  args.single = ReducesInFloat32(shape);
  args.x = Bytes(x);
  std::vector<int64_t> counts(static_cast<size_t>(shape.channels), 0);
  std::fill_n(mean, shape.channels, 0.0);
  std::fill_n(m2, shape.channels, 0.0);
  for (const ReductionPlan* plan : {&reduction.body, &reduction.rest}) {
    MergeStats(*plan, Run(context, args, *plan, shape.channels, StatsUnit), shape.channels, &counts, mean, m2);
  }
}

void BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                    const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y) {
  const ElementwisePlan plan = PlanElementwise(shape);
  const RoundedForward rounded(shape, coefficients);
  if (rounded.single()) {
    const bool pairs = HasPairs(shape.type, plan, epilogue.relu_mask);
    FloatTables tables(shape.channels, plan, pairs);
    const HalfForwardArgs args = {
        shape.type, plan, Bytes(x), tables.Of(rounded.coefficients()), epilogue, static_cast<uint8_t*>(y), pairs};
    ParallelFor(context.num_threads, plan.units(), [&args](int64_t unit) { HalfForwardUnit(args, unit); });
    return;
  }
  Tables tables(shape.channels, plan.period);
  const ForwardArgs args = {shape.type,
                            plan,
                            Bytes(x),
                            tables.Of(rounded.coefficients()),
                            epilogue,
                            static_cast<uint8_t*>(y),
                            epilogue.relu_mask == nullptr && PassesCaches(context, shape, {x, epilogue.residual}, {y})};
  ParallelFor(context.num_threads, plan.units(), [&args](int64_t unit) { ForwardUnit(args, unit); });
}

void BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  const Reduction reduction = PlanReduction(shape);
  ReduceArgs args;
  args.type = shape.type;
  args.x = Bytes(x);
  args.dy = Bytes(dy);
  args.mean = mean;
  const RoundedForward forward(shape, gate.forward);
  args.gate = {gate.mask, forward.coefficients()};
  args.single_gate = forward.single();
  args.single = ReducesInFloat32(shape) &&
                (shape.type == DataType::kFloat32 || KindOf(gate) != Gate::kRecompute || forward.single());
  std::fill_n(sum_dy, shape.channels, 0.0);
  std::fill_n(sum_dy_xmu, shape.channels, 0.0);
  for (const ReductionPlan* plan : {&reduction.body, &reduction.rest}) {
    AddSums(*plan, Run(context, args, *plan, shape.channels, BackwardReduceUnit), shape.channels, sum_dy, sum_dy_xmu);
  }
}

void BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                            const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                            void* d_residual) {
  const ElementwisePlan plan = PlanElementwise(shape);
  const RoundedForward forward(shape, gate.forward);
  const RoundedBackward backward(shape, coefficients);
  const bool recomputes = KindOf(gate) == Gate::kRecompute;
  if (backward.single() && (!recomputes || forward.single())) {
    HalfBackwardArgs args;
    args.pairs = HasPairs(shape.type, plan, gate.mask);
    FloatTables tables(shape.channels, plan, args.pairs);
    args.type = shape.type;
    args.plan = plan;
    args.dy = Bytes(dy);
    args.x = Bytes(x);
    args.coefficients = tables.Of(backward.coefficients());
    args.mask = gate.mask;
    if (recomputes) args.forward = tables.Of(forward.coefficients());
    args.dx = static_cast<uint8_t*>(dx);
    args.d_residual = static_cast<uint8_t*>(d_residual);
    ParallelFor(context.num_threads, plan.units(), [&args](int64_t unit) { HalfBackwardUnit(args, unit); });
    return;
  }
  BackwardArgs args;
  args.type = shape.type;
  args.plan = plan;
  args.dy = Bytes(dy);
  args.x = Bytes(x);
  args.dx = static_cast<uint8_t*>(dx);
  args.d_residual = static_cast<uint8_t*>(d_residual);
  Tables tables(shape.channels, plan.period);
  args.coefficients = tables.Of(shape.type == DataType::kFloat32 ? backward.coefficients() : coefficients);
  args.gate = tables.Of({gate.mask, forward.coefficients()});
  args.single_gate = forward.single();
  args.around_caches = PassesCaches(context, shape, {dy, x}, {dx, d_residual});
  ParallelFor(context.num_threads, plan.units(), [&args](int64_t unit) { BackwardUnit(args, unit); });
}

const char* InstructionSet() { return TargetName(); }

}  // namespace syncbn::kernels::cpu
