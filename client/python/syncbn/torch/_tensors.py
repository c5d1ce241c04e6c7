"""torch tensors as the C interface sees them: addresses, without a copy where the memory is dense."""

from typing import Any, Callable, Optional, Tuple

import torch
from torch.autograd import forward_ad

from syncbn import _calls, _library
from syncbn._library import Tensor, Vector
from syncbn.torch._supported import PLAIN, TYPES, dispatch_modes, in_memory, is_zero_tensor, tracing_state

_torch: Any = torch  # Where the hints of torch's versions differ.

_CHANNELS_LAST = torch.channels_last

# Below this many elements the threads cost more than they save.
_ELEMENTS_PER_THREAD = 1 << 16

# The number of channels, the types of a layer's weight and bias, -1 for one that is absent, and where the input is: the
# device of its struct Tensor, and the index.
Types = Tuple[int, int, int, int, int]

# The result of `at_sight`: whether x's channels are innermost, a struct Tensor for x, structs Vector for the other tensors,
# one after the other, and types.
Sight = Tuple[bool, bytes, bytes, Types]


def at_sight(
    x: torch.Tensor,
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
) -> Optional[Sight]:
    """Describes x and the layer's vectors if all are what nearly every call has: plain tensors on one device with values, dense
    in memory of their own, and a vector an element of one dimension for each channel. None: `check_supported` and the layer
    have to look closely, and say what is wrong, if anything.
    """
    if tracing_state() is not None or dispatch_modes() or getattr(forward_ad, "_current_level", -1) >= 0:
        return None
    sight: Optional[Sight] = forward_sight(x, weight, bias, running_mean, running_var)
    return sight


# dx, d_weight, d_bias and d_z, those that are needed.
Gradients = Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]

# Arguments of a backward pass: the gradients, in memory that is still to be written; the structs BackwardInputs and
# BackwardOutputs; and what has to live until it is written.
Backward = Tuple[Gradients, bytes, bytes, Any]

# Objects that the functions of client/c/python_tensors.cc keep, in its order.
_SIGHT = (
    None,
    RuntimeError,
    torch.Tensor,
    torch.nn.Parameter,
    TYPES,
    "shape",
    "dtype",
    "is_cpu",
    _torch.Tensor.data_ptr,
    _torch.Tensor.is_neg,
    _torch.Tensor.is_contiguous,
    {"memory_format": _CHANNELS_LAST},
    "is_cuda",
    _torch.Tensor.get_device,
    torch.empty_like,
)


def _unseen(*given: Any) -> None:
    """Sees nothing, in an interpreter without the library's functions: every tensor is looked at closely."""


# backward_sight(dy, x, weight, shape, tensor, types, needed, gate) returns the `Backward` of what autograd hands to a backward
# pass, if all is as nearly every call has it: as `at_sight` says of the forward pass, of x's shape and struct Tensor then,
# and of those types. needed: whether the gradients of x, weight, bias and z are. gate: of a ReLU. None: look closely.
forward_sight: Any = _unseen
backward_sight: Any = _unseen
if _calls.function is not None:
    forward_sight, backward_sight = _calls.function("forward_sight", _SIGHT), _calls.function("backward_sight", _SIGHT)


def is_channels_last(x: torch.Tensor) -> bool:
    """Dense with the channels innermost, and not dense with them in second place as well."""
    return x.dim() > 2 and not x.is_contiguous() and _is_dense(x, True)


def _is_dense(x: torch.Tensor, channels_last: bool) -> bool:
    """Returns True if the strides are those of memory without gaps, in that layout."""
    if not channels_last:
        return x.is_contiguous()
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself if it is dense in that layout, else a copy that is. Differentiable."""
    if x.is_neg():
        x = x.resolve_neg()
    if is_zero_tensor(x):  # It has no memory.
        x = x.clone()
    if channels_last:
        return x if _is_dense(x, True) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def _address_at_sight(x: torch.Tensor, channels_last: bool) -> int:
    """The address of a tensor's elements if the library can take it as it is, in that layout; 0: look at it closely."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_neg():
        return 0
    if not (_is_dense(x, True) if channels_last else x.is_contiguous()):
        return 0
    try:
        return x.data_ptr()
    except RuntimeError:  # A wrapper without memory of its own, as torch.func and both kinds of vmap make them.
        return 0


