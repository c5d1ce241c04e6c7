"""Tensors that a training layer takes: those with values of four types, in memory of their own. Any others are refused."""

from typing import Any, Callable, Dict, Optional

import torch
from torch.autograd import forward_ad

from syncbn import _library

_torch: Any = torch  # Where the hints of torch's versions differ.


class UnsupportedTensor(TypeError, RuntimeError):
    """A tensor that a pass cannot read: a wrong argument, for which torch's own layers raise RuntimeError."""


class _Types(Dict[torch.dtype, int]):
    """The library's numbers for torch's types; UnsupportedTensor for types that it does not take."""

    def __missing__(self, dtype: torch.dtype) -> int:
        raise UnsupportedTensor(f"syncbn.torch takes float16, bfloat16, float32 and float64, not {dtype}")


TYPES = _Types(
    {
        torch.float32: _library.FLOAT32,
        torch.float64: _library.FLOAT64,
        torch.float16: _library.FLOAT16,
        torch.bfloat16: _library.BFLOAT16,
    }
)


# Tells a wrapper of torch.func (functorch, before torch 2).
_transformed: Callable[[torch.Tensor], bool] = getattr(
    getattr(_torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda x: False
)
is_zero_tensor: Callable[[torch.Tensor], bool] = _torch.Tensor._is_zerotensor

tracing_state: Callable[[], Any] = _torch._C._get_tracing_state
# The number of modes that see each operation, such as make_fx's, a counter of operations or a checkpoint's.
dispatch_modes: Callable[[], int] = getattr(_torch._C, "_len_torch_dispatch_stack", lambda: 0)
_ADVICE = "; put the layer into evaluation (eval()), which is local, or run it outside"

# Classes whose objects have their elements in memory of their own, if their layout is strided.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def check_supported(*tensors: Optional[torch.Tensor]) -> None:
    """Raises UnsupportedTensor for an input or a parameter of a training layer that has no values, or not in memory of
    its own, and within torch.jit.trace and make_fx. Before the round, so that no other worker waits for one that cannot go
    on.
    """
    check_modes()
    if tracing_state() is not None:
        text = "SyncBatchNorm in training cannot be recorded by torch.jit.trace, which add_graph and exporters use as well"
        raise UnsupportedTensor(text + _ADVICE)
    differentiates_forward = getattr(forward_ad, "_current_level", -1) >= 0
    for x in tensors:
        if x is None:
            continue
        usual = (  # As nearly every tensor is.
            not differentiates_forward
            and type(x) in PLAIN
            and (x.is_cpu or x.is_cuda)
            and x.dtype in TYPES
            and x.layout is torch.strided
            and not _transformed(x)
            and _has_memory(x)
        )
        if not usual:
            _check_supported(x)


def check_modes() -> None:
    """Refuses make_fx over tensors with values: its graph would have the memory of y without what a round writes there. To be
    called in backward passes too, which may be recorded alone.
    """
    for i in range(dispatch_modes()):
        mode: Any = _torch._C._get_dispatch_stack_at(i)
        if any(kind.__name__ == "ProxyTorchDispatchMode" for kind in type(mode).__mro__):
            raise UnsupportedTensor(f"SyncBatchNorm in training cannot be recorded by make_fx{_ADVICE}")


def _check_supported(x: torch.Tensor) -> None:
    if x.device.type not in ("cpu", "cuda"):
        if x.device.type == "meta":
            raise UnsupportedTensor(f"SyncBatchNorm in training needs values, which a meta tensor has not{_ADVICE}")
        raise UnsupportedTensor(f"syncbn.torch takes tensors on cpu and cuda, not on {x.device}")
    TYPES[x.dtype]
    if x.layout != torch.strided:
        raise UnsupportedTensor(f"syncbn.torch takes dense tensors, not {x.layout}")
    if any(kind.__name__ in ("FakeTensor", "FunctionalTensor") for kind in type(x).__mro__):
        raise UnsupportedTensor(f"SyncBatchNorm in training needs values, which a {type(x).__name__} has not{_ADVICE}")
    if _transformed(x):
        text = "SyncBatchNorm in training does not go with torch.func (vmap, grad, jvp, functionalize): a round with the "
        raise UnsupportedTensor(text + f"other workers cannot be transformed. Use torch.autograd.grad{_ADVICE}")
    if getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        text = "SyncBatchNorm in training has no forward-mode derivative: use reverse mode (torch.autograd.grad)"
        raise UnsupportedTensor(text + _ADVICE)
    in_memory(x)


_BATCHED = (
    "SyncBatchNorm cannot go back under vmap (is_grads_batched=True, vectorize=True), since a round with the other workers "
    "is of one gradient: go back with the gradients one after another"
)


def _has_memory(x: torch.Tensor) -> bool:
    """Returns False if a plain tensor's elements are nowhere: those of a wrapper, or of a storage that has been freed."""
    try:
        return x.data_ptr() != 0 or x.numel() == 0 or is_zero_tensor(x)
    except RuntimeError:  # A wrapper of torch.func's.
        return False


def _without_memory(x: torch.Tensor) -> UnsupportedTensor:
    return UnsupportedTensor(
        f"SyncBatchNorm in training takes tensors with memory of their own, which a {type(x).__name__} of shape "
        f"{tuple(x.shape)} has not: it wraps others, as a DTensor does, whose to_local() has memory, or its storage has been "
        "freed"
    )


def in_memory(x: torch.Tensor) -> torch.Tensor:
    """The same values as a plain tensor with elements in memory; not differentiable. Errors: UnsupportedTensor for a tensor
    that has none, which the library would take for an absent one."""
    try:
        found = x.detach()
    except RuntimeError as error:  # As the batches of torch's first vmap are, they cannot be told by any attribute.
        raise UnsupportedTensor(_BATCHED) from error
    if _transformed(found):
        raise UnsupportedTensor(_BATCHED)
    if type(found) is not torch.Tensor:
        try:
            found = found.as_subclass(torch.Tensor)
        except RuntimeError as error:  # A wrapper, in older versions of torch.
            raise _without_memory(x) from error
    if found.layout != torch.strided:
        found = found.to_dense()
    if not _has_memory(found):
        raise _without_memory(x)
    return found
