// The four operations: plan, run the units, merge their partial results in the plan's order.

#include "kernels/cpu/batch_norm.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/reduce.h"
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
  ForwardArgs args;
  args.type = shape.type;
  args.plan = PlanElementwise(shape);
  args.x = Bytes(x);
  args.epilogue = epilogue;
  args.y = static_cast<uint8_t*>(y);
  Tables tables(shape.channels, args.plan.period);
  args.coefficients = tables.Of(coefficients);
  ParallelFor(context.num_threads, args.plan.units(), [&args](int64_t unit) { ForwardUnit(args, unit); });
}

void BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  const Reduction reduction = PlanReduction(shape);
  ReduceArgs args;
  args.type = shape.type;
  args.x = Bytes(x);
  args.dy = Bytes(dy);
  args.mean = mean;
  args.gate = gate;
  std::fill_n(sum_dy, shape.channels, 0.0);
  std::fill_n(sum_dy_xmu, shape.channels, 0.0);
  for (const ReductionPlan* plan : {&reduction.body, &reduction.rest}) {
    AddSums(*plan, Run(context, args, *plan, shape.channels, BackwardReduceUnit), shape.channels, sum_dy, sum_dy_xmu);
  }
}

void BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                            const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                            void* d_residual) {
  BackwardArgs args;
  args.type = shape.type;
  args.plan = PlanElementwise(shape);
  args.dy = Bytes(dy);
  args.x = Bytes(x);
  args.dx = static_cast<uint8_t*>(dx);
  args.d_residual = static_cast<uint8_t*>(d_residual);
  Tables tables(shape.channels, args.plan.period);
  args.coefficients = tables.Of(coefficients);
  args.gate = tables.Of(gate);
  ParallelFor(context.num_threads, args.plan.units(), [&args](int64_t unit) { BackwardUnit(args, unit); });
}

const char* InstructionSet() { return TargetName(); }

}  // namespace syncbn::kernels::cpu
