"""Functions below the layers: batch normalization with the caller's own parameters, and the moments alone."""

import operator
import threading
import weakref
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch

from syncbn.core import Worker, default_worker
from syncbn.torch import _checkpointing, _evaluation, _graphs, _masked, _supported, _synchronized

_lock = threading.Lock()
_callers: Dict[str, "_Caller"] = {}
_callers_by_worker: "weakref.WeakKeyDictionary[Worker, Dict[str, _Caller]]" = weakref.WeakKeyDictionary()


class _Caller(_synchronized.Synchronized):
    """Stands for the layer that the calls with one name are. Checkpointed segments tell their layers by such an object."""

    momentum = 0.1

    def _count_batch(self) -> float:
        """Counts nothing: a function keeps no number of batches."""
        return self.momentum

    def _uncount_batch(self) -> None:
        """Takes back nothing, since nothing was counted."""

    def _tracked_batches(self) -> None:
        """Returns None: there is no number."""


def _caller(worker: Optional[Worker], layer: Any) -> _Caller:
    if not isinstance(layer, str) or not layer:
        raise ValueError(
            f"layer is {layer!r}; in training it has to be a name, which no other layer has and which is the same at every "
            "worker: the workers meet by it"
        )
    with _lock:
        known = _callers if worker is None else _callers_by_worker.setdefault(worker, {})
        if layer not in known:
            known[layer] = _Caller()
            known[layer].layer, known[layer].worker = layer, worker
        return known[layer]


def batch_norm(
    input: torch.Tensor,
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
    weight: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layer: Optional[str] = None,
    worker: Optional[Worker] = None,
    numeric: str = "refuse",
) -> torch.Tensor:
    """torch.nn.functional.batch_norm over the batches of all workers.

    In training, every worker of the group calls it for the same layers, each as often as the others; a batch may be empty.
    The running statistics are updated in place, those that are given. Evaluation is local.

    Args:
      input: [N, C] or [N, C, ...].
      running_mean, running_var, weight, bias: [C], or None.
      momentum: the new value's weight in the running statistics.
      layer: this normalization's name, the same at every worker. Needed in training.
      worker: default `syncbn.default_worker()`.
      numeric: "refuse" or "propagate", as in `SyncBatchNorm`.

    Returns: a tensor of the input's shape and type, differentiable twice.
    Errors: those of `SyncBatchNorm`; ValueError where `layer` is needed and absent.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var are None; in evaluation both have to be given")
        return _evaluation.batch_norm(input, running_mean, running_var, weight, bias, False, eps)
    _synchronized.check_options(worker, "add", numeric)
    caller = _caller(worker, layer)
    caller.momentum, caller.numeric = momentum, numeric
    return _normalize(caller, input, _synchronized.Step(caller, weight, bias, running_mean, running_var, eps, True))


@_graphs.outside_of_graphs
def _normalize(caller: _Caller, input: torch.Tensor, step: _synchronized.Step) -> torch.Tensor:
    return caller._normalize_with_others(input, step)


class _Round:
    """The merged moments of a forward round, and the rounds of its gradients."""

    def __init__(self, caller: _Caller, values: torch.Tensor, gradient_follows: bool) -> None:
        worker = caller.worker or default_worker()
        role: Optional[bool] = gradient_follows
        if not gradient_follows and torch.is_grad_enabled():
            role = True if values.requires_grad else None
        count, mean, m2 = _masked.local_moments(values)
        vectors = (mean.numpy(), m2.numpy()) if count else (None, None)
        caller._declare(worker, values.size(1), 0.0)
        merged = worker.synchronize(str(caller.layer), count, *vectors, backward=role)
        self.count, self.mean, self.var = merged.count, torch.from_numpy(merged.mean), torch.from_numpy(merged.var)
        self.backward_required = merged.backward_required
        takes_part = role is not False and merged.backward_required and merged.count > 0
        self.sums = _masked.BackwardSums(
            worker if takes_part and worker.rank not in merged.missing_ranks else None, str(caller.layer), merged.sequence
        )


class _Moments(torch.autograd.Function):
    """(mean, var) of x, [positions, C]; `anchor` makes them differentiable where only another worker's x is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: Optional[torch.Tensor], merged: _Round) -> Tuple[torch.Tensor, ...]:
        kind = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        mean, var = merged.mean.to(x.device, kind), merged.var.to(x.device, kind)
        if merged.count == 0:
            mean, var = torch.full_like(mean, float("nan")), torch.full_like(var, float("nan"))
        # The float64 mean, for the gradient; an output, so that derivatives of the gradient go through it.
        exact = merged.mean.to(x.device, torch.float64, copy=True)
        ctx.save_for_backward(x, exact)
        ctx.merged = merged
        ctx.set_materialize_grads(False)
        return mean, var, exact

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, *cotangents: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
        x, exact = ctx.saved_tensors
        zeros = torch.zeros(x.size(1), dtype=torch.float64, device=x.device)
        of_mean, of_var, of_exact = (zeros if c is None else c.double() for c in cotangents)
        sums = _Sum.apply(torch.stack([of_mean + of_exact, of_var]), ctx.merged.sums)
        count = max(1, ctx.merged.count)
        dx = (sums[0] + 2.0 * (x.double() - exact) * sums[1]) / count
        return dx.to(x.dtype), None, None


