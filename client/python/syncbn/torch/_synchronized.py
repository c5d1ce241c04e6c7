"""The training of every synchronized layer: one round, and the normalization with its outcome."""

from typing import Any, Optional, Tuple

import torch
from torch.fx.proxy import Proxy

from syncbn import _library, _passes
from syncbn.core import Worker, default_worker
from syncbn.torch import _checkpointing, _functions, _naming, _replicas, _supported, _tensors, _trials


class SizeMismatch(RuntimeError, ValueError):
    """A parameter, buffer or input of another number of channels: torch's layers raise a RuntimeError."""


class NotSynchronized(RuntimeError):
    """A converted layer whose own forward takes statistics of the local batch, by means that cannot be synchronized."""


class Step:
    """One normalization: what a layer computes with this time. Anything else is the layer's."""

    __slots__ = (
        "module",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "track_running_stats",
        "eps",
        "z",
        "relu",
    )

    def __init__(
        self,
        module: Any,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        eps: float,
        tracked: bool,
        z: Optional[torch.Tensor] = None,
        relu: bool = False,
    ) -> None:
        """The running statistics are those to be updated, if any. Where the step is `tracked`, the batch is counted before they
        are, also if there are none, as in torch. z is added to the result, and then `relu` applied to it.
        """
        self.module = module
        self.weight, self.bias = weight, bias
        self.running_mean, self.running_var = running_mean, running_var
        self.track_running_stats = tracked
        self.eps = eps
        self.z, self.relu = z, relu

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def _count_batch(self) -> Optional[float]:
        """Counts the batch. Returns: the new values' weight in the running statistics; None for 1 / the number of batches."""
        momentum: Optional[float] = self.module._count_batch()
        return momentum

    def _uncount_batch(self) -> None:
        """The batch that was counted is not taken, after all."""
        self.module._uncount_batch()

    def _tracked_batches(self) -> Optional[torch.Tensor]:
        """The number of batches, if it is kept and counts what `_count_batch` counts."""
        batches: Optional[torch.Tensor] = self.module._tracked_batches()
        return batches

    def check(self, x: torch.Tensor) -> None:
        """Refuses what x does not go with."""
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
        if x.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")
        check_vectors(x, self.weight, self.bias, self.running_mean, self.running_var)
        check_addend(x, self.z)

    def activate(self, y: torch.Tensor) -> torch.Tensor:
        """The rest of the layer, by torch's own operations, for a pass that has not done it."""
        return activated(y, self.z, self.relu)


def activated(y: torch.Tensor, z: Optional[torch.Tensor], relu: bool) -> torch.Tensor:
    y = y if z is None else y + z
    return torch.relu(y) if relu else y


def check_addend(x: torch.Tensor, z: Optional[torch.Tensor]) -> None:
    """Refuses a z that is not of x's form."""
    if z is None:
        return
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"z is a {type(z).__name__}; a tensor of the input's shape and type is needed")
    if (z.shape, z.dtype, z.device) != (x.shape, x.dtype, x.device):
        raise SizeMismatch(
            f"z is {tuple(z.shape)}, {z.dtype}, on {z.device}, and the input {tuple(x.shape)}, {x.dtype}, on {x.device}: they "
            "have to be alike"
        )


def check_vectors(
    x: torch.Tensor,
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
) -> None:
    """Refuses parameters and buffers of another size than x's channels, or on another device."""
    channels, on_cpu = x.size(1), x.is_cpu
    for vector in (running_mean, running_var, weight, bias):
        if vector is None:
            continue
        if vector.numel() != channels or not (vector.is_cpu if on_cpu else vector.device == x.device):
            break
    else:
        return
    named = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    vectors = [(name, vector) for name, vector in named if vector is not None]
    sizes = {vector.numel() for _, vector in vectors}
    if len(sizes) == 1 and x.size(1) not in sizes:
        raise SizeMismatch(f"expected {sizes.pop()} channels, got input of shape {tuple(x.shape)}")
    for name, vector in vectors:
        if vector.numel() != x.size(1):
            raise SizeMismatch(f"{name} has {vector.numel()} elements, and the layer {x.size(1)} channels")
        if vector.device != x.device:
            raise RuntimeError(f"the input is on {x.device}, and {name} on {vector.device}")


