#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/normalize.cuh"

namespace syncbn::kernels::cuda {
namespace {

template <Mapping kMapping, Addition kAddition, typename T>
__global__ void __launch_bounds__(kMaxThreads, ResidentBlocks(kMapping)) ElemtKernel(const ElemtArguments arguments) {
  extern __shared__ __align__(16) double shared[];
  DeviceBlock<ElementState<ElemtOp<kAddition, T>, Unroll(kMapping, ElemtOp<kAddition, T>::kBytes)>> block(shared);
  ElemtOfBlock<kMapping, kAddition, T>(block, arguments);
}

template <Addition kAddition>
Error LaunchWithAddition(const Context& context, DataType type, const ElemtArguments& arguments) {
  const ElementPlan& plan = arguments.plan;
  return DispatchType(plan.mapping, type, [&](auto mapping, auto tag) {
    using T = typename decltype(tag)::Type;
    return Launch(ElemtKernel<decltype(mapping)::value, kAddition, T>, plan.tiles, plan.splits, plan.block_threads,
                  ElementSharedBytes<ElemtOp<kAddition, T>>(plan), context.stream, arguments);
  });
}

template <Addition kAddition>
Error LoadWithAddition() {
  return LoadForEachType([](auto mapping, auto tag) {
    return Load(ElemtKernel<decltype(mapping)::value, kAddition, typename decltype(tag)::Type>);
  });
}

}  // namespace

Error BatchNormElemt(const Context& context, const TensorShape& shape, const void* x,
                     const ForwardCoefficients& coefficients, const Epilogue& epilogue, void* y) {
  if (shape.size() == 0) return kSuccess;
  const Addition addition = AdditionOf(epilogue);
  ElemtArguments arguments;
  const int width = ElemtWidth(addition, SizeOf(shape.type));
  arguments.plan = PlanElement(shape, width, ElemtBytes(addition, SizeOf(shape.type)));
  arguments.x = x;
  arguments.coefficients = coefficients;
  arguments.epilogue = epilogue;
  arguments.y = y;
  arguments.aligned = IsAligned(x) && IsAligned(y) && IsAligned(epilogue.residual);
  if (arguments.plan.blocks() > kMaxBlocks) return kInvalidValue;
  switch (addition) {
    case Addition::kNone:
      return LaunchWithAddition<Addition::kNone>(context, shape.type, arguments);
    case Addition::kResidual:
      return LaunchWithAddition<Addition::kResidual>(context, shape.type, arguments);
    case Addition::kResidualAndMask:
      return LaunchWithAddition<Addition::kResidualAndMask>(context, shape.type, arguments);
  }
  return kInvalidValue;
}

Error PreloadElemt() {
  if (const Error error = LoadWithAddition<Addition::kNone>(); error != kSuccess) return error;
  if (const Error error = LoadWithAddition<Addition::kResidual>(); error != kSuccess) return error;
  return LoadWithAddition<Addition::kResidualAndMask>();
}

}  // namespace syncbn::kernels::cuda
