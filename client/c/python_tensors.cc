// Descriptions of torch's tensors for passes over them, as functions of Python: where a tensor's elements are, and what
// they are, if it is as nearly every one is. In Python the same takes a fifth of all that a layer's step does.

#include <array>
#include <cstddef>
#include <cstdint>

#include "client/c/python.h"
#include "client/c/syncbn.h"

namespace syncbn::python {
namespace {

// The tuple of Python's objects that the functions are made with, in the order of _SIGHT in
// client/python/syncbn/torch/_tensors.py.
class Torch {
 public:
  explicit Torch(Object* tuple) : tuple_(tuple) {}

  Object* none() const { return Item(0); }
  Object* runtime_error() const { return Item(1); }
  Object* tensor() const { return Item(2); }
  Object* parameter() const { return Item(3); }
  Object* types() const { return Item(4); }  // The library's number of each dtype.
  Object* shape() const { return Item(5); }  // Names of attributes.
  Object* dtype() const { return Item(6); }
  Object* is_cpu() const { return Item(7); }
  Object* data_ptr() const { return Item(8); }  // Methods of a tensor.
  Object* is_neg() const { return Item(9); }
  Object* is_contiguous() const { return Item(10); }
  Object* channels_last() const { return Item(11); }  // Keyword arguments of is_contiguous.
  Object* is_cuda() const { return Item(12); }        // The name of an attribute.
  Object* get_device() const { return Item(13); }     // A method.

 private:
  Object* Item(intptr_t index) const { return functions.tuple_get_item(tuple_, index); }

  Object* tuple_;
};

// An object's answer to a question of yes or no; no, with an exception, if there is none.
bool Yes(const Reference& answer) { return answer.get() != nullptr && functions.object_is_true(answer.get()) == 1; }

Object* Ask(Object* method, Object* tensor) { return functions.object_call_function_obj_args(method, tensor, nullptr); }

constexpr size_t kMostDimensions = 8;
constexpr int64_t kOnCpu = -1;

// A plain tensor, with values in memory of its own.
struct Seen {
  uint64_t address = 0;
  int32_t type = SYNCBN_FLOAT32;
  int64_t device = kOnCpu;  // Else CUDA's index.
  size_t dimensions = 0;
  std::array<int64_t, kMostDimensions> sizes = {};

  bool HasFormOf(const Seen& other) const {
    return type == other.type && device == other.device && dimensions == other.dimensions && sizes == other.sizes;
  }

