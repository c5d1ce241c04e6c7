// From a mapping and an element type at run time to template arguments.

#ifndef SYNCBN_KERNELS_CUDA_DISPATCH_CUH_
#define SYNCBN_KERNELS_CUDA_DISPATCH_CUH_

#include <type_traits>

#include "kernels/batch_norm.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scalar_types.cuh"

namespace syncbn::kernels::cuda {

template <typename T>
struct TypeTag {
  using Type = T;
};

// Returns f(mapping, tag) for a mapping as std::integral_constant and a tag with the element type.
template <typename Function>
auto DispatchType(Mapping mapping, DataType type, Function f) {
  const auto with_mapping = [&](auto tag) {
    if (mapping == Mapping::kRows) return f(std::integral_constant<Mapping, Mapping::kRows>(), tag);
    return f(std::integral_constant<Mapping, Mapping::kPlanes>(), tag);
  };
  switch (type) {
    case DataType::kFloat32:
      return with_mapping(TypeTag<float>());
    case DataType::kFloat64:
      return with_mapping(TypeTag<double>());
    case DataType::kFloat16:
      return with_mapping(TypeTag<Float16>());
    case DataType::kBFloat16:
      return with_mapping(TypeTag<BFloat16>());
  }
  __builtin_trap();  // Validate() refuses every other type.
}

}  // namespace syncbn::kernels::cuda

#endif  // SYNCBN_KERNELS_CUDA_DISPATCH_CUH_
