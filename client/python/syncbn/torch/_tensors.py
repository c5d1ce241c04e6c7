"""torch tensors as the C interface sees them: addresses, without a copy where the memory is dense."""

import contextlib
from typing import Any, ContextManager, Optional, Tuple

import torch

from syncbn import _library
from syncbn._library import Tensor, Vector

_TYPES = {
    torch.float32: _library.FLOAT32,
    torch.float64: _library.FLOAT64,
    torch.float16: _library.FLOAT16,
    torch.bfloat16: _library.BFLOAT16,
}

# Below this many elements the threads cost more than they save.
_ELEMENTS_PER_THREAD = 1 << 16


def type_of(tensor: torch.Tensor) -> int:
    try:
        return _TYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"SyncBatchNorm takes float16, bfloat16, float32 and float64, not {tensor.dtype}") from None


def is_channels_last(x: torch.Tensor) -> bool:
    """Dense with the channels innermost, and not dense with them in second place as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself if it is dense in that layout, else a copy that is."""
    if channels_last:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Of the strides of x, which is dense."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def describe(x: torch.Tensor, channels_last: bool) -> Tensor:
    """A dense x of [batch, channels, ...] for the C interface."""
    batch, channels = x.shape[0], x.shape[1]
    spatial = 1
    for size in x.shape[2:]:
        spatial *= size
    if x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"SyncBatchNorm takes tensors on cpu and cuda, not on {x.device}")
    return Tensor(
        x.data_ptr() or None,
        batch,
        channels,
        spatial,
        type_of(x),
        _library.CHANNELS_LAST if channels_last else _library.CHANNELS_FIRST,
        _library.DEVICE_CUDA if x.is_cuda else _library.DEVICE_CPU,
        x.device.index or 0,
    )


def vector(tensor: Optional[torch.Tensor]) -> Vector:
    """A parameter or a buffer, contiguous; None: absent."""
    if tensor is None:
        return Vector(None, _library.FLOAT32)
    if not tensor.is_contiguous():
        raise ValueError("SyncBatchNorm's parameters and buffers must be contiguous")
    return Vector(tensor.data_ptr(), type_of(tensor))


def execution(x: torch.Tensor) -> Tuple[ContextManager[Any], int, Optional[int]]:
    """Where a pass over x runs: the device to make current, the number of threads, the CUDA stream."""
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "SyncBatchNorm cannot be captured into a CUDA graph: a replay would not synchronize with the other workers"
            )
        return torch.cuda.device(x.device), 1, torch.cuda.current_stream(x.device).cuda_stream
    threads = max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))
    return contextlib.nullcontext(), threads, None
