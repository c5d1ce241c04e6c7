// Descriptions of torch's tensors for passes over them, as functions of Python: where a tensor's elements are, and what
// they are, if it is as nearly every one is. In Python the same takes a fifth of all that a layer's step does.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
  Object* empty_like() const { return Item(14); }     // A function.

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

// A tensor's shape, as its attribute has it.
bool SeeShape(Object* shape, Seen* seen) {
  if (shape == nullptr) return false;
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
  const Reference on_cpu(functions.object_get_attr(tensor, torch.is_cpu()));
  if (on_cpu.get() == nullptr) return false;  // Nothing more is asked with an exception.
  if (functions.object_is_true(on_cpu.get()) == 1) {
    *device = kOnCpu;
    return true;
  }
  if (!Yes(Reference(functions.object_get_attr(tensor, torch.is_cuda())))) return false;
  const Reference index(Ask(torch.get_device(), tensor));
  if (index.get() == nullptr) return false;
  *device = functions.long_as_long_long(index.get());
  return *device >= 0;
}

// Returns false, with or without an exception, for a wrapper without memory of its own, and for a tensor of another
// layout or without elements.
bool SeeAddress(const Torch& torch, Object* tensor, uint64_t* address) {
  const Reference answer(Ask(torch.data_ptr(), tensor));
  if (answer.get() == nullptr) return false;
  *address = reinterpret_cast<uint64_t>(functions.long_as_void_ptr(answer.get()));
  return *address != 0;
}

// Returns false, with or without an exception, if the tensor is unusual. Its strides are not looked at.
bool See(const Torch& torch, Object* tensor, Seen* seen) {
  if (!IsPlain(torch, tensor)) return false;
  if (!SeeDevice(torch, tensor, &seen->device)) return false;
  if (!SeeAddress(torch, tensor, &seen->address)) return false;
  const Reference negative(Ask(torch.is_neg(), tensor));
  if (negative.get() == nullptr || functions.object_is_true(negative.get()) != 0) return false;
  const Reference dtype(functions.object_get_attr(tensor, torch.dtype()));
  Object* const number = dtype.get() == nullptr ? nullptr : functions.dict_get_item(torch.types(), dtype.get());
  if (number == nullptr) return false;
  seen->type = static_cast<int32_t>(functions.long_as_long_long(number));
  const Reference shape(functions.object_get_attr(tensor, torch.shape()));
  return SeeShape(shape.get(), seen);
}

bool IsChannelsFirst(const Torch& torch, Object* tensor) { return Yes(Reference(Ask(torch.is_contiguous(), tensor))); }

bool IsChannelsLast(const Torch& torch, Object* tensor, const Seen& seen) {
  if (seen.dimensions != 4) return false;
  const Reference arguments(functions.build_value("(O)", tensor));
  if (arguments.get() == nullptr) return false;
  return Yes(Reference(functions.object_call(torch.is_contiguous(), arguments.get(), torch.channels_last())));
}

// One element of one dimension for each channel, on that device, or none at all.
bool SeeVector(const Torch& torch, Object* vector, int64_t channels, int64_t device, Seen* seen) {
  if (vector == torch.none()) {
    *seen = Seen();
    return true;
  }
  return See(torch, vector, seen) && seen->device == device && seen->dimensions == 1 && seen->sizes[0] == channels &&
         IsChannelsFirst(torch, vector);
}

constexpr int kAbsent = -1;  // In the place of a type.

int TypeOf(const Seen& vector) { return vector.address == 0 ? kAbsent : vector.type; }

// Sets no more than the members, so that the bytes between them stay 0.
void Set(uint64_t address, int32_t type, syncbn_vector* vector) {
  vector->data = reinterpret_cast<void*>(address);
  vector->type = type;
}

