#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/stats.cuh"

namespace syncbn::kernels::cuda {
namespace {

template <Mapping kMapping, typename T>
__global__ void __launch_bounds__(kMaxThreads, ResidentBlocks(kMapping)) StatsKernel(const StatsArguments arguments) {
  __shared__ double shared[kReduceSharedDoubles<ValuesOfThread<kMapping, T>()>];
  DeviceBlock<ReduceState> block(shared);
  StatsOfBlock<kMapping, T>(block, arguments);
}

}  // namespace

Error BatchNormStats(const Context& context, const TensorShape& shape, const void* x, double* mean, double* m2) {
  StatsArguments arguments;
  arguments.plan = PlanReduce(shape, 1);
  arguments.x = x;
  arguments.aligned = IsAligned(x);
  arguments.mean = mean;
  arguments.m2 = m2;
  const ReducePlan& plan = arguments.plan;
  if (!MapWorkspace(context, plan, &arguments.workspace)) return kInvalidValue;
  return DispatchType(plan.mapping, shape.type, [&](auto mapping, auto tag) {
    return Launch(StatsKernel<decltype(mapping)::value, typename decltype(tag)::Type>, plan.tiles, plan.splits,
                  plan.threads(), 0, context.stream, arguments);
  });
}

Error PreloadStats() {
  return LoadForEachType(
      [](auto mapping, auto tag) { return Load(StatsKernel<decltype(mapping)::value, typename decltype(tag)::Type>); });
}

}  // namespace syncbn::kernels::cuda