class Form:
    """The shape, type and device of a tensor, which another one must have to take its place."""

    __slots__ = ("shape", "dtype", "device", "on_cpu")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device, self.on_cpu = shape, dtype, device, device.type == "cpu"

    def is_of(self, x: torch.Tensor) -> bool:
        on_device = x.is_cpu if self.on_cpu else x.device == self.device  # A device is an object made anew each time.
        return on_device and x.dtype == self.dtype and x.shape == self.shape

    def check(self, name: str, x: torch.Tensor) -> None:
        if not self.is_of(x):
            raise RuntimeError(
                f"{name} is {tuple(x.shape)}, {x.dtype}, on {x.device}, where SyncBatchNorm saved {tuple(self.shape)}, "
                f"{self.dtype}, on {self.device}: a saved-tensor hook must give back what it was given"
            )


def form(x: Optional[torch.Tensor]) -> Optional[Form]:
    return None if x is None else Form(x.shape, x.dtype, x.device)


def _form(shape: torch.Size, kind: int, device: int, index: int) -> Form:
    """Returns the form with this shape, by the library's numbers of types and devices."""
    dtype = next(dtype for dtype, number in TYPES.items() if number == kind)
    return Form(shape, dtype, torch.device("cpu") if device == _library.DEVICE_CPU else torch.device("cuda", index))


def tensor_form(shape: torch.Size, packed: bytes) -> Form:
    """Returns the form of a tensor of that shape, which a struct Tensor describes."""
    *_, kind, _, device, index = _library.TENSOR.unpack(packed)
    return _form(shape, kind, device, index)


def vector_forms(types: Types) -> Tuple[Optional[Form], ...]:
    """Returns the forms of a weight and a bias that `at_sight` has described so."""
    channels, *kinds, device, index = types
    return tuple(None if kind < 0 else _form(torch.Size([channels]), kind, device, index) for kind in kinds)


def given_back(name: str, x: torch.Tensor, form: Form, channels_last: bool) -> torch.Tensor:
    """Returns the tensor that autograd hands to a backward pass, dense in that layout.

    A saved tensor may come through hooks (torch.autograd.graph.saved_tensors_hooks), a gradient through formulas that
    expand, negate or zero: their strides, their class and their memory are anything. Shape, type and device are not.
    """
    if not form.is_of(x):
        form.check(name, x)
    if not torch.is_grad_enabled() and _address_at_sight(x, channels_last):
        return x
    return dense(in_memory(x), channels_last)


def vector_given_back(name: str, x: Optional[torch.Tensor], form: Optional[Form]) -> Optional[torch.Tensor]:
    """As `given_back`, a weight."""
    if x is None or form is None:
        return None
    form.check(name, x)
    return readable(x)


def readable(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """A parameter or a buffer, contiguous; a copy where it is not."""
    if x is None or _address_at_sight(x, False):
        return x
    return dense(in_memory(x), False)


def readable_vector(x: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], bytes]:
    """Returns what `readable` does, and a struct Vector for it."""
    x = readable(x)
    return x, packed_vector(x)


def count_address(count: Optional[torch.Tensor], x: torch.Tensor) -> int:
    """The address of a buffer like num_batches_tracked, if a pass over x can read and write it as it is; else 0."""
    if count is None or count.dtype is not torch.int64 or count.numel() != 1 or count.device != x.device:
        return 0
    return _address_at_sight(count, False)