template <typename Struct>
Object* Packed(const Struct& value) {
  static_assert(std::is_trivially_copyable_v<Struct>);
  return functions.bytes_from_string_and_size(reinterpret_cast<const char*>(&value), sizeof(value));
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

// The tensors that autograd hands to a backward pass, and the gradients that the pass writes.
class BackwardTensors {
 public:
  // given: BackwardSight's arguments.
  BackwardTensors(const Torch& torch, Object* const* given)
      : torch_(torch), dy_(given[0]), x_(given[1]), weight_(given[2]), gate_(given[7]), gated_(gate_ != torch.none()) {}

  // Looks at the tensors. Returns false, with or without an exception, if they are not what the forward pass had, or
  // are unusual.
  bool See(Object* shape, Object* packed, Object* types) {
    intptr_t size = 0;
    char* bytes = nullptr;
    if (functions.bytes_as_string_and_size(packed, &bytes, &size) != 0 || size != sizeof(form_)) return false;
    std::memcpy(&form_, bytes, sizeof(form_));
    Seen form;
    form.type = form_.type;
    form.device = form_.device == SYNCBN_DEVICE_CPU ? kOnCpu : form_.device_index;
    if (!SeeShape(shape, &form) || !SeeAlike(dy_, form, &dy_seen_) || !SeeAlike(x_, form, &x_seen_)) return false;
    weight_type_ = static_cast<int>(functions.long_as_long_long(functions.tuple_get_item(types, 1)));
    bias_type_ = static_cast<int>(functions.long_as_long_long(functions.tuple_get_item(types, 2)));
    return SeeVector(torch_, weight_, form_.channels, form.device, &weight_seen_) &&
           TypeOf(weight_seen_) == weight_type_ && (!gated_ || SeeAddress(torch_, gate_, &gate_address_));
  }

  // Makes memory for the gradients. Returns false, with or without an exception, if there is none, or if the bias is
  // not of the weight's form.
  bool Make(Object* needed) {
    if (functions.tuple_size(needed) < 4) return false;
    const auto needs = [&](intptr_t i) { return functions.object_is_true(functions.tuple_get_item(needed, i)) == 1; };
    const bool needs_bias = needs(2) && bias_type_ != kAbsent;
    needs_x_ = needs(0);
    needs_z_ = needs(3);
    if (needs_bias && bias_type_ != weight_type_) return false;
    const bool fused_dz = gated_ && needs_z_;  // The library computes it beside dx alone. Else dz is dy.
    return (!(needs_x_ || fused_dz) || dx_.Make(torch_, x_)) && (!fused_dz || dz_.Make(torch_, x_)) &&
           (!(needs(1) && weight_type_ != kAbsent) || d_weight_.Make(torch_, weight_)) &&
           (!needs_bias || d_bias_.Make(torch_, weight_));
  }

  // Returns what BackwardSight does.
  Object* Result() const {
    syncbn_backward_inputs inputs = SYNCBN_BACKWARD_INPUTS_INIT;
    inputs.dy = form_;
    inputs.dy.data = reinterpret_cast<void*>(dy_seen_.address);
    inputs.x = reinterpret_cast<const void*>(x_seen_.address);
    Set(weight_seen_.address, weight_seen_.type, &inputs.weight);
    inputs.relu = gated_ ? 1 : 0;
    inputs.relu_mask = reinterpret_cast<const uint8_t*>(gate_address_);
    syncbn_backward_outputs outputs = SYNCBN_BACKWARD_OUTPUTS_INIT;
    outputs.dx = reinterpret_cast<void*>(dx_.address());
    outputs.d_residual = reinterpret_cast<void*>(dz_.address());
    Set(d_weight_.address(), weight_seen_.type, &outputs.d_weight);
    Set(d_bias_.address(), weight_seen_.type, &outputs.d_bias);
    const Reference packed_inputs(Packed(inputs));
    const Reference packed_outputs(Packed(outputs));
    if (packed_inputs.get() == nullptr || packed_outputs.get() == nullptr) return nullptr;
    Object* const dx = dx_.OrElse(torch_.none());
    Object* const dz = needs_z_ ? dz_.OrElse(dy_) : torch_.none();
    return functions.build_value("(OOOO)OOO", needs_x_ ? dx : torch_.none(), d_weight_.OrElse(torch_.none()),
                                 d_bias_.OrElse(torch_.none()), dz, packed_inputs.get(), packed_outputs.get(), dx);
  }

 private:
  // A gradient of another tensor's form, or none.
  class Gradient {
   public:
    // Returns false, with or without an exception, if no memory can be made.
    bool Make(const Torch& torch, Object* like) {
      tensor_.reset(Ask(torch.empty_like(), like));
      return tensor_.get() != nullptr && SeeAddress(torch, tensor_.get(), &address_);
    }
    Object* OrElse(Object* other) const { return tensor_.get() == nullptr ? other : tensor_.get(); }
    uint64_t address() const { return address_; }

   private:
    Reference tensor_{nullptr};
    uint64_t address_ = 0;
  };

  bool SeeAlike(Object* tensor, const Seen& form, Seen* seen) const {
    if (!python::See(torch_, tensor, seen) || !seen->HasFormOf(form)) return false;
    if (form_.layout == SYNCBN_CHANNELS_LAST) return IsChannelsLast(torch_, tensor, *seen);
    return IsChannelsFirst(torch_, tensor);
  }

  const Torch& torch_;
  Object* const dy_;
  Object* const x_;
  Object* const weight_;
  Object* const gate_;
  const bool gated_;
  uint64_t gate_address_ = 0;
  syncbn_tensor form_ = {};  // Of x in the forward pass.
  int weight_type_ = kAbsent;
  int bias_type_ = kAbsent;
  Seen dy_seen_, x_seen_, weight_seen_;
  bool needs_x_ = false;
  bool needs_z_ = false;
  Gradient dx_, d_weight_, d_bias_, dz_;
};

}  // namespace