class _Sum(torch.autograd.Function):
    """The sum over the workers of two vectors, [2, C]. It is its own adjoint, so derivatives of any order are such sums."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, sums: _masked.BackwardSums) -> torch.Tensor:
        ctx.sums = sums
        first, second = sums.merge(vectors[0], vectors[1])
        return torch.stack([first, second]).to(vectors.device)

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, cotangent: torch.Tensor) -> Tuple[torch.Tensor, None]:
        summed: torch.Tensor = _Sum.apply(cotangent, ctx.sums)
        return summed, None


@_graphs.outside_of_graphs
def _merged_moments(values: torch.Tensor, caller: _Caller) -> Tuple[torch.Tensor, torch.Tensor]:
    """The moments of [positions, C]."""
    _supported.check_supported(values)
    with _checkpointing.unseen():
        return _moments_of_supported(values, caller)


def _moments_of_supported(values: torch.Tensor, caller: _Caller) -> Tuple[torch.Tensor, torch.Tensor]:
    checkpoint = _checkpointing.context()
    merged = checkpoint.replay(caller)
    if merged is None:
        merged = _Round(caller, values, checkpoint.gradient_follows)
    checkpoint.record(caller, merged)
    anchor = None
    if torch.is_grad_enabled() and merged.backward_required:
        anchor = torch.empty(0, requires_grad=True)
    mean, var, _ = _Moments.apply(values, anchor, merged)
    return mean, var


def moments(
    input: torch.Tensor,
    dims: Union[int, Sequence[int]],
    *,
    layer: str,
    worker: Optional[Worker] = None,
    keepdim: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of a tensor over all workers, for normalizations of your own.

        mean, var = syncbn.torch.moments(x, (0, 2, 3), layer="stem", keepdim=True)
        y = (x - mean) * torch.rsqrt(var + 1e-5)

    Every worker of the group calls it for the same layers, each as often as the others, and goes back through it as often.
    The gradient is that of the sum of the losses of all workers. A batch may be empty, and positions that do not count may be
    left out: `moments(x.movedim(1, -1)[mask], 0, layer=...)`.

    Args:
      dims: the dimensions that the moments are taken over; the others have the same sizes at every worker.
      layer: a name that no other layer has, the same at every worker.
      worker: default `syncbn.default_worker()`.
      keepdim: the results have size 1 in `dims`, instead of lacking them.

    Returns: (mean, var), the same at every worker, of the input's type, and float32 for float16 and bfloat16; differentiable
    any number of times. NaN where no worker has a value.
    Errors: those of a round; TypeError for a tensor of another type; ValueError for dimensions that the input has not.
    """
    _synchronized.check_options(worker, "add", "refuse")
    reduced = _dimensions(input, dims)
    kept = [dim for dim in range(input.dim()) if dim not in reduced]
    sizes = [input.size(dim) for dim in kept]
    channels = 1
    for size in sizes:
        channels *= size
    positions = 1
    for dim in reduced:
        positions *= input.size(dim)
    if channels == 0:
        raise ValueError(f"input of shape {tuple(input.shape)} has no elements in its other dimensions than {reduced}")
    values = input.permute(*reduced, *kept).reshape(positions, channels)
    found = _merged_moments(values, _caller(worker, layer))
    shape = [1 if dim in reduced else input.size(dim) for dim in range(input.dim())] if keepdim else sizes
    return found[0].reshape(shape), found[1].reshape(shape)


def _dimensions(input: torch.Tensor, dims: Union[int, Sequence[int]]) -> List[int]:
    """`dims` as numbers from 0 on, ascending."""
    try:
        given = [operator.index(dim) for dim in (dims if isinstance(dims, Iterable) else [dims])]
    except TypeError:
        raise TypeError(f"dims is {dims!r}; it is the number of a dimension, or several such numbers") from None
    if input.dim() == 0:
        raise ValueError("input of shape () has no dimensions to take moments over")
    for dim in given:
        if not -input.dim() <= dim < input.dim():
            raise ValueError(f"dims has {dim}; an input of shape {tuple(input.shape)} has the dimensions 0 .. {input.dim() - 1}")
    reduced = sorted({dim % input.dim() for dim in given})
    if not reduced or len(reduced) != len(given):
        raise ValueError(f"dims is {dims!r}; it names at least one dimension, and each once")
    return reduced
