"""SyncBatchNorm and its lazy variant."""

import contextlib
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from syncbn import _arguments
from syncbn.core import Worker
from syncbn.torch import _answers, _evaluation, _graphs, _masked, _naming, _subclasses, _supported, _synchronized


_ELSEWHERE: Any = object()


@_graphs.outside_of_graphs
def _train(layer: Any, input: torch.Tensor, z: Optional[torch.Tensor]) -> torch.Tensor:
    context = _answers.in_own_forward(layer)
    if context is not None:
        with context:
            inner: torch.Tensor = layer._normalize_with_others(input, layer._step(z))
            return inner
    normalized: torch.Tensor = layer._normalize_with_others(input, layer._step(z))
    return normalized


@_graphs.outside_of_graphs
def _masked_forward(layer: Any, input: torch.Tensor, mask: Any, z: Optional[torch.Tensor]) -> torch.Tensor:
    with _answers.in_own_forward(layer) or contextlib.nullcontext():
        step = layer._step(z)
        step.check(input)
        activated: torch.Tensor = step.activate(_masked.forward(layer, input, mask))
        return activated


class BatchNorm(_BatchNorm):
    """torch's batch normalization for any rank: what a SyncBatchNorm that was never anything else reverts to."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class LazyBatchNorm(_LazyNormBase, BatchNorm):
    """As `BatchNorm`, with num_features from its first input."""

    cls_to_become: Any = BatchNorm


class SyncBatchNorm(_synchronized.Synchronized, _BatchNorm):
    """Batch normalization over all workers, with torch.nn.SyncBatchNorm's arguments, attributes and state_dict.

    y = weight * (x - mean) * invstd + bias, with mean and invstd per channel over the global batch; x is [N, C]
    or [N, C, ...].

    Args:
      num_features: C.
      eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch.nn.SyncBatchNorm. momentum None: the
        cumulative average. bias False: a weight without a bias, in any version of torch. An eps below 0 is refused in
        training, where a channel's variance plus eps could be negative; 0 is taken, which newer versions of torch refuse.
      process_group: must be None; the group is the worker's.
      worker: default `syncbn.default_worker()`, at the time of the call.
      eps_mode: "add": invstd = 1/sqrt(var + eps). "clamp": 1/sqrt(max(var, eps)) in training; evaluation adds.
      layer: its name at the master, the same at every worker. Default: numbered in the order in which layers are made.
      biased_running_variance: the running variance is M2/N, as in Keras and Flax, instead of M2/(N-1), as in torch.
      numeric: "refuse": a round to which a worker brings NaN or infinity fails with NotFinite. "propagate": they come
        out as torch's own layer gives them.
      activation: "relu": the layer returns max(0, y), or max(0, y + z) where `forward` gets z, by the same kernels that
        normalize, so that it costs no pass over memory of its own. In evaluation likewise, by torch's operations.

    On CUDA tensors, a worker made with `stream_ordered=True` lets the calling thread run ahead of the rounds.

    Training needs a worker, and every worker of the group has to run the layer: a batch may be empty. Evaluation is
    local. A global batch of a single value for each channel raises ValueError at every worker, as in
    torch.nn.BatchNorm. A global batch without any value changes no state. Where a running statistic is None, or
    `num_batches_tracked`, the others go on, as in torch.nn.BatchNorm of any version.
    """

    # The class of a layer that was never anything else, once a conversion is undone.
    reverts_to: Any = BatchNorm

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
        numeric: str = "refuse",
        activation: Optional[str] = None,
    ) -> None:
        if process_group is not None:
            raise ValueError("process_group must be None: give a worker of another group")
        _synchronized.check_options(worker, eps_mode, numeric, activation)
        average: Any = momentum  # torch's hints do not allow for None.
        super().__init__(num_features, eps, average, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = None
        self.worker = worker
        self.eps_mode = eps_mode
        self.layer = _naming.number(worker) if layer is None else layer
        self.biased_running_variance = _arguments.truth("biased_running_variance", biased_running_variance)
        self.numeric = numeric
        self.activation = activation

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _subclasses.patched(self, value) if name == "forward" else value)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1.0)
            if self.bias is not None:
                self.bias.fill_(0.0)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{super().extra_repr()}, eps_mode={self.eps_mode}, layer={self.layer}{activation}"

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        # A trace would take the number for a tensor, and warn of the comparison.
        if _supported.tracing_state() is None and input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(
        self, input: torch.Tensor, mask: Optional[torch.Tensor] = None, *, z: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """input [N, C, ...] -> the same shape, type and layout.

        mask: True, or 1, where a position counts; [N, ...] or [N, 1, ...], or a shape that broadcasts to these. Statistics
        are taken from those positions alone; the output is normalized everywhere.
        z: of the input's shape and type; added to the normalized values, before the activation. A residual connection.
        """
        if type(input) is not torch.Tensor or mask is not None or z is not None:
            given = {name: value for name, value in (("mask", mask), ("z", z)) if value is not None}
            node = _synchronized.leaf_call(self, (input,), given)
            if node is not None:
                traced: torch.Tensor = node
                return traced
        self._check_input_dim(input)
        if mask is not None:
            masked: torch.Tensor = _masked_forward(self, input, mask, z)
            return masked
        if self.training:
            normalized: torch.Tensor = _train(self, input, z)
            return normalized
        _synchronized.check_addend(input, z)
        if self.running_mean is None and self.running_var is None:
            evaluated = self._normalize_alone(input)
        else:
            evaluated = self._evaluate(input, self.running_mean, self.running_var)
        return _synchronized.activated(evaluated, z, self.activation == "relu")

    # ---- Evaluation ----

    def _evaluate(self, x: torch.Tensor, mean: Optional[torch.Tensor], var: Optional[torch.Tensor]) -> torch.Tensor:
        """torch refuses a single one of the two."""
        return _evaluation.batch_norm(x, mean, var, self.weight, self.bias, False, self.eps)

    def _normalize_alone(self, x: torch.Tensor) -> torch.Tensor:
        """With the local batch's statistics, as torch does in evaluation where there are no running ones."""
        return _evaluation.batch_norm(x, None, None, self.weight, self.bias, True, self.eps)

    # ---- Training ----

    def _step(self, z: Optional[torch.Tensor] = None) -> _synchronized.Step:
        parameters, buffers = self._members()
        mean = var = None
        try:  # They are usually there: a module's __getattr__ takes as long as a call of the library.
            weight, bias = parameters["weight"], parameters["bias"]
            if self.track_running_stats:
                mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:
            weight, bias = self.weight, self.bias
            if self.track_running_stats:
                mean, var = self.running_mean, self.running_var
        return _synchronized.Step(
            self,
            weight,
            bias,
            mean,
            var,
            self.eps,
            self.track_running_stats,
            z,
            self.activation == "relu",
        )

    def _members(self) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """The parameters and buffers that the attributes of their names are; none where a class answers for them itself, as
        that which torch.nn.utils.stateless.functional_call puts over a module for the time of a call.
        """
        if type(self).__getattribute__ is object.__getattribute__:
            return self._parameters, self._buffers
        return {}, {}

    def _tracked_batches(self) -> Optional[torch.Tensor]:
        counted: Optional[torch.Tensor] = self._members()[1].get("num_batches_tracked", _ELSEWHERE)
        return self.num_batches_tracked if counted is _ELSEWHERE else counted

    def _count_batch(self) -> Optional[float]:
        counted = self._tracked_batches()
        if counted is not None:
            counted.add_(1)
        return self.momentum

    def _uncount_batch(self) -> None:
        counted = self._tracked_batches()
        if counted is not None:
            counted.sub_(1)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: None = None) -> torch.nn.Module:
        """torch.nn.SyncBatchNorm's class method; see the function of the same name. A process group is a TypeError."""
        from syncbn.torch.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A SyncBatchNorm that takes num_features from its first input, [N, C] or [N, C, ...], and becomes a SyncBatchNorm.

    The arguments are SyncBatchNorm's without num_features and process_group.
    """

    cls_to_become: Any = SyncBatchNorm
    reverts_to: Any = LazyBatchNorm

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
        numeric: str = "refuse",
        activation: Optional[str] = None,
    ) -> None:
        _synchronized.check_options(worker, eps_mode, numeric, activation)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.worker, self.eps_mode, self.numeric, self.activation = worker, eps_mode, numeric, activation
        self.biased_running_variance = _arguments.truth("biased_running_variance", biased_running_variance)
        if layer is not None or worker is not None:  # Else SyncBatchNorm's constructor has numbered it.
            self.layer = _naming.number(worker) if layer is None else layer

    def initialize_parameters(
        self, input: torch.Tensor, mask: Optional[torch.Tensor] = None, *, z: Optional[torch.Tensor] = None
    ) -> None:
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
