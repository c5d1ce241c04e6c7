"""SyncBatchNorm, its lazy variant, and conversion from and to torch's own batch normalization."""

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from syncbn import _library, _passes
from syncbn.core import Worker, default_worker
from syncbn.torch import _checkpointing, _evaluation, _functions, _masked, _replicas, _tensors

# torch.compile breaks its graph here: a round is no operation that it could trace.
_outside_of_graphs: Any = getattr(getattr(torch, "compiler", None), "disable", lambda function: function)
_masked_forward = _outside_of_graphs(_masked.forward)


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over all workers, with torch.nn.SyncBatchNorm's arguments, attributes and state_dict.

    y = weight * (x - mean) * invstd + bias, with mean and invstd per channel over the global batch; x is [N, C]
    or [N, C, ...].

    Args:
      num_features: C.
      eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch.nn.SyncBatchNorm. momentum None: the
        cumulative average. bias False: a weight without a bias, in any version of torch.
      process_group: must be None; the group is the worker's.
      worker: default `syncbn.default_worker()`, at the time of the call.
      eps_mode: "add": invstd = 1/sqrt(var + eps). "clamp": 1/sqrt(max(var, eps)) in training; evaluation adds.
      layer: its name at the master, the same at every worker. Default: numbered in the order of first use.
      biased_running_variance: the running variance is M2/N, as in Keras and Flax, instead of M2/(N-1), as in torch.

    On CUDA tensors, a worker made with `stream_ordered=True` lets the calling thread run ahead of the rounds.

    Training needs a worker, and every worker of the group has to run the layer: a batch may be empty. Evaluation is
    local. A global batch of a single value for each channel raises ValueError at every worker, as in
    torch.nn.BatchNorm. A global batch without any value changes no state.
    """

    biased_running_variance = False  # Of layers that were pickled before there was a choice.

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        worker: Optional[Worker] = None,
        eps_mode: str = "add",
        layer: Optional[str] = None,
        biased_running_variance: bool = False,
    ) -> None:
        if process_group is not None:
            raise ValueError("process_group must be None: give a worker of another group")
        if eps_mode not in _library.EPS_MODES:
            raise ValueError(f'eps_mode is "add" or "clamp", not {eps_mode!r}')
        average: Any = momentum  # torch's hints do not allow for None.
        super().__init__(num_features, eps, average, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = None
        self.worker = worker
        self.eps_mode = eps_mode
        self.layer = layer
        self.biased_running_variance = bool(biased_running_variance)
        self.original_class: Optional[type] = None

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1.0)
            if self.bias is not None:
                self.bias.fill_(0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps_mode={self.eps_mode}, layer={self.layer}"

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")
        if input.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got input of shape {tuple(input.shape)}")
        for name in ("weight", "bias", "running_mean", "running_var"):
            own = getattr(self, name)
            if own is None:
                continue
            if own.numel() != self.num_features:
                raise ValueError(f"{name} has {own.numel()} elements, and the layer {self.num_features} channels")
            if own.device != input.device:
                raise RuntimeError(f"the input is on {input.device}, and {name} on {own.device}")

    def forward(self, input: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """input [N, C, ...] -> the same shape, type and layout.

        mask: True, or 1, where a position counts; [N, ...] or [N, 1, ...], or a shape that broadcasts to these. Statistics
        are taken from those positions alone; the output is normalized everywhere.
        """
        self._check_input_dim(input)
        if mask is not None:
            return _masked_forward(self, input, mask)
        if self.training:
            return self._normalize_with_others(input)
        if self.running_mean is None or self.running_var is None:
            return self._normalize_alone(input)
        return self._evaluate(input, self.running_mean, self.running_var)

    # ---- Evaluation ----

    def _evaluate(self, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return _evaluation.batch_norm(x, mean, var, self.weight, self.bias, False, self.eps)

    def _normalize_alone(self, x: torch.Tensor) -> torch.Tensor:
        """With the local batch's statistics, as torch does in evaluation where there are no running ones."""
        return _evaluation.batch_norm(x, None, None, self.weight, self.bias, True, self.eps)

    # ---- Training ----

    @_outside_of_graphs
    def _normalize_with_others(self, input: torch.Tensor) -> torch.Tensor:
        if torch.overrides.has_torch_function((input,)):
            function: Any = batch_norm
            return torch.overrides.handle_torch_function(function, (input,), input, self)
        return batch_norm(input, self)

    def _normalize_plain(self, input: torch.Tensor) -> torch.Tensor:
        """As an operation under __torch_function__, by which a subclass of Tensor keeps its class."""
        _tensors.check_supported(input)
        x = _tensors.dense(input, _tensors.is_channels_last(input))
        checkpoint = _checkpointing.Context()
        place = _replicas.current()
        if place is not None:
            return self._normalize_with_replicas(x, place, checkpoint)
        forward_pass = checkpoint.replay(self)
        first_time = forward_pass is None
        if forward_pass is None:
            forward_pass = self._run_round(x, checkpoint.gradient_follows)
        checkpoint.record(self, forward_pass)
        # Of a stream-ordered pass it is not known yet, only that it is at least 2: smaller batches are host-driven.
        count = None if forward_pass.stream_ordered else forward_pass.count
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} "
                "and nothing from the other workers"
            )
        update = first_time and self.track_running_stats and self.running_mean is not None and count != 0
        return _functions.Normalize.apply(
            x,
            self.weight,
            self.bias,
            self._anchor(x, forward_pass),
            forward_pass,
            self.running_mean if update else None,
            self.running_var if update else None,
            self._count_batch() if update else 0.0,
        )

    def _run_round(self, x: torch.Tensor, gradient_follows: bool) -> _passes.ForwardPass:
        """Merges x's moments with those of the other workers."""
        worker = self.worker or default_worker()
        layer = self._declare(worker)
        device, threads, stream = _tensors.execution(x)
        with device:
            forward_pass = _passes.ForwardPass(
                worker,
                layer,
                _tensors.describe(x, _tensors.is_channels_last(x)),
                role=self._role(x, gradient_follows),
                num_threads=threads,
                stream=stream,
                eps=self.eps,
                clamp=self.eps_mode == "clamp",
            )
            if not forward_pass.stream_ordered:
                forward_pass.wait()
        return forward_pass

    def _declare(self, worker: Worker) -> str:
        """Makes the layer known to the master; returns its name."""
        if self.layer is None:
            self.layer = worker.name_unnamed_layer()
        worker.declare_layer(
            self.layer,
            self.num_features,
            eps=self.eps,
            eps_mode=self.eps_mode,
            momentum=self.momentum,
            biased_running_variance=self.biased_running_variance,
        )
        return self.layer

    def _normalize_with_replicas(
        self, x: torch.Tensor, place: _replicas.Place, checkpoint: _checkpointing.Context
    ) -> torch.Tensor:
        """As one of several threads of this worker."""
        if checkpoint.active:
            raise RuntimeError("activation checkpointing does not go with replicas on threads: run a process for each")
        worker = self.worker or place.group.default_worker or default_worker()
        self._declare(worker)
        return _replicas.normalize(self, x, place, worker)

    @staticmethod
    def _role(x: torch.Tensor, gradient_follows: bool) -> int:
        """Whether this worker will come to the backward round."""
        if gradient_follows:
            return _library.BACKWARD_REQUIRED
        if not torch.is_grad_enabled():
            return _library.BACKWARD_NONE
        return _library.BACKWARD_REQUIRED if x.requires_grad else _library.BACKWARD_IF_REQUIRED

    def _anchor(self, x: torch.Tensor, forward_pass: _passes.ForwardPass) -> Optional[torch.Tensor]:
        """Something differentiable, where only another worker calls for this one's part in the backward round."""
        if not torch.is_grad_enabled() or not forward_pass.backward_required:
            return None
        if any(t is not None and t.requires_grad for t in (x, self.weight, self.bias)):
            return None
        return torch.empty(0, requires_grad=True)

    def _count_batch(self) -> float:
        """Counts this batch; returns the new value's weight in the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)

    # ---- Conversion ----

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: None = None) -> torch.nn.Module:
        """torch.nn.SyncBatchNorm's class method; see the function of the same name."""
        if process_group is not None:
            raise ValueError("process_group must be None: give a worker of another group")
        return convert_sync_batchnorm(module)