def readable_as(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A tensor of [batch, channels, ...], dense in that layout; a copy where it is not."""
    return dense(in_memory(x), channels_last)


def write_back(buffer: Optional[torch.Tensor], updated: Optional[torch.Tensor]) -> None:
    """Ends an update of what `readable` has made of a buffer, which may be a copy."""
    if buffer is None or updated is None or updated is buffer or updated.data_ptr() == buffer.data_ptr():
        return
    with torch.no_grad():
        buffer.copy_(updated)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A plain tensor with the strides of x, which is dense."""
    if type(x) in PLAIN:
        return torch.empty_like(x, requires_grad=False)
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def address(x: torch.Tensor, channels_last: bool) -> Optional[int]:
    """Returns the address of a tensor's elements if it is dense in that layout; None if it has no elements.

    Every address goes here, but for those of tensors that this package has just made or found to be readable.
    """
    if not _is_dense(x, channels_last) or x.is_neg():
        raise RuntimeError("SyncBatchNorm: the memory of a tensor is not dense")
    return x.data_ptr() or None


def described(x: torch.Tensor) -> Tuple[torch.Tensor, bool, bytes]:
    """x, or a copy that is dense; whether its channels are innermost; a struct Tensor. Differentiable."""
    at = _address_at_sight(x, False)
    channels_last = False
    if not at:
        channels_last = is_channels_last(x)
        x = dense(x, channels_last)
        at = address(x, channels_last) or 0
    return x, channels_last, _library.TENSOR.pack(*_members(x, channels_last, at))


def _members(x: torch.Tensor, channels_last: bool, at: int) -> Tuple[int, ...]:
    batch, channels, *sizes = x.shape
    spatial = 1
    for size in sizes:
        spatial *= size
    on_cpu = x.is_cpu
    return (
        at,
        batch,
        channels,
        spatial,
        TYPES[x.dtype],
        _library.CHANNELS_LAST if channels_last else _library.CHANNELS_FIRST,
        _library.DEVICE_CPU if on_cpu else _library.DEVICE_CUDA,
        0 if on_cpu else x.device.index or 0,
    )


def describe(x: torch.Tensor, channels_last: bool) -> Tensor:
    """A dense x of [batch, channels, ...] for the C interface."""
    return Tensor(*_members(x, channels_last, address(x, channels_last) or 0))


def packed_vector(x: Optional[torch.Tensor]) -> bytes:
    """A struct Vector for a parameter or buffer that `readable` has returned, or a new one; None: absent."""
    return NO_VECTOR if x is None else _library.VECTOR.pack(x.data_ptr(), TYPES[x.dtype])


NO_VECTOR = _library.VECTOR.pack(0, _library.FLOAT32)


def vector(tensor: Optional[torch.Tensor], x: torch.Tensor) -> Vector:
    """A contiguous parameter or buffer for a pass over x, [batch, channels, ...]; None: absent."""
    if tensor is None:
        return Vector(None, _library.FLOAT32)
    if tensor.numel() != x.shape[1]:
        raise RuntimeError(f"a parameter has {tensor.numel()} elements, and the input {x.shape[1]} channels")
    if tensor.device != x.device:
        raise RuntimeError(f"the input is on {x.device}, and a parameter on {tensor.device}")
    return Vector(address(tensor, False), TYPES[tensor.dtype])


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to a floating-point type, rounded once: torch's own way to half types is by float32, which rounds twice."""
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    # Rounded to odd in float32, no half way point of the half type can arise that was none.
    single = x.float()
    error = x - single.double()
    even = (single.view(torch.int32) & 1) == 0
    towards = torch.full_like(single, float("inf")).copysign(error.float())
    return torch.where((error != 0) & even & single.isfinite(), single.nextafter(towards), single).to(dtype)


# The current stream of a device, by its index, without an object around it.
_raw_stream: Optional[Callable[[int], int]] = getattr(_torch._C, "_cuda_getCurrentRawStream", None)


def execution(x: torch.Tensor) -> Tuple[int, Optional[int]]:
    """Returns the number of threads of a pass over x, and its CUDA stream. The library makes x's device the current one."""
    if not x.is_cuda:
        return threads(x.numel()), None
    if _raw_stream is None:
        return 1, torch.cuda.current_stream(x.device).cuda_stream
    return 1, _raw_stream(x.get_device())


def threads(elements: int) -> int:
    """The number of threads of a pass over so many elements on the CPU."""
    most = elements // _ELEMENTS_PER_THREAD
    return min(most, torch.get_num_threads()) if most > 1 else 1
