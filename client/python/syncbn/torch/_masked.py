"""Batch normalization with a mask over positions: statistics of those that count, and an output for all of them.

With m = 1 where a position counts, N = sum(m) over all workers, and the sums over dy running over *all* positions, since
all of them are normalized:

    dx = weight * invstd * (dy - m * (sum_dy / N + (x - mean) * invstd^2 * sum_dy_xmu / N))

The workers exchange what they exchange without a mask: a count with its moments, and two sums. Everything is in float64
arithmetic of torch, on x's device.
"""

import functools
from typing import Any, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from syncbn import _names
from syncbn.core import Moments, Worker, default_worker
from syncbn.torch import _checkpointing, _graphs, _replicas, _running, _second, _supported, _tensors
from syncbn.torch._second import Statistics, others, spread

_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) + (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def positions(mask: Any, x: torch.Tensor) -> torch.Tensor:
    """The mask as booleans [N, 1, ...] of x's positions.

    Raises:
      TypeError: for what is no tensor of booleans, whole numbers or floating numbers.
      ValueError: for a shape that does not fit, for values other than 0 and 1, for one that differs by channel.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; a tensor is needed, True where a position counts")
    if mask.dtype not in _NUMBERS:
        raise TypeError(f"mask is {mask.dtype}; booleans are needed, or numbers that are 0 or 1")
    if mask.device != x.device:
        raise RuntimeError(f"the input is on {x.device}, and mask on {mask.device}")
    given, wanted = tuple(mask.shape), (x.size(0), 1, *x.shape[2:])
    mask = mask.detach()
    if mask.dim() < x.dim():  # Without a channel axis.
        mask = mask.reshape((1,) * (x.dim() - 1 - mask.dim()) + given).unsqueeze(1)
    by_channel = mask.dim() == x.dim() and mask.size(1) == x.size(1)
    if by_channel:
        wanted = tuple(x.shape)
    if mask.dim() != x.dim() or any(have not in (1, want) for have, want in zip(mask.shape, wanted)):
        raise ValueError(
            f"mask of shape {given} does not fit an input of shape {tuple(x.shape)}: it broadcasts over positions, with "
            "or without a channel axis of size 1"
        )
    if mask.dtype != torch.bool:
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"mask has the value {wrong[0].item()}; it is 1 (True) where a position counts, else 0")
        mask = mask != 0
    if by_channel:
        if not bool((mask == mask[:, :1]).all()):
            raise ValueError(
                "mask differs by channel: it counts positions, and a round has one count for all channels; give it a "
                "channel axis of size 1"
            )
        mask = mask[:, :1]
    return mask.expand(x.size(0), 1, *x.shape[2:])


def local_moments(x: torch.Tensor, counts: Optional[torch.Tensor] = None) -> Tuple[int, torch.Tensor, torch.Tensor]:
    """Count, mean and M2 per channel, float64 on the host, of the positions that count (None: all). NaN elsewhere does not
    matter.
    """

    def masked(value: torch.Tensor) -> torch.Tensor:
        return value if counts is None else value.masked_fill(~counts, 0.0)

    wide = x.detach().double()
    count = x.numel() // x.size(1) if counts is None else int(counts.sum())
    mean = masked(wide).sum(others(x)) / max(1, count)
    deviations = masked(wide - spread(mean, x))
    # The first mean's rounding, seen in the sum of deviations from it.
    rest = deviations.sum(others(x)) / max(1, count)
    m2 = masked(deviations - spread(rest, x)).square().sum(others(x))
    return count, (mean + rest).cpu(), m2.cpu()


class BackwardSums:
    """The sums over all workers that the gradients of one forward round need."""

    def __init__(self, worker: Optional[Worker], name: str, sequence: int) -> None:
        """worker: None where this worker has no part in backward rounds."""
        self._worker, self._name, self._sequence = worker, name, sequence
        self._passes = 0

    def merge(self, first: torch.Tensor, second: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The sums of two vectors, on the host. The protocol has one backward round; later passes send one vector, in turn."""
        _supported.check_modes()
        if self._worker is None:
            return first, second
        self._passes += 1
        vectors = first.detach().cpu().numpy(), second.detach().cpu().numpy()
        if self._passes == 1:
            sums = self._worker.synchronize_backward(self._name, self._sequence, *vectors)
            return torch.from_numpy(sums.sum_dy), torch.from_numpy(sums.sum_dy_xmu)
        both = self._worker.all_reduce(_names.derived(self._name, "/retained"), np.concatenate(vectors))
        merged = torch.from_numpy(both).chunk(2)
        return merged[0], merged[1]


class _Pass:
    """A forward pass, whose round is over."""

    def __init__(
        self, worker: Optional[Worker], name: str, count: int, mean: np.ndarray, var: np.ndarray, eps: float, clamp: bool
    ) -> None:
        self.worker, self.name, self.count, self.mean, self.var = worker, name, count, mean, var
        self.statistics = Statistics.make(count, mean, var, eps, clamp)
        self.sequence = 0
        self.backward_required = self.has_round = False
        self.sums = BackwardSums(None, name, 0)


class _Saved(NamedTuple):
    """Values that forward leaves to backward beside the tensors that autograd saves."""

    state: _Pass
    x: _tensors.Form
    counts: _tensors.Form
    weight: Optional[_tensors.Form]
    bias: Optional[_tensors.Form]
    needed: Tuple[bool, bool, bool]  # The gradients of x, weight and bias.


class _Normalize(torch.autograd.Function):
    """y = weight * (x - mean) * invstd + bias at all positions; `anchor` makes it differentiable where nothing else does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        counts: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        anchor: Optional[torch.Tensor],
        state: _Pass,
    ) -> torch.Tensor:
        forms: List[Any] = [_tensors.form(v) for v in (x, counts, weight, bias)]
        needed = ctx.needs_input_grad
        ctx.saved = _Saved(state, forms[0], forms[1], forms[2], forms[3], (needed[0], needed[2], needed[3]))
        ctx.save_for_backward(x, counts, weight)
        found, weight, bias = state.statistics, _tensors.readable(weight), _tensors.readable(bias)
        y = (x.double() - spread(found.mean, x)) * spread(found.invstd, x)
        y = y if weight is None else y * spread(weight, x)
        return _tensors.rounded(y if bias is None else y + spread(bias, x), x.dtype)

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, dy: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, counts, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph.
            dx, d_weight, d_bias = _Gradients.apply(dy, x, counts, weight, ctx.saved)
        else:
            dx, d_weight, d_bias = _gradients(ctx.saved, dy, x, counts, weight)
        return dx, None, d_weight, d_bias, None, None


def _part(
    saved: _Saved,
    dy: torch.Tensor,
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: Optional[torch.Tensor],
    cotangents: Tuple[Optional[torch.Tensor], ...] = (None, None, None),
) -> _second.Part:
    """The tensors as they were, whatever autograd's hooks gave back."""
    saved.counts.check("the mask", counts)
    named = zip(cotangents, ("dx", "d_weight", "d_bias"), (saved.x, saved.weight, saved.bias))
    given: List[Any] = [
        None if value is None or form is None else _tensors.given_back(f"the gradient of {name}", value, form, False)
        for value, name, form in named
    ]
    return _second.Part(
        _tensors.given_back("the input", x, saved.x, False),
        _tensors.given_back("the output's gradient", dy, saved.x, False),
        _tensors.vector_given_back("the weight", weight, saved.weight),
        given[0],
        given[1],
        given[2],
        counts,
    )


def _gradients(
    saved: _Saved, dy: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, weight: Optional[torch.Tensor]
) -> Tuple[Optional[torch.Tensor], ...]:
    """dx, d_weight and d_bias, those that are needed, by one backward round."""
    part, found = _part(saved, dy, x, counts, weight), saved.state.statistics
    x, weight, wide, xmu = part.x, part.weight, part.dy.double(), part.centred(found.mean)
    own_dy, own_dy_xmu = wide.sum(others(x)), (wide * xmu).sum(others(x))
    sum_dy, sum_dy_xmu = saved.state.sums.merge(own_dy, own_dy_xmu)
    count, invstd = max(1, saved.state.count), found.invstd
    dx = d_weight = d_bias = None
    if saved.needed[0]:
        mean_dy: torch.Tensor = torch.div(sum_dy, count)
        slope: torch.Tensor = invstd.square() * torch.div(sum_dy_xmu.cpu(), count)
        slope = slope.masked_fill(found.depends == 0, 0.0)
        dx = (wide - part.masked(spread(mean_dy, x) + xmu * spread(slope, x))) * spread(invstd, x)
        dx = _tensors.rounded(dx if weight is None else dx * spread(weight, x), x.dtype)
    if saved.weight is not None and saved.needed[1]:
        d_weight = _tensors.rounded(own_dy_xmu * invstd.to(x.device), saved.weight.dtype).reshape(saved.weight.shape)
    if saved.bias is not None and saved.needed[2]:
        d_bias = _tensors.rounded(own_dy, saved.bias.dtype).reshape(saved.bias.shape)
    return dx, d_weight, d_bias


class _Gradients(torch.autograd.Function):
    """A backward pass as an operation that has a derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: torch.Tensor,
        x: torch.Tensor,
        counts: torch.Tensor,
        weight: Optional[torch.Tensor],
        saved: _Saved,
    ) -> Tuple[Optional[torch.Tensor], ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, counts, weight)
        ctx.saved = saved
        return _gradients(saved, dy, x, counts, weight)

    @staticmethod
    @_graphs.outside_of_graphs
    def backward(ctx: Any, *cotangents: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
        needed = ctx.needs_input_grad
        function = functools.partial(_second_backward, ctx.saved, (needed[0], needed[1], needed[3]))
        of_dy, of_x, of_weight = _second.last(function, *ctx.saved_tensors, *cotangents)
        return of_dy, of_x, None, of_weight, None


def _second_backward(
    saved: _Saved,
    needed: Tuple[bool, bool, bool],
    dy: torch.Tensor,
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: Optional[torch.Tensor],
    *cotangents: Optional[torch.Tensor],
) -> Tuple[Optional[torch.Tensor], ...]:
    """The gradients of dy, x and weight, from those of dx, d_weight and d_bias."""
    part, state = _part(saved, dy, x, counts, weight, cotangents), saved.state
    local = _second.local_sums(part, state.statistics)
    sums = local
    if state.has_round and state.worker is not None:
        sums = _second.merged(state.worker, state.name, state.sequence, local)
    return _second.gradients(part, state.statistics, sums, needed)


def forward(layer: Any, x: torch.Tensor, mask: Any) -> torch.Tensor:
    """A SyncBatchNorm's forward with a mask: in training by a round; in evaluation the running statistics, if it has some,
    which no mask changes.
    """
    counts = positions(mask, x)
    if layer.training:
        return _train(layer, x, counts)
    if layer.running_mean is not None or layer.running_var is not None:
        evaluated: torch.Tensor = layer._evaluate(x, layer.running_mean, layer.running_var)
        return evaluated
    count, mean, m2 = local_moments(x, counts)
    if count == 0 and x.numel():
        raise ValueError("mask leaves no position: there is nothing to take statistics of")
    state = _Pass(None, "", count, mean.numpy(), m2.numpy() / max(1, count), layer.eps, False)
    result: torch.Tensor = _Normalize.apply(x, counts, layer.weight, layer.bias, None, state)
    return result


def _train(layer: Any, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    if _replicas.current() is not None:
        raise RuntimeError("a mask does not go with replicas on threads: run a process for each")
    _supported.check_supported(x, layer.weight, layer.bias)
    with _checkpointing.unseen():
        return _train_supported(layer, x, counts)


def _train_supported(layer: Any, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    checkpoint = _checkpointing.context()
    state = checkpoint.replay(layer)
    first_time = state is None
    if state is None:
        state = _run_round(layer, x, counts, checkpoint.gradient_follows)
    checkpoint.record(layer, state)
    count = state.count
    if count == 1:
        raise ValueError("Expected more than 1 value per channel when training, and the masks of all workers leave one")
    if count == 0 and x.numel():
        raise ValueError("the masks of all workers leave no position: there is nothing to take statistics of")
    if first_time:
        _running.update(layer, count, state.mean, state.var)
    anchor = None
    if torch.is_grad_enabled() and state.backward_required:  # Something differentiable, if nothing else is.
        anchor = torch.empty(0, requires_grad=True)
    result: torch.Tensor = _Normalize.apply(x, counts, layer.weight, layer.bias, anchor, state)
    return result


def _run_round(layer: Any, x: torch.Tensor, counts: torch.Tensor, gradient_follows: bool) -> _Pass:
    worker = layer.worker or default_worker()
    name = layer._declare(worker, x.size(1), layer.eps)
    count, mean, m2 = local_moments(x, counts)
    # True: a backward round follows. None: if another worker wants one. False: none for this worker.
    role: Optional[bool] = gradient_follows
    if not gradient_follows and torch.is_grad_enabled():
        role = True if x.requires_grad else None
    vectors = (mean.numpy(), m2.numpy()) if count else (None, None)
    merged: Moments = worker.synchronize(name, count, *vectors, backward=role)
    clamp = layer.eps_mode == "clamp"
    state = _Pass(worker, name, merged.count, merged.mean, merged.var, layer.eps, clamp)
    state.sequence, state.backward_required = merged.sequence, merged.backward_required
    counted = worker.rank not in merged.missing_ranks
    state.has_round = role is not False and merged.backward_required and merged.count > 0 and counted
    state.sums = BackwardSums(worker if state.has_round else None, name, merged.sequence)
    return state