  int64_t elements() const {
    int64_t product = 1;
    for (size_t i = 0; i < dimensions; ++i) product *= sizes[i];
    return product;
  }
};

bool IsPlain(const Torch& torch, Object* tensor) {
  const Reference type(functions.object_type(tensor));
  return type.get() == torch.tensor() || type.get() == torch.parameter();
}

// A tensor's form: its type and shape, as its attributes have them.
bool SeeForm(const Torch& torch, Object* dtype, Object* shape, Seen* seen) {
  if (dtype == nullptr || shape == nullptr) return false;
  Object* const number = functions.dict_get_item(torch.types(), dtype);
  if (number == nullptr) return false;
  seen->type = static_cast<int32_t>(functions.long_as_long_long(number));
  const intptr_t dimensions = functions.tuple_size(shape);
  if (dimensions < 0 || static_cast<size_t>(dimensions) > kMostDimensions) return false;
  seen->dimensions = static_cast<size_t>(dimensions);
  for (intptr_t i = 0; i < dimensions; ++i) {
    seen->sizes[i] = functions.long_as_long_long(functions.tuple_get_item(shape, i));
  }
  return true;
}

// Returns false, with or without an exception, if the tensor is neither on the CPU nor on a GPU of CUDA's.
bool SeeDevice(const Torch& torch, Object* tensor, int64_t* device) {
  if (Yes(Reference(functions.object_get_attr(tensor, torch.is_cpu())))) {
    *device = kOnCpu;
    return true;
  }
  if (!Yes(Reference(functions.object_get_attr(tensor, torch.is_cuda())))) return false;
  const Reference index(Ask(torch.get_device(), tensor));
  if (index.get() == nullptr) return false;
  *device = functions.long_as_long_long(index.get());
  return *device >= 0;
}

// Returns false, with or without an exception, if the tensor is unusual. Its strides are not looked at.
bool See(const Torch& torch, Object* tensor, Seen* seen) {
  if (!IsPlain(torch, tensor)) return false;
  if (!SeeDevice(torch, tensor, &seen->device)) return false;
  // A wrapper without memory of its own has no address, nor has a tensor of another layout.
  const Reference address(Ask(torch.data_ptr(), tensor));
  if (address.get() == nullptr) return false;
  seen->address = reinterpret_cast<uint64_t>(functions.long_as_void_ptr(address.get()));
  if (seen->address == 0) return false;
  const Reference negative(Ask(torch.is_neg(), tensor));
  if (negative.get() == nullptr || functions.object_is_true(negative.get()) != 0) return false;
  const Reference dtype(functions.object_get_attr(tensor, torch.dtype()));
  const Reference shape(functions.object_get_attr(tensor, torch.shape()));
  return SeeForm(torch, dtype.get(), shape.get(), seen);
}

bool IsChannelsFirst(const Torch& torch, Object* tensor) { return Yes(Reference(Ask(torch.is_contiguous(), tensor))); }

bool IsChannelsLast(const Torch& torch, Object* tensor, const Seen& seen) {
  if (seen.dimensions != 4) return false;
  const Reference arguments(functions.build_value("(O)", tensor));
  if (arguments.get() == nullptr) return false;
  return Yes(Reference(functions.object_call(torch.is_contiguous(), arguments.get(), torch.channels_last())));
}

// One element of one dimension for each channel of x, on its device, or none at all.
bool SeeVector(const Torch& torch, Object* vector, const Seen& x, Seen* seen) {
  if (vector == torch.none()) {
    *seen = Seen();
    return true;
  }
  return See(torch, vector, seen) && seen->device == x.device && seen->dimensions == 1 &&
         seen->sizes[0] == x.sizes[1] && IsChannelsFirst(torch, vector);
}

// Returns None, also after torch's own error, which the close look finds again. Others, such as Ctrl-C, stay.
Object* Unusual(const Torch& torch) {
  if (functions.err_occurred() != nullptr) {
    if (functions.err_exception_matches(torch.runtime_error()) == 0) return nullptr;
    functions.err_clear();
  }
  return functions.build_value("");
}

Object* BadArguments() {
  functions.err_bad_argument();
  return nullptr;
}

}  // namespace

// (x, weight, bias, running_mean, running_var) -> whether x's channels are innermost, the members of a struct Tensor
// for x, and those of the structs Vector for the others; or None.
Object* ForwardSight(Object* self, Object* const* given, intptr_t count) {
  constexpr intptr_t kVectors = 4;
  if (count != 1 + kVectors) return BadArguments();
  const Torch torch(self);
  Seen x;
  if (!See(torch, given[0], &x) || x.dimensions < 2) return Unusual(torch);
  const bool channels_last = !IsChannelsFirst(torch, given[0]);
  if (channels_last && !IsChannelsLast(torch, given[0], x)) return Unusual(torch);
  std::array<Seen, kVectors> v;
  for (intptr_t i = 0; i < kVectors; ++i) {
    if (!SeeVector(torch, given[1 + i], x, &v[i])) return Unusual(torch);
  }
  const int layout = channels_last ? SYNCBN_CHANNELS_LAST : SYNCBN_CHANNELS_FIRST;
  const int device = x.device == kOnCpu ? SYNCBN_DEVICE_CPU : SYNCBN_DEVICE_CUDA;
  const int index = x.device == kOnCpu ? 0 : static_cast<int>(x.device);
  return functions.build_value("i(KLLLiiii)(KiKiKiKi)", channels_last ? 1 : 0, x.address, x.sizes[0], x.sizes[1],
                               x.elements() / (x.sizes[0] * x.sizes[1]), x.type, layout, device, index, v[0].address,
                               v[0].type, v[1].address, v[1].type, v[2].address, v[2].type, v[3].address, v[3].type);
}

// (dy, x, shape, dtype, device, channels_last, weight, weight_shape, weight_dtype) -> the addresses of dy and x, which
// have that shape, type and layout and are on that device, -1 or CUDA's index, and the members of a struct Vector for
// the weight; or None.
Object* BackwardSight(Object* self, Object* const* given, intptr_t count) {
  if (count != 9) return BadArguments();
  const Torch torch(self);
  const bool channels_last = functions.object_is_true(given[5]) == 1;
  Seen form;
  form.device = functions.long_as_long_long(given[4]);
  if (!SeeForm(torch, given[3], given[2], &form)) return Unusual(torch);
  std::array<Seen, 2> seen;
  for (size_t i = 0; i < seen.size(); ++i) {
    if (!See(torch, given[i], &seen[i]) || !seen[i].HasFormOf(form)) return Unusual(torch);
    if (!(channels_last ? IsChannelsLast(torch, given[i], seen[i]) : IsChannelsFirst(torch, given[i])))
      return Unusual(torch);
  }
  Seen weight;
  if (given[6] != torch.none() || given[7] != torch.none()) {
    Seen weight_form;
    weight_form.device = form.device;
    if (!SeeForm(torch, given[8], given[7], &weight_form) || !See(torch, given[6], &weight)) return Unusual(torch);
    if (!weight.HasFormOf(weight_form) || !IsChannelsFirst(torch, given[6])) return Unusual(torch);
  }
  return functions.build_value("KK(Ki)", seen[0].address, seen[1].address, weight.address, weight.type);
}

}  // namespace syncbn::python
