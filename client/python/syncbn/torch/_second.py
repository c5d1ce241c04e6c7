"""Second derivatives: the gradient of a backward pass.

A backward pass makes of x, dy and weight, with the means taken over the global batch (N values in each channel),
r = invstd, h = (x - mean) * r, and d = 1, or 0 where an epsilon that clamps makes r a constant:

    dx       = weight * r * (dy - mean(dy) - d * h * mean(dy * h))
    d_weight = sum(dy * h)    d_bias = sum(dy), over this worker's values

Let v, a and b be their gradients, and u = weight * v. The sum over all workers of v * dx + a * d_weight + b * d_bias
then has the gradients

    of dy      r * (u - mean(u) - d * h * mean(u * h)) + a * h + b
    of weight  sum(v * r * (dy - mean(dy) - d * h * mean(dy * h))), over this worker's values
    of x       r * (g - mean(g) - d * h * mean(g * h)) - d * h * r^2 * q
    with       g = a * dy - d * r * (mean(dy * h) * u + mean(u * h) * dy), what h gets,
               q = mean(u * dy) - mean(u) * mean(dy) - d * mean(u * h) * mean(dy * h), what r gets, divided by N

so that seven sums per channel are all that the workers need of each other. a is a worker's own, and differs between
them. Everything is in float64.

With a mask m, 1 where a position counts and 0 elsewhere, N is the sum of m over all workers, while all positions are
normalized. Then m is a factor of every mean in dx, of u in mean(u), mean(u * h) and g, and of all in the gradient of x
that comes through mean and r:

    dx         weight * r * (dy - m * (mean(dy) + d * h * mean(dy * h)))
    of dy      r * (u - mean(m * u) - d * h * mean(m * u * h)) + a * h + b
    of weight  sum(v * r * (dy - m * (mean(dy) + d * h * mean(dy * h))))
    of x       r * (g - m * mean(g)) - m * d * h * (r * mean(g * h) + r^2 * q)
    with       g = a * dy - d * r * (mean(dy * h) * m * u + mean(m * u * h) * dy),
               q = mean(u * dy) - mean(m * u) * mean(dy) - d * mean(m * u * h) * mean(dy * h)
"""

from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from syncbn import _names
from syncbn.core import Worker
from syncbn.torch import _supported, _tensors

NO_THIRD = "SyncBatchNorm has first and second derivatives, and no third: call the second backward without create_graph"


class _Last(torch.autograd.Function):
    """A second backward pass that autograd records, in order to say that there is no third."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Optional[torch.Tensor]) -> Any:
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional[torch.Tensor]) -> Any:
        raise RuntimeError(NO_THIRD)


def last(function: Callable[..., Any], *tensors: Optional[torch.Tensor]) -> Any:
    """function(*tensors), a tuple; an error to whoever differentiates it."""
    _supported.check_modes()
    return _Last.apply(function, *tensors) if torch.is_grad_enabled() else function(*tensors)


# m * u, m * u * (x - mean), u * dy, dy, dy * (x - mean); a * sum(dy), a * sum(dy * (x - mean)).
_SUMS = 7
_CHECKS = 3


class Statistics(NamedTuple):
    """The forward pass's, per channel, float64, on the host."""

    values: int  # In each channel, over all workers.
    mean: torch.Tensor
    invstd: torch.Tensor
    depends: torch.Tensor  # d.

    @staticmethod
    def make(count: int, mean: np.ndarray, var: np.ndarray, eps: float, clamp: bool) -> "Statistics":
        invstd = 1.0 / np.sqrt(np.maximum(var, eps) if clamp else var + eps)
        depends = ~(var < eps) if clamp else np.ones_like(var)
        vectors = (torch.from_numpy(np.asarray(v, dtype=np.float64)) for v in (mean, invstd, depends))
        return Statistics(count, *vectors)

    @staticmethod
    def of(forward_pass: Any, channels: int) -> "Statistics":
        mean, var = forward_pass.mean(channels), forward_pass.var(channels)
        return Statistics.make(forward_pass.count, mean, var, forward_pass.eps, forward_pass.clamp)


class Part(NamedTuple):
    """One worker's, or one replica's, tensors. of_*: the gradients of dx, d_weight and d_bias; None: zero. counts: the
    mask as booleans that broadcast over x; None: all positions count.
    """

    x: torch.Tensor
    dy: torch.Tensor
    weight: Optional[torch.Tensor]
    of_dx: Optional[torch.Tensor]
    of_d_weight: Optional[torch.Tensor]
    of_d_bias: Optional[torch.Tensor]
    counts: Optional[torch.Tensor] = None

    def masked(self, value: torch.Tensor) -> torch.Tensor:
        """m * value, whatever stands where m is 0."""
        return value if self.counts is None else value.masked_fill(~self.counts, 0.0)

    def centred(self, mean: torch.Tensor) -> torch.Tensor:
        """x - mean. Padding may be anything: where it neither counts nor has a part in the loss, it is 0."""
        xmu = self.x.double() - spread(mean, self.x)
        return xmu if self.counts is None else xmu.masked_fill(~self.counts & (self.dy == 0), 0.0)


