#include "kernels/cuda/backward_reduce.cuh"
#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/launch.cuh"

namespace syncbn::kernels::cuda {
namespace {

template <Mapping kMapping, Gate kGate, typename T>
__global__ void __launch_bounds__(kMaxThreads, ResidentBlocks(kMapping))
    BackwardReduceKernel(const BackwardReduceArguments arguments) {
  __shared__ double shared[kReduceSharedDoubles<ValuesOfThread<kMapping, T>()>];
  DeviceBlock<ReduceState> block(shared);
  BackwardReduceOfBlock<kMapping, kGate, T>(block, arguments);
}

template <Gate kGate>
Error LaunchWithGate(const Context& context, DataType type, const BackwardReduceArguments& arguments) {
  const ReducePlan& plan = arguments.plan;
  return DispatchType(plan.mapping, type, [&](auto mapping, auto tag) {
    return Launch(BackwardReduceKernel<decltype(mapping)::value, kGate, typename decltype(tag)::Type>, plan.tiles,
                  plan.splits, plan.threads(), 0, context.stream, arguments);
  });
}

template <Gate kGate>
Error LoadWithGate() {
  return LoadForEachType([](auto mapping, auto tag) {
    return Load(BackwardReduceKernel<decltype(mapping)::value, kGate, typename decltype(tag)::Type>);
  });
}

}  // namespace

Error BatchNormBackwardReduce(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                              const double* mean, const ReluGate& gate, double* sum_dy, double* sum_dy_xmu) {
  BackwardReduceArguments arguments;
  arguments.plan = PlanReduce(shape, 2);
  arguments.dy = dy;
  arguments.x = x;
  arguments.aligned = IsAligned(dy) && IsAligned(x);
  arguments.mean = mean;
  arguments.gate = gate;
  arguments.sum_dy = sum_dy;
  arguments.sum_dy_xmu = sum_dy_xmu;
  if (!MapWorkspace(context, arguments.plan, &arguments.workspace)) return kInvalidValue;
  switch (KindOf(gate)) {
    case Gate::kNone:
      return LaunchWithGate<Gate::kNone>(context, shape.type, arguments);
    case Gate::kMask:
      return LaunchWithGate<Gate::kMask>(context, shape.type, arguments);
    case Gate::kRecompute:
      return LaunchWithGate<Gate::kRecompute>(context, shape.type, arguments);
  }
  return kInvalidValue;
}

Error PreloadBackwardReduce() {
  if (const Error error = LoadWithGate<Gate::kNone>(); error != kSuccess) return error;
  if (const Error error = LoadWithGate<Gate::kMask>(); error != kSuccess) return error;
  return LoadWithGate<Gate::kRecompute>();
}

}  // namespace syncbn::kernels::cuda
