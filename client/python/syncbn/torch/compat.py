"""The names of Synchronized-BatchNorm-PyTorch, over the statistics service.

    from syncbn.torch.compat import SynchronizedBatchNorm2d, DataParallelWithCallback, convert_model

DataParallelWithCallback runs the replicas of this process on threads; they are one worker to other processes. Epsilon
clamps the variance in training over several workers or replicas; alone, and in evaluation, it is added, as in the
original.
"""

import contextlib
import functools
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from torch.nn.parallel import replicate

from syncbn.core import Worker, default_worker
from syncbn.torch import _batches, _replicas, _running, _synchronized, convert
from syncbn.torch.modules import LazySyncBatchNorm, SyncBatchNorm

__all__ = [
    "DataParallelWithCallback",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "convert_model",
    "patch_replication_callback",
    "patch_sync_batchnorm",
    "set_sbn_eps_mode",
]

_eps_mode = "clamp"


def set_sbn_eps_mode(mode: str) -> None:
    """Sets the epsilon mode ("clamp" or "plus") of all SynchronizedBatchNorm*d layers, those that there are included."""
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
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        worker: Optional[Worker] = None,
        layer: Optional[str] = None,
    ) -> None:
        options: Any = dict(device=device, dtype=dtype, bias=bias, worker=worker, layer=layer)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        del vars(self)["eps_mode"]

    @property
    def eps_mode(self) -> str:
        """Read where it is used, as in the original; a mode that a conversion gave to this layer goes before."""
        own: Optional[str] = vars(self).get("eps_mode")
        return own or _eps_mode

    @eps_mode.setter
    def eps_mode(self, mode: str) -> None:
        vars(self)["eps_mode"] = mode

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if str(input.dim()) not in self.ranks:
            raise ValueError(f"expected {' or '.join(self.ranks)}D input (got {input.dim()}D input)")
        super()._check_input_dim(input)

    def _normalize_with_others(self, input: torch.Tensor, step: _synchronized.Step) -> torch.Tensor:
        worker = self.worker or (default_worker() if _replicas.current() is None else None)
        if worker is not None and worker.world_size == 1 and _replicas.current() is None:
            return self._normalize_as_torch(input)
        return super()._normalize_with_others(input, step)

    def _normalize_as_torch(self, input: torch.Tensor) -> torch.Tensor:
        """As the original does where there is nobody to synchronize with: epsilon is added, whatever the mode."""
        factor = _running.count_batch(self) if self.track_running_stats else 0.0
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return torch.nn.functional.batch_norm(input, *running, self.weight, self.bias, True, factor, self.eps)


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm, torch.nn.BatchNorm1d):
    """For [N, C] and [N, C, L]."""

    ranks = "23"
    reverts_to = torch.nn.BatchNorm1d


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm, torch.nn.BatchNorm2d):
    """For [N, C, H, W]."""

    ranks = "4"
    reverts_to = torch.nn.BatchNorm2d


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm, torch.nn.BatchNorm3d):
    """For [N, C, D, H, W]."""

    ranks = "5"
    reverts_to = torch.nn.BatchNorm3d


class _LazySynchronizedBatchNorm(LazySyncBatchNorm, _SynchronizedBatchNorm):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        worker: Optional[Worker] = None,
        layer: Optional[str] = None,
    ) -> None:
        options: Any = dict(bias=bias, worker=worker, layer=layer)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, **options)
        del vars(self)["eps_mode"]


class LazySynchronizedBatchNorm1d(_LazySynchronizedBatchNorm, torch.nn.LazyBatchNorm1d):
    """Becomes a SynchronizedBatchNorm1d with its first input."""

    ranks = "23"
    cls_to_become = SynchronizedBatchNorm1d
    reverts_to = torch.nn.LazyBatchNorm1d


class LazySynchronizedBatchNorm2d(_LazySynchronizedBatchNorm, torch.nn.LazyBatchNorm2d):
    """Becomes a SynchronizedBatchNorm2d with its first input."""

    ranks = "4"
    cls_to_become = SynchronizedBatchNorm2d
    reverts_to = torch.nn.LazyBatchNorm2d


class LazySynchronizedBatchNorm3d(_LazySynchronizedBatchNorm, torch.nn.LazyBatchNorm3d):
    """Becomes a SynchronizedBatchNorm3d with its first input."""

    ranks = "5"
    cls_to_become = SynchronizedBatchNorm3d
    reverts_to = torch.nn.LazyBatchNorm3d


_KINDS: Dict[Any, Any] = {
    torch.nn.BatchNorm1d: SynchronizedBatchNorm1d,
    torch.nn.BatchNorm2d: SynchronizedBatchNorm2d,
    torch.nn.BatchNorm3d: SynchronizedBatchNorm3d,
    torch.nn.LazyBatchNorm1d: LazySynchronizedBatchNorm1d,
    torch.nn.LazyBatchNorm2d: LazySynchronizedBatchNorm2d,
    torch.nn.LazyBatchNorm3d: LazySynchronizedBatchNorm3d,
}