def others(x: torch.Tensor) -> List[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def spread(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[C], on x's device and in float64, in the shape in which it broadcasts over x."""
    return vector.to(x.device, torch.float64).view([1, -1] + [1] * (x.dim() - 2))


def _u(part: Part) -> Optional[torch.Tensor]:
    if part.of_dx is None:
        return None
    return part.of_dx.double() if part.weight is None else part.of_dx.double() * spread(part.weight, part.x)


def local_sums(part: Part, statistics: Statistics) -> torch.Tensor:
    """[7, C] on the host."""
    dims, dy, u = others(part.x), part.dy.double(), _u(part)
    xmu = part.centred(statistics.mean)
    sums = torch.zeros(_SUMS, part.x.size(1), dtype=torch.float64)
    if u is not None:
        counted = part.masked(u)
        sums[:3] = torch.stack([counted.sum(dims), (counted * part.masked(xmu)).sum(dims), (u * dy).sum(dims)])
    sums[3:5] = torch.stack([dy.sum(dims), (dy * xmu).sum(dims)])
    if part.of_d_weight is not None:
        sums[5:] = sums[3:5] * part.of_d_weight.double().cpu()
    return sums


def merged(worker: Worker, layer: str, sequence: int, local: torch.Tensor) -> torch.Tensor:
    """The sums over all workers: a round of the layer's own, numbered by the order in which its passes come."""
    if worker.min_workers is not None:
        raise RuntimeError("second derivatives of SyncBatchNorm need every worker: they do not go with min_workers")
    # 1, s and s^2 tell whether all workers mean the forward pass of one sequence s.
    number = float(sequence % (1 << 20))
    vector = np.concatenate([local.numpy().reshape(-1), [1.0, number, number * number]])
    total = worker.all_reduce(_names.derived(layer, "/second"), vector)
    ones, firsts, squares = total[-_CHECKS:]
    if ones * squares != firsts * firsts:
        raise RuntimeError(
            f"the workers go back a second time through different forward passes of layer {layer!r}: where a layer is "
            "called several times, all workers differentiate in the same order"
        )
    return torch.from_numpy(total[:-_CHECKS].reshape(_SUMS, -1))


def gradients(
    part: Part, statistics: Statistics, sums: torch.Tensor, needed: Tuple[bool, bool, bool]
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The gradients of dy, x and weight, those that are needed, in these tensors' types."""
    x, dy, u = part.x, part.dy.double(), _u(part)
    r, d = statistics.invstd, statistics.depends
    means: torch.Tensor = torch.div(sums, max(1, statistics.values))
    u0, uh, udy, dy0, dyh, g0, gh = means[0], means[1] * r, means[2], means[3], means[4] * r, means[5], means[6] * r
    h = part.centred(statistics.mean) * spread(r, x)
    a = None if part.of_d_weight is None else spread(part.of_d_weight, x)
    zero = torch.zeros((), dtype=torch.float64, device=x.device)

    def of_dy() -> torch.Tensor:
        value = spread(r, x) * ((zero if u is None else u) - spread(u0, x) - h * spread(d * uh, x))
        value = value if a is None else value + a * h
        return value if part.of_d_bias is None else value + spread(part.of_d_bias, x)

    def of_x() -> torch.Tensor:
        g = dy * spread(-d * r * uh, x)
        g = g if u is None else g - part.masked(u) * spread(d * r * dyh, x)
        g = g if a is None else g + a * dy
        mean_g, mean_gh = g0 - d * r * (dyh * u0 + uh * dy0), gh - 2 * d * r * dyh * uh
        of_r = udy - u0 * dy0 - d * uh * dyh
        slope = d * (r * mean_gh + r * r * of_r)
        return spread(r, x) * g - part.masked(spread(r * mean_g, x) + h * spread(slope, x))

    def of_weight() -> torch.Tensor:
        if part.of_dx is None:
            return torch.zeros(x.size(1), dtype=torch.float64, device=x.device)
        through = part.masked(spread(dy0, x) + h * spread(d * dyh, x))
        return (part.of_dx.double() * (dy - through)).sum(others(x)) * r.to(x.device)

    types = (part.dy, part.x, part.weight)
    found = [
        _tensors.rounded(function(), like.dtype).reshape(like.shape) if wanted and like is not None else None
        for function, like, wanted in zip((of_dy, of_x, of_weight), types, needed)
    ]
    return found[0], found[1], found[2]