def check_options(worker: Any, eps_mode: str, numeric: str, activation: Any = None) -> None:
    """Refuses a constructor's or a conversion's arguments."""
    if activation not in (None, "relu"):
        raise ValueError(f'activation is None or "relu", not {activation!r}')
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(
            f"worker is a syncbn.Worker, not a {type(worker).__module__}.{type(worker).__qualname__}: for a process "
            "group, open a syncbn.Worker(group=..., rank=..., world_size=...) at each of its ranks, and give that"
        )
    if eps_mode not in _library.EPS_MODES:
        raise ValueError(f'eps_mode is "add" or "clamp", not {eps_mode!r}')
    if numeric not in _library.NUMERIC_POLICIES:
        raise ValueError(f'numeric is "refuse" or "propagate", not {numeric!r}')


def leaf_call(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """The call as one node of a graph, if torch.fx traces the model; else None.

    torch.fx takes the layers of torch.nn alone for leaves by itself.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Proxy):
            tracer: Any = value.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
    return None


class Synchronized(torch.nn.Module):
    """Mixed into the layers: what they are called, which worker they use, and their rounds.

    A Module itself, since an object's class can only change to one whose memory begins in the same class.
    """

    worker: Optional[Worker] = None
    layer: Optional[str] = None
    eps_mode: str = "add"
    numeric: str = "refuse"
    biased_running_variance: bool = False
    activation: Optional[str] = None
    original_class: Optional[type] = None

    def __prepare_scriptable__(self) -> Any:
        """Asked by torch.jit.script, which cannot compile a round."""
        raise RuntimeError(
            f"layer {self.layer!r} is synchronized and cannot become TorchScript: script a copy with torch's own layers, "
            "torch.jit.script(syncbn.torch.revert_sync_batchnorm(copy.deepcopy(model))), or trace the model in evaluation"
        )

    def _normalize_with_others(self, input: torch.Tensor, step: Step) -> torch.Tensor:
        """One normalization in training. The caller is outside of graphs."""
        trial = _trials.current()
        if trial is not None:
            return step.activate(trial.normalize(input, step.weight, step.bias, step.eps))
        sight = _tensors.at_sight(input, step.weight, step.bias, step.running_mean, step.running_var)
        if sight is None:
            step.check(input)
        elif step.z is not None:
            check_addend(input, step.z)
        tensors = (input, step.weight, step.bias, step.z)
        if torch.overrides.has_torch_function(tensors):
            function: Any = batch_norm
            return torch.overrides.handle_torch_function(function, tensors, input, step)
        return self._normalize_plain(input, step, sight)

    def _normalize_plain(self, input: torch.Tensor, step: Step, sight: Optional[_tensors.Sight] = None) -> torch.Tensor:
        """As an operation under __torch_function__, by which a subclass of Tensor keeps its class. sight: what `at_sight` says
        of the tensors.
        """
        if sight is not None:
            if step.z is not None:
                _supported.check_supported(step.z)
            return self._normalize_dense(input, step, sight[0], sight[1], sight)
        _supported.check_supported(input, step.weight, step.bias, step.running_mean, step.running_var, step.z)
        with _checkpointing.unseen():
            x, channels_last, packed = _tensors.described(input)
            return self._normalize_dense(x, step, channels_last, packed, None)

    def _normalize_dense(
        self, x: torch.Tensor, step: Step, channels_last: bool, packed: bytes, sight: Optional[_tensors.Sight]
    ) -> torch.Tensor:
        """x is dense in the layout that `channels_last` tells, and `packed` describes it."""
        checkpoint = _checkpointing.context()
        place = _replicas.current()
        if place is not None:
            return step.activate(self._normalize_with_replicas(x, step, place, checkpoint))
        # Memory comes before the round, so that no other worker waits for one that finds none.
        y = torch.empty_like(x) if sight is not None else _tensors.empty_like(x)
        gate = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device) if step.relu else None
        forward_pass = checkpoint.replay(self) if checkpoint.active else None
        update = forward_pass is None and step.track_running_stats
        follows = torch.is_grad_enabled()
        differentiable = follows and x.requires_grad
        if forward_pass is None:
            role = self._role(differentiable or checkpoint.gradient_follows, follows)
            forward_pass = self._begin_round(x, packed, _tensors.execution(x), step, role)
        types, forms, vectors, own = self._vectors(step, sight, update)
        made = _functions.Pass(forward_pass, x.shape, packed, channels_last, types, forms, gate)
        if checkpoint.active:
            made.wait()  # A round that has failed is not left with the segment.
            checkpoint.record(self, forward_pass)
        anchor = None if differentiable or not follows else self._anchor(step, made)
        outputs = (y, vectors, own, step if update else None)
        return _functions.Normalize.apply(x, step.weight, step.bias, step.z, anchor, made, outputs)

    @staticmethod
    def _vectors(step: Step, sight: Optional[_tensors.Sight], update: bool) -> Any:
        """`types` and `forms` of _functions.Pass, and `vectors` and `own` of its outputs."""
        if sight is not None:
            _, _, vectors, types = sight
            return types, (), vectors if update else _functions.without_running(vectors), ()
        weight, bias = step.weight, step.bias
        running = (step.running_mean, step.running_var) if update else (None, None)
        own, described = zip(*(_tensors.readable_vector(vector) for vector in (weight, bias, *running)))
        return None, (_tensors.form(weight), _tensors.form(bias)), b"".join(described), own

    def _begin_round(
        self, x: torch.Tensor, packed: bytes, execution: Tuple[int, Optional[int]], step: Step, role: int
    ) -> _passes.ForwardPass:
        """Begins to merge x's moments with those of the other workers."""
        worker = self.worker or default_worker()
        layer = self._declare(worker, x.size(1), step.eps)
        threads, stream = execution
        # On a GPU the contribution is not sent here: its reduction has only been enqueued.
        return _passes.ForwardPass(
            worker,
            layer,
            packed,
            role=role,
            num_threads=threads,
            cuda_device=None if stream is None else x.get_device(),
            stream=stream,
            send=stream is None,
            eps=step.eps,
            clamp=self.eps_mode == "clamp",
        )

    def _declare(self, worker: Worker, channels: int, eps: float) -> str:
        """Makes the layer known to the master; returns its name. The first thing of any round."""
        _trials.refuse_rounds()
        layer = self.layer
        if layer is None:
            layer = self.layer = _naming.number(worker)
        _naming.claim(worker, layer)
        worker.declare_layer(
            layer,
            channels,
            eps=eps,
            eps_mode=self.eps_mode,
            momentum=getattr(self, "momentum"),
            numeric=self.numeric,
            biased_running_variance=self.biased_running_variance,
        )
        return layer

    def _normalize_with_replicas(
        self, x: torch.Tensor, step: Step, place: _replicas.Place, checkpoint: _checkpointing.Context
    ) -> torch.Tensor:
        """Normalizes as one of several threads of this worker."""
        if checkpoint.active:
            raise RuntimeError("activation checkpointing does not go with replicas on threads: run a process for each")
        worker = self.worker or place.group.default_worker or default_worker()
        self._declare(worker, x.size(1), step.eps)
        return _replicas.normalize(step, x, place, worker)

    @staticmethod
    def _role(differentiable: bool, follows: bool) -> int:
        """Returns this worker's part in the backward round. follows: autograd records what is computed."""
        if differentiable:
            return _library.BACKWARD_REQUIRED
        return _library.BACKWARD_IF_REQUIRED if follows else _library.BACKWARD_NONE

    @staticmethod
    def _anchor(step: Step, made: _functions.Pass) -> Optional[torch.Tensor]:
        """Something differentiable, where only another worker calls for this one's part in the backward round."""
        for tensor in (step.weight, step.bias, step.z):
            if tensor is not None and tensor.requires_grad:
                return None
        made.wait()
        return torch.empty(0, requires_grad=True) if made.forward_pass.backward_required else None


def batch_norm(input: torch.Tensor, step: Step) -> torch.Tensor:
    """The function for which a __torch_function__ is called where a synchronized layer trains."""
    normalized: torch.Tensor = step.module._normalize_plain(input, step)
    return normalized
