"""The names of Synchronized-BatchNorm-PyTorch, over the statistics service.

    from syncbn.torch.compat import SynchronizedBatchNorm2d, DataParallelWithCallback, convert_model

DataParallelWithCallback runs the replicas of this process on threads; they are one worker to other processes. Epsilon
clamps the variance in training and is added to it in evaluation, as in the original.
"""

import contextlib
import functools
from typing import Any, List, Optional, Sequence

import torch
from torch.nn.parallel import gather, replicate
from torch.nn.parallel.scatter_gather import scatter_kwargs

from syncbn.core import Worker, default_worker
from syncbn.torch import _replicas
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

    Parameters and buffers stay the same objects, and layers are named by their path in the model. A LazyBatchNorm*d
    becomes a syncbn.torch.LazySyncBatchNorm.
    """
    if isinstance(module, torch.nn.DataParallel):
        return DataParallelWithCallback(convert_model(module.module, worker), module.device_ids or None)

    def convert(candidate: Any, path: str) -> torch.nn.Module:
        for plain, synchronized in _KINDS.items():
            if isinstance(candidate, plain) or getattr(candidate, "cls_to_become", None) is plain:
                return _to_synchronized(candidate, worker, _eps_mode, path or "batch_norm", synchronized)
        return candidate

    return _rewrite(module, "", convert, {})


def _chunks(value: Any, parts: int) -> List[Any]:
    """A tensor, or what holds tensors, cut along the first dimension; anything else is the same for each part."""
    if isinstance(value, torch.Tensor):
        return list(value.chunk(parts))
    if isinstance(value, (list, tuple)) and value:
        return [type(value)(items) for items in zip(*(_chunks(item, parts) for item in value))]
    if isinstance(value, dict) and value:
        return [dict(zip(value, items)) for items in zip(*(_chunks(item, parts) for item in value.values()))]
    return [value] * parts


def _joined(parts: List[Any]) -> Any:
    """The replicas' outputs as one."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat([part.reshape(1) if part.dim() == 0 else part for part in parts])
    if isinstance(parts[0], (list, tuple)):
        return type(parts[0])(_joined(list(items)) for items in zip(*parts))
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return parts[0]


class DataParallelWithCallback(torch.nn.Module):
    """Cuts a batch into parts for the replicas of `module`, which run on threads, and joins their outputs.

    The replicas' synchronized layers merge their statistics in this process, and send one contribution to the master:
    they are one worker together. One backward pass through the joined output goes through all of them.

    Args:
      module: layers without a name are named by their path in it.
      device_ids: a replica on each of these CUDA devices, as in torch.nn.DataParallel. None: all, if the module is on
        one; one replica otherwise.
      output_device: where the output goes; default: the first of them.
      replicas: how many, for a module on the CPU, whose replicas share its parameters.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        device_ids: Optional[Sequence[Any]] = None,
        output_device: Any = None,
        dim: int = 0,
        *,
        replicas: int = 1,
    ) -> None:
        super().__init__()
        if dim != 0:
            raise ValueError("the batch is the first dimension")
        if replicas < 1:
            raise ValueError("replicas is 1 at least")
        self.module = module
        on_cuda = any(parameter.is_cuda for parameter in module.parameters())
        if device_ids is None:
            device_ids = range(torch.cuda.device_count()) if on_cuda else ()
        self.device_ids = list(device_ids) if on_cuda else []
        self.output_device = output_device if output_device is not None or not on_cuda else self.device_ids[0]
        self.replicas = replicas
        for path, layer in module.named_modules():
            if isinstance(layer, SyncBatchNorm) and layer.layer is None:
                layer.layer = path or "batch_norm"

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if len(self.device_ids) > 1:
            scattered, more = scatter_kwargs(inputs, options, self.device_ids)
            modules = replicate(self.module, self.device_ids[: len(scattered)], not torch.is_grad_enabled())
            return gather(self._run(modules, list(scattered), list(more)), self.output_device)
        if self.replicas == 1 or not self.training:
            return self.module(*inputs, **options)
        parts = list(zip(_chunks(inputs, self.replicas), _chunks(options, self.replicas)))
        scattered, more = [part[0] for part in parts], [part[1] for part in parts]
        return _joined(self._run([self.module] * len(parts), scattered, more))

    def _run(self, modules: Any, inputs: List[Any], options: List[Any]) -> List[Any]:
        layers = (m for m in self.module.modules() if isinstance(m, SyncBatchNorm))
        # Taken on this thread: the replicas' own have no worker.
        worker = default_worker() if self.training and any(layer.worker is None for layer in layers) else None
        calls = [
            functools.partial(self._call, *call)
            for call in zip(modules, inputs, options, self.device_ids or [None] * len(inputs))
        ]
        return _replicas.Group(len(calls), worker).run(calls)

    @staticmethod
    def _call(module: Any, inputs: Any, options: Any, device: Any) -> Any:
        with torch.cuda.device(device) if device is not None else contextlib.nullcontext():
            return module(*inputs, **options)


def patch_replication_callback(data_parallel: torch.nn.Module) -> torch.nn.Module:
    """In the original, lets the replicas of a DataParallel model find each other.

    Those of a DataParallelWithCallback do so by themselves. Those of torch's own class cannot, and are refused.
    """
    if isinstance(data_parallel, torch.nn.DataParallel) and len(data_parallel.device_ids or ()) > 1:
        raise ValueError("the replicas of a DataParallel model do not meet: make it a DataParallelWithCallback")
    return data_parallel