def batch_norm(input: torch.Tensor, layer: SyncBatchNorm) -> torch.Tensor:
    """What a __torch_function__ is called with for a SyncBatchNorm in training."""
    return layer._normalize_plain(input)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A SyncBatchNorm that takes num_features from its first input, [N, C] or [N, C, ...], and becomes a SyncBatchNorm.

    The arguments are SyncBatchNorm's without num_features and process_group.
    """

    cls_to_become: Any = SyncBatchNorm

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
        eps_mode: str = "add",
        layer: Optional[str] = None,
        biased_running_variance: bool = False,
    ) -> None:
        if eps_mode not in _library.EPS_MODES:
            raise ValueError(f'eps_mode is "add" or "clamp", not {eps_mode!r}')
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.worker, self.eps_mode, self.layer = worker, eps_mode, layer
        self.biased_running_variance = bool(biased_running_variance)

    def initialize_parameters(self, input: torch.Tensor, mask: Optional[torch.Tensor] = None) -> None:
        """Gives the parameters and buffers their size; those of a loaded state_dict have theirs already."""
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        vectors = [v for v in (self.weight, self.bias, self.running_mean, self.running_var) if v is not None]
        lazy: List[Any] = [vector for vector in vectors if is_lazy(vector)]
        self.num_features = input.size(1) if lazy or not vectors else vectors[0].numel()
        for vector in lazy:
            vector.materialize((self.num_features,))
        if lazy:
            self.reset_parameters()


def _move(source: _BatchNorm, target: _BatchNorm) -> _BatchNorm:
    """Gives the target the source's own parameters and buffers."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target.training = source.training
    if hasattr(source, "qconfig"):
        target.qconfig = source.qconfig
    return target