// (x, weight, bias, running_mean, running_var) -> whether x's channels are innermost; a struct Tensor for x; the
// structs Vector for the others, one after the other; and the number of channels, the types of weight and bias, or -1
// for one that is absent, and the struct Tensor's device and its index. Or None.
Object* ForwardSight(Object* self, Object* const* given, intptr_t count) {
  constexpr intptr_t kVectors = 4;
  if (count != 1 + kVectors) return BadArguments();
  const Torch torch(self);
  Seen x;
  if (!See(torch, given[0], &x) || x.dimensions < 2) return Unusual(torch);
  const bool channels_last = !IsChannelsFirst(torch, given[0]);
  if (channels_last && (functions.err_occurred() != nullptr || !IsChannelsLast(torch, given[0], x))) {
    return Unusual(torch);
  }
  std::array<Seen, kVectors> seen;
  std::array<syncbn_vector, kVectors> vectors = {};
  for (intptr_t i = 0; i < kVectors; ++i) {
    if (!SeeVector(torch, given[1 + i], x.sizes[1], x.device, &seen[i])) return Unusual(torch);
    Set(seen[i].address, seen[i].type, &vectors[i]);
  }
  syncbn_tensor tensor = {};
  tensor.data = reinterpret_cast<void*>(x.address);
  tensor.batch = x.sizes[0];
  tensor.channels = x.sizes[1];
  tensor.spatial = x.elements() / (x.sizes[0] * x.sizes[1]);
  tensor.type = x.type;
  tensor.layout = channels_last ? SYNCBN_CHANNELS_LAST : SYNCBN_CHANNELS_FIRST;
  tensor.device = x.device == kOnCpu ? SYNCBN_DEVICE_CPU : SYNCBN_DEVICE_CUDA;
  tensor.device_index = x.device == kOnCpu ? 0 : static_cast<int32_t>(x.device);
  const Reference packed(Packed(tensor));
  const Reference packed_vectors(Packed(vectors));
  if (packed.get() == nullptr || packed_vectors.get() == nullptr) return nullptr;
  return functions.build_value("iOO(Liiii)", channels_last ? 1 : 0, packed.get(), packed_vectors.get(), x.sizes[1],
                               TypeOf(seen[0]), TypeOf(seen[1]), tensor.device, tensor.device_index);
}

// (dy, x, weight, shape of x, its struct Tensor, the tuple that ForwardSight ends with, which gradients are needed: of
// x, weight, bias and z; gate) -> dx, d_weight, d_bias and dz, those that are needed, in memory that is still to be
// written; the structs BackwardInputs and BackwardOutputs; and a tensor that has to live until it is. Or None. gate: of
// a ReLU that is part of the pass, else None.
Object* BackwardSight(Object* self, Object* const* given, intptr_t count) {
  if (count != 8) return BadArguments();
  const Torch torch(self);
  BackwardTensors tensors(torch, given);
  return tensors.See(given[3], given[4], given[5]) && tensors.Make(given[6]) ? tensors.Result() : Unusual(torch);
}

}  // namespace syncbn::python
