"""The names of Synchronized-BatchNorm-PyTorch, over the statistics service.

    from syncbn.torch.compat import SynchronizedBatchNorm2d, DataParallelWithCallback, convert_model

What was a replica of a DataParallel model is now a worker: a process (or a thread) with its own model. Epsilon clamps
the variance in training and is added to it in evaluation, as in the original.
"""

from typing import Any, Optional

import torch

from syncbn.core import Worker
from syncbn.torch.modules import SyncBatchNorm, _rewrite, _to_synchronized

__all__ = [
    "DataParallelWithCallback",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "convert_model",
    "patch_replication_callback",
    "set_sbn_eps_mode",
]

_eps_mode = "clamp"


def set_sbn_eps_mode(mode: str) -> None:
    """Sets the epsilon mode ("clamp" or "plus") of the layers made from now on."""
    global _eps_mode
    if mode not in ("clamp", "plus"):
        raise ValueError(f'the mode is "clamp" or "plus", not {mode!r}')
    _eps_mode = "add" if mode == "plus" else "clamp"


class _SynchronizedBatchNorm(SyncBatchNorm):
    ranks = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        worker: Optional[Worker] = None,
        layer: Optional[str] = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, worker=worker, layer=layer, eps_mode=_eps_mode
        )

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if str(input.dim()) not in self.ranks:
            raise ValueError(f"expected {' or '.join(self.ranks)}D input (got {input.dim()}D input)")
        super()._check_input_dim(input)


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm):
    """For [N, C] and [N, C, L]."""

    ranks = "23"


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm):
    """For [N, C, H, W]."""

    ranks = "4"


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm):
    """For [N, C, D, H, W]."""

    ranks = "5"


_KINDS = {
    torch.nn.BatchNorm1d: SynchronizedBatchNorm1d,
    torch.nn.BatchNorm2d: SynchronizedBatchNorm2d,
    torch.nn.BatchNorm3d: SynchronizedBatchNorm3d,
}


def convert_model(module: torch.nn.Module, worker: Optional[Worker] = None) -> torch.nn.Module:
    """Replaces torch.nn.BatchNorm*d with SynchronizedBatchNorm*d, and DataParallel with DataParallelWithCallback.

    Parameters and buffers stay the same objects, and layers are named by their path in the model.
    """
    if isinstance(module, torch.nn.DataParallel):
        return DataParallelWithCallback(convert_model(module.module, worker))

    def convert(candidate: torch.nn.Module, path: str) -> torch.nn.Module:
        for plain, synchronized in _KINDS.items():
            if isinstance(candidate, plain):
                return _to_synchronized(candidate, worker, _eps_mode, path or "batch_norm", synchronized)
        return candidate

    return _rewrite(module, "", convert, {})


class DataParallelWithCallback(torch.nn.Module):
    """Stands where DataParallel stood: `module`, and the call. This process is one worker; nothing is replicated in it.

    The arguments about devices are accepted and do nothing.
    """

    def __init__(
        self, module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, dim: int = 0
    ) -> None:
        super().__init__()
        if dim != 0:
            raise ValueError("the batch is the first dimension")
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


def patch_replication_callback(data_parallel: torch.nn.Module) -> torch.nn.Module:
    """In the original, lets the replicas of a DataParallel model find each other. Workers do so by themselves.

    A model that torch would replicate inside this process is refused: its replicas would be one worker.
    """
    if isinstance(data_parallel, torch.nn.DataParallel) and len(data_parallel.device_ids or ()) > 1:
        raise ValueError("a DataParallel model of several devices would be one worker: run a process for each device")
    return data_parallel