def _to_synchronized(
    source: _BatchNorm, worker: Optional[Worker], eps_mode: str, layer: str, kind: Any = SyncBatchNorm
) -> SyncBatchNorm:
    if type(source).forward not in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward):
        raise ValueError(
            f"layer {layer!r} is a {type(source).__module__}.{type(source).__qualname__}, which does more than batch "
            "normalization: a SyncBatchNorm would leave that out. Replace it by a SyncBatchNorm and what it adds"
        )
    # Without affine and tracking first: the parameters and buffers are the source's, none is allocated for nothing.
    if isinstance(source, _LazyNormBase):
        target: SyncBatchNorm = LazySyncBatchNorm(source.eps, source.momentum, False, False, worker=worker, layer=layer)
    else:
        target = kind(source.num_features, source.eps, source.momentum, False, False, worker=worker, layer=layer)
    target.eps_mode = eps_mode
    target.affine, target.track_running_stats = source.affine, source.track_running_stats
    target.original_class = type(source)
    _move(source, target)
    return target


class BatchNorm(_BatchNorm):
    """torch's batch normalization for any rank: what a SyncBatchNorm that was never anything else reverts to."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class LazyBatchNorm(_LazyNormBase, BatchNorm):
    """As `BatchNorm`, with num_features from its first input."""

    cls_to_become: Any = BatchNorm


def _from_synchronized(source: SyncBatchNorm) -> _BatchNorm:
    kind: Any = source.original_class
    if isinstance(source, _LazyNormBase):
        target: _BatchNorm = (kind or LazyBatchNorm)(source.eps, source.momentum, False, False)
    else:
        if kind is not None and issubclass(kind, _LazyNormBase):  # It was lazy when it was converted.
            kind = kind.cls_to_become
        target = (kind or BatchNorm)(source.num_features, source.eps, source.momentum, False, False)
    target.affine, target.track_running_stats = source.affine, source.track_running_stats
    return _move(source, target)


def _rewrite(
    module: torch.nn.Module, path: str, convert: Any, done: Dict[int, Tuple[torch.nn.Module, torch.nn.Module]]
) -> torch.nn.Module:
    """Replaces modules in a tree, each once however often it is shared; returns what stands in its root's place."""
    if id(module) in done:
        return done[id(module)][1]
    result = convert(module, path)
    # The original is kept, so that its id belongs to nothing else while `done` is in use.
    done[id(module)] = (module, result)
    if result is module:
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _rewrite(child, f"{path}.{name}" if path else name, convert, done)
    return result


def convert_sync_batchnorm(
    module: torch.nn.Module, worker: Optional[Worker] = None, *, eps_mode: str = "add", prefix: str = ""
) -> torch.nn.Module:
    """Replaces every torch.nn.BatchNorm*d and torch.nn.SyncBatchNorm in a model with a SyncBatchNorm.

    A torch.nn.LazyBatchNorm*d becomes a LazySyncBatchNorm.

    Parameters and buffers are the same objects afterwards, so an optimizer made before goes on. Layers are named by
    their path in the model; a shared module is converted once, and keeps the first path.

    Args:
      worker: default `syncbn.default_worker()`, at the time of the call of a layer. Needed for a torch.nn.SyncBatchNorm
        with a process group: it says which workers take the group's place.
      prefix: put before the names, to tell two models of one worker apart.
    Returns:
      The module, changed in place; or a new one if it is a batch normalization itself.
    Raises:
      ValueError: for a subclass with a forward of its own, such as a batch normalization with an activation in it.
    """

    def convert(candidate: torch.nn.Module, path: str) -> torch.nn.Module:
        if isinstance(candidate, SyncBatchNorm) or not isinstance(candidate, _BatchNorm):
            return candidate
        if worker is None and getattr(candidate, "process_group", None) is not None:
            raise ValueError(f"{path or 'the module'} has a process group: give the worker of the group that stands for it")
        return _to_synchronized(candidate, worker, eps_mode, prefix + (path or "batch_norm"))

    return _rewrite(module, "", convert, {})


def revert_sync_batchnorm(module: torch.nn.Module) -> torch.nn.Module:
    """Undoes `convert_sync_batchnorm`: the original classes return, with the same parameter and buffer objects.

    A SyncBatchNorm that was made as one becomes a batch normalization for inputs of any rank.
    """

    def convert(candidate: torch.nn.Module, path: str) -> torch.nn.Module:
        return _from_synchronized(candidate) if isinstance(candidate, SyncBatchNorm) else candidate

    return _rewrite(module, "", convert, {})
