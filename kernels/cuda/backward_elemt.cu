#include "kernels/cuda/backward_elemt.cuh"
#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/launch.cuh"

namespace syncbn::kernels::cuda {
namespace {

template <Mapping kMapping, Gate kGate, typename T>
__global__ void __launch_bounds__(kMaxThreads, ResidentBlocks(kMapping))
    BackwardElemtKernel(const BackwardElemtArguments arguments) {
  extern __shared__ __align__(16) double shared[];
  DeviceBlock<ElementState<BackwardElemtOp<kGate, T>, Unroll(kMapping, BackwardElemtOp<kGate, T>::kBytes)>> block(
      shared);
  BackwardElemtOfBlock<kMapping, kGate, T>(block, arguments);
}

template <Gate kGate>
Error LaunchWithGate(const Context& context, DataType type, const BackwardElemtArguments& arguments) {
  const ElementPlan& plan = arguments.plan;
  return DispatchType(plan.mapping, type, [&](auto mapping, auto tag) {
    using T = typename decltype(tag)::Type;
    return Launch(BackwardElemtKernel<decltype(mapping)::value, kGate, T>, plan.tiles, plan.splits, plan.block_threads,
                  ElementSharedBytes<BackwardElemtOp<kGate, T>>(plan), context.stream, arguments);
  });
}

template <Gate kGate>
Error LoadWithGate() {
  return LoadForEachType([](auto mapping, auto tag) {
    return Load(BackwardElemtKernel<decltype(mapping)::value, kGate, typename decltype(tag)::Type>);
  });
}

}  // namespace

Error BatchNormBackwardElemt(const Context& context, const TensorShape& shape, const void* dy, const void* x,
                             const BackwardCoefficients& coefficients, const ReluGate& gate, void* dx,
                             void* d_residual) {
  if (shape.size() == 0) return kSuccess;
  BackwardElemtArguments arguments;
  arguments.plan = PlanElement(shape, VectorWidth(shape.type), BackwardElemtBytes(KindOf(gate), SizeOf(shape.type)));
  arguments.dy = dy;
  arguments.x = x;
  arguments.coefficients = coefficients;
  arguments.gate = gate;
  arguments.dx = dx;
  arguments.d_residual = d_residual;
  arguments.aligned = IsAligned(dy) && IsAligned(x) && IsAligned(dx) && IsAligned(d_residual);
  if (arguments.plan.blocks() > kMaxBlocks) return kInvalidValue;
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

Error PreloadBackwardElemt() {
  if (const Error error = LoadWithGate<Gate::kNone>(); error != kSuccess) return error;
  if (const Error error = LoadWithGate<Gate::kMask>(); error != kSuccess) return error;
  return LoadWithGate<Gate::kRecompute>();
}

}  // namespace syncbn::kernels::cuda