def convert_model(module: torch.nn.Module, worker: Optional[Worker] = None) -> torch.nn.Module:
    """Makes torch.nn.BatchNorm*d layers SynchronizedBatchNorm*d, and DataParallel a DataParallelWithCallback, in place.

    As `syncbn.torch.convert_sync_batchnorm` otherwise: a LazyBatchNorm*d becomes a LazySynchronizedBatchNorm*d, and a
    subclass with a forward of its own keeps it.
    """
    changes = convert.plan(module, worker, None, None, "", _KINDS)
    for change in changes:
        made = issubclass(change.kind, _SynchronizedBatchNorm)
        if made and not isinstance(change.module, _SynchronizedBatchNorm):
            change.attributes.pop("eps_mode")
        elif not isinstance(change.module, _synchronized.Synchronized):
            change.attributes["eps_mode"] = _eps_mode
    parallel = [m for m in module.modules() if isinstance(m, torch.nn.DataParallel)]
    convert.apply(changes + [_with_callback(m) for m in parallel if not isinstance(m, DataParallelWithCallback)])
    return module


@contextlib.contextmanager
def patch_sync_batchnorm() -> Iterator[None]:
    """Within it, torch.nn.BatchNorm1d, 2d and 3d, and the lazy ones, are the synchronized layers, for models that name
    torch's own.
    """
    before: Dict[str, Any] = {kind.__name__: getattr(torch.nn, kind.__name__) for kind in _KINDS}
    try:
        for plain, synchronized in _KINDS.items():
            setattr(torch.nn, plain.__name__, synchronized)
        yield
    finally:
        for name, kind in before.items():
            setattr(torch.nn, name, kind)


class DataParallelWithCallback(torch.nn.DataParallel):
    """Cuts a batch into parts for the replicas of `module`, which run on threads, and joins their outputs.

    The replicas' synchronized layers merge their statistics in this process, and send one contribution to the master:
    they are one worker together. One backward pass through the joined output goes through all of them.

    Inputs and outputs may be tensors, cut and joined along the first dimension, and what holds them: lists, tuples,
    named tuples, dictionaries and dataclasses, and subclasses of these. Anything else goes to every replica as it is, and
    is an output if all replicas return the same.

    Args:
      module: layers without a name of their own are named by their path in it.
      device_ids: a replica on each of these CUDA devices, as in torch.nn.DataParallel. None: all, if the module is on
        one; one replica otherwise.
      output_device: where the output goes; default: the first of them.
      replicas: how many, for a module on the CPU, whose replicas share its parameters.
    Raises:
      TypeError, from the call: for an output that differs between replicas and cannot be joined.
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
        # The constructor of DataParallel takes all GPUs and moves the module to one, wherever it is.
        torch.nn.Module.__init__(self)
        if dim != 0:
            raise ValueError("the batch is the first dimension")
        if replicas < 1:
            raise ValueError("replicas is 1 at least")
        on_cuda = any(parameter.is_cuda for parameter in module.parameters())
        if device_ids is None:
            device_ids = range(torch.cuda.device_count()) if on_cuda else ()
        self.dim = dim
        self.module = module
        self.device_ids = list(device_ids) if on_cuda else []
        self.output_device = output_device if output_device is not None or not on_cuda else self.device_ids[0]
        self.replicas = replicas
        convert.name_layers(self)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        on_cuda = len(self.device_ids) > 1
        size = len(self.device_ids) if on_cuda else self.replicas
        if size == 1 or not (on_cuda or self.training):
            return self.module(*inputs, **options)
        parts = _batches.cut((inputs, options), size)
        modules: Any = [self.module] * len(parts)
        if on_cuda:
            devices = self.device_ids[: len(parts)]
            parts = [_batches.moved(part, device) for part, device in zip(parts, devices)]
            modules = replicate(self.module, devices, not torch.is_grad_enabled())
        return _batches.joined(self._run(modules, parts), self.output_device if on_cuda else None)

    def _run(self, modules: Any, parts: List[Any]) -> List[Any]:
        layers = (m for m in self.module.modules() if isinstance(m, _synchronized.Synchronized))
        # Taken on this thread: the replicas' own have no worker.
        worker = default_worker() if self.training and any(layer.worker is None for layer in layers) else None
        devices: Any = self.device_ids or [None] * len(parts)
        calls = [functools.partial(self._call, *call) for call in zip(modules, parts, devices)]
        return _replicas.Group(len(calls), worker).run(calls)

    @staticmethod
    def _call(module: Any, part: Any, device: Any) -> Any:
        inputs, options = part
        with torch.cuda.device(device) if device is not None else contextlib.nullcontext():
            return module(*inputs, **options)


def _with_callback(data_parallel: torch.nn.DataParallel) -> Any:
    return convert.Change(data_parallel, DataParallelWithCallback, {"replicas": 1})


def patch_replication_callback(data_parallel: torch.nn.Module) -> torch.nn.Module:
    """Lets the replicas of a torch.nn.DataParallel find each other: it becomes a DataParallelWithCallback, in place."""
    if not isinstance(data_parallel, torch.nn.DataParallel):
        raise TypeError(f"a torch.nn.DataParallel is patched, not a {type(data_parallel).__qualname__}")
    if not isinstance(data_parallel, DataParallelWithCallback):
        convert.apply([_with_callback(data_parallel)])
        convert.name_layers(data_parallel)
    return data_parallel
