// The four operations of kernels/cuda/batch_norm.h as the host executor computes them, with the launches' own plans.

#ifndef SYNCBN_TESTS_KERNELS_CUDA_HOST_KERNELS_H_
#define SYNCBN_TESTS_KERNELS_CUDA_HOST_KERNELS_H_

#include <cstdint>
#include <vector>

#include "kernels/batch_norm.h"
#include "kernels/cuda/backward_elemt.cuh"
#include "kernels/cuda/backward_reduce.cuh"
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/normalize.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/stats.cuh"
#include "kernels/gate.h"
#include "tests/kernels/cuda/host_executor.h"

namespace syncbn::testing {

namespace cuda = kernels::cuda;

// The parameters of a run on the host: `seed` as in RunGrid; `aligned` picks the vector loads or the scalar ones.
struct HostRun {
  uint64_t seed = 0;
  bool aligned = true;
  // A caller that keeps these over several launches checks that the counters return to zero.
  std::vector<uint32_t>* counters = nullptr;
  uint32_t* flag = nullptr;
  uint32_t flag_value = 0;
};

// Memory for one launch, filled with NaN where a launch must not read before it writes.
struct HostWorkspace {
  HostWorkspace(const HostRun& run, const cuda::ReducePlan& plan)
      : own_counters(cuda::kCounterBytes / sizeof(uint32_t), 0u),
        partials((cuda::WorkspaceBytes(plan) - cuda::kCounterBytes) / sizeof(double), __builtin_nan("")) {
    view.counters = run.counters != nullptr ? run.counters->data() : own_counters.data();
    view.partials = partials.data();
    view.flag = run.flag;
    view.flag_value = run.flag_value;
  }
  std::vector<uint32_t> own_counters;
  std::vector<double> partials;
  cuda::ReduceWorkspace view;
};

inline void HostStats(const HostRun& run, const kernels::TensorShape& shape, const void* x, double* mean, double* m2) {
  cuda::StatsArguments arguments;
  arguments.plan = cuda::PlanReduce(shape, 1);
  HostWorkspace workspace(run, arguments.plan);
  arguments.x = x;
  arguments.aligned = run.aligned;
  arguments.mean = mean;
  arguments.m2 = m2;
  arguments.workspace = workspace.view;
  cuda::DispatchType(arguments.plan.mapping, shape.type, [&](auto mapping, auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr cuda::Mapping kMapping = decltype(mapping)::value;
    RunGrid<cuda::ReduceState>(arguments.plan.tiles, arguments.plan.splits, arguments.plan.threads(),
                               cuda::kReduceSharedDoubles<cuda::ValuesOfThread<kMapping, T>()>, run.seed,
                               [&](auto& block) { cuda::StatsOfBlock<kMapping, T>(block, arguments); });
  });
}

template <kernels::Gate kGate>
void HostBackwardReduceWithGate(const HostRun& run, kernels::DataType type,
                                const cuda::BackwardReduceArguments& arguments) {
  cuda::DispatchType(arguments.plan.mapping, type, [&](auto mapping, auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr cuda::Mapping kMapping = decltype(mapping)::value;
    RunGrid<cuda::ReduceState>(arguments.plan.tiles, arguments.plan.splits, arguments.plan.threads(),
                               cuda::kReduceSharedDoubles<cuda::ValuesOfThread<kMapping, T>()>, run.seed,
                               [&](auto& block) { cuda::BackwardReduceOfBlock<kMapping, kGate, T>(block, arguments); });
  });
}

inline void HostBackwardReduce(const HostRun& run, const kernels::TensorShape& shape, const void* dy, const void* x,
                               const double* mean, const kernels::ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  cuda::BackwardReduceArguments arguments;
  arguments.plan = cuda::PlanReduce(shape, 2);
  HostWorkspace workspace(run, arguments.plan);
  arguments.dy = dy;
  arguments.x = x;
  arguments.aligned = run.aligned;
  arguments.mean = mean;
  arguments.gate = gate;
  arguments.sum_dy = sum_dy;
  arguments.sum_dy_xmu = sum_dy_xmu;
  arguments.workspace = workspace.view;
  switch (kernels::KindOf(gate)) {
    case kernels::Gate::kNone:
      return HostBackwardReduceWithGate<kernels::Gate::kNone>(run, shape.type, arguments);
    case kernels::Gate::kMask:
      return HostBackwardReduceWithGate<kernels::Gate::kMask>(run, shape.type, arguments);
    case kernels::Gate::kRecompute:
      return HostBackwardReduceWithGate<kernels::Gate::kRecompute>(run, shape.type, arguments);
  }
}

template <typename Op>
size_t LaneDoubles(const cuda::ElementPlan& plan) {
  return (cuda::ElementSharedBytes<Op>(plan) + sizeof(double) - 1) / sizeof(double);
}

template <cuda::Addition kAddition>
void HostElemtWithAddition(const HostRun& run, kernels::DataType type, const cuda::ElemtArguments& arguments) {
  cuda::DispatchType(arguments.plan.mapping, type, [&](auto mapping, auto tag) {
    constexpr cuda::Mapping kMapping = decltype(mapping)::value;
    using T = typename decltype(tag)::Type;
    using Op = cuda::ElemtOp<kAddition, T>;
    RunGrid<cuda::ElementState<Op, cuda::Unroll(kMapping, Op::kBytes)>>(
        arguments.plan.tiles, arguments.plan.splits, arguments.plan.block_threads, LaneDoubles<Op>(arguments.plan),
        run.seed, [&](auto& block) { cuda::ElemtOfBlock<kMapping, kAddition, T>(block, arguments); });
  });
}

inline void HostElemt(const HostRun& run, const kernels::TensorShape& shape, const void* x,
                      const kernels::ForwardCoefficients& coefficients, const kernels::Epilogue& epilogue, void* y) {
  const cuda::Addition addition = cuda::AdditionOf(epilogue);
  const size_t element_bytes = kernels::SizeOf(shape.type);
  cuda::ElemtArguments arguments;
  arguments.plan =
      cuda::PlanElement(shape, cuda::ElemtWidth(addition, element_bytes), cuda::ElemtBytes(addition, element_bytes));
  arguments.x = x;
  arguments.coefficients = coefficients;
  arguments.epilogue = epilogue;
  arguments.y = y;
  arguments.aligned = run.aligned;
  switch (addition) {
    case cuda::Addition::kNone:
      return HostElemtWithAddition<cuda::Addition::kNone>(run, shape.type, arguments);
    case cuda::Addition::kResidual:
      return HostElemtWithAddition<cuda::Addition::kResidual>(run, shape.type, arguments);
    case cuda::Addition::kResidualAndMask:
      return HostElemtWithAddition<cuda::Addition::kResidualAndMask>(run, shape.type, arguments);
  }
}

template <kernels::Gate kGate>
void HostBackwardElemtWithGate(const HostRun& run, kernels::DataType type,
                               const cuda::BackwardElemtArguments& arguments) {
  cuda::DispatchType(arguments.plan.mapping, type, [&](auto mapping, auto tag) {
    constexpr cuda::Mapping kMapping = decltype(mapping)::value;
    using T = typename decltype(tag)::Type;
    using Op = cuda::BackwardElemtOp<kGate, T>;
    RunGrid<cuda::ElementState<Op, cuda::Unroll(kMapping, Op::kBytes)>>(
        arguments.plan.tiles, arguments.plan.splits, arguments.plan.block_threads, LaneDoubles<Op>(arguments.plan),
        run.seed, [&](auto& block) { cuda::BackwardElemtOfBlock<kMapping, kGate, T>(block, arguments); });
  });
}

inline void HostBackwardElemt(const HostRun& run, const kernels::TensorShape& shape, const void* dy, const void* x,
                              const kernels::BackwardCoefficients& coefficients, const kernels::ReluGate& gate,
                              void* dx, void* d_residual) {
  cuda::BackwardElemtArguments arguments;
  arguments.plan = cuda::PlanElement(shape, cuda::VectorWidth(shape.type),
                                     cuda::BackwardElemtBytes(kernels::KindOf(gate), kernels::SizeOf(shape.type)));
  arguments.dy = dy;
  arguments.x = x;
  arguments.coefficients = coefficients;
  arguments.gate = gate;
  arguments.dx = dx;
  arguments.d_residual = d_residual;
  arguments.aligned = run.aligned;
  switch (kernels::KindOf(gate)) {
    case kernels::Gate::kNone:
      return HostBackwardElemtWithGate<kernels::Gate::kNone>(run, shape.type, arguments);
    case kernels::Gate::kMask:
      return HostBackwardElemtWithGate<kernels::Gate::kMask>(run, shape.type, arguments);
    case kernels::Gate::kRecompute:
      return HostBackwardElemtWithGate<kernels::Gate::kRecompute>(run, shape.type, arguments);
  }
}

// The four as a Backend of checksums.h.
struct HostBackend {
  HostRun run;
  template <typename... Arguments>
  void Stats(Arguments... arguments) {
    HostStats(run, arguments...);
  }
  template <typename... Arguments>
  void Elemt(Arguments... arguments) {
    HostElemt(run, arguments...);
  }
  template <typename... Arguments>
  void BackwardReduce(Arguments... arguments) {
    HostBackwardReduce(run, arguments...);
  }
  template <typename... Arguments>
  void BackwardElemt(Arguments... arguments) {
    HostBackwardElemt(run, arguments...);
  }
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_KERNELS_CUDA_HOST_KERNELS_H_
