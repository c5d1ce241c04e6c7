"""The NumPy front's passes with a mask over positions, in float64 arithmetic: see `syncbn.torch._masked` for the formulas.

Arrays are [N, C, ...], masks [N, 1, ...].
"""

import functools
from typing import Any, Optional, Tuple

import numpy as np

from syncbn import _dlpack, _names
from syncbn.core import Moments, Worker


def positions(mask: Any, x: np.ndarray, channels_last: bool) -> np.ndarray:
    """The mask as booleans [N, 1, ...] of the positions of x, [N, C, ...].

    Raises:
      TypeError: for what is neither boolean nor a whole or floating number.
      ValueError: for a shape that does not fit, for values other than 0 and 1, for one that differs by channel.
    """
    array = _dlpack.to_numpy(mask)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"mask is {array.dtype}; booleans are needed, or numbers that are 0 or 1")
    given = array.shape
    if array.ndim < x.ndim:  # Without a channel axis.
        array = np.expand_dims(array.reshape((1,) * (x.ndim - 1 - array.ndim) + given), 1)
    elif channels_last and array.ndim == x.ndim:
        array = np.moveaxis(array, -1, 1)
    by_channel = array.ndim == x.ndim and array.shape[1] == x.shape[1]
    wanted = x.shape if by_channel else (x.shape[0], 1, *x.shape[2:])
    if array.ndim != x.ndim or any(have not in (1, want) for have, want in zip(array.shape, wanted)):
        shape = np.moveaxis(x, 1, -1).shape if channels_last else x.shape
        raise ValueError(
            f"mask of shape {given} does not fit x of shape {shape}: it broadcasts over positions, with or without a "
            "channel axis of size 1"
        )
    if array.dtype != np.bool_:
        wrong = array[(array != 0) & (array != 1)]
        if wrong.size:
            raise ValueError(f"mask has the value {wrong.flat[0]}; it is 1 (True) where a position counts, else 0")
        array = array != 0
    if by_channel:
        if not (array == array[:, :1]).all():
            raise ValueError(
                "mask differs by channel: it counts positions, and a round has one count for all channels; give it a "
                "channel axis of size 1"
            )
        array = array[:, :1]
    return np.broadcast_to(array, (x.shape[0], 1, *x.shape[2:]))


def _others(x: np.ndarray) -> Tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def _spread(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    return vector.astype(np.float64).reshape([1, -1] + [1] * (x.ndim - 2))


def _quiet(function: Any) -> Any:
    """NaN and infinity are for the layer's policy to refuse, not for NumPy to warn of."""

    @functools.wraps(function)
    def quiet(*arguments: Any, **options: Any) -> Any:
        with np.errstate(invalid="ignore", over="ignore"):
            return function(*arguments, **options)

    return quiet


@_quiet
def moments(x: np.ndarray, counts: np.ndarray) -> Tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and M2 per channel, of the positions that count; NaN elsewhere does not matter."""
    count = int(counts.sum())
    wide = np.where(counts, x.astype(np.float64), 0.0)
    mean = wide.sum(_others(x)) / max(1, count)
    deviations = np.where(counts, wide - _spread(mean, x), 0.0)
    # The first mean's rounding, seen in the sum of deviations from it.
    rest = deviations.sum(_others(x)) / max(1, count)
    m2 = np.square(np.where(counts, deviations - _spread(rest, x), 0.0)).sum(_others(x))
    return count, mean + rest, m2


class Pass:
    """A forward pass whose round is over, and the way back through it."""

    def __init__(
        self,
        worker: Worker,
        layer: str,
        x: np.ndarray,
        counts: np.ndarray,
        *,
        backward: bool,
        sequence: Optional[int],
        eps: float,
        clamp: bool,
    ) -> None:
        """Takes the round. The layer has been declared."""
        self._worker, self._layer, self._x, self._counts = worker, layer, x, counts
        count, mean, m2 = moments(x, counts)
        vectors = (mean, m2) if count else (None, None)
        merged: Moments = worker.synchronize(layer, count, vectors[0], vectors[1], sequence, backward=backward)
        if merged.count == 0 and x.size:
            raise ValueError("the masks of all workers leave no position: there is nothing to take statistics of")
        self.count, self._mean, self._var = merged.count, merged.mean, merged.var
        self.backward_required = merged.backward_required
        counted = worker.rank not in merged.missing_ranks
        self._has_round = backward and merged.backward_required and merged.count > 0 and counted
        self._sequence = merged.sequence
        self._invstd = 1.0 / np.sqrt(np.maximum(self._var, eps) if clamp else self._var + eps)
        self._depends = self._var >= eps if clamp else np.ones(self._var.shape, bool)
        self._gate: Optional[np.ndarray] = None
        self._backward_passes = 0

    def mean(self, channels: int) -> np.ndarray:
        return self._mean.copy()

    def var(self, channels: int) -> np.ndarray:
        return self._var.copy()

    @_quiet
    def normalize(
        self, y: np.ndarray, weight: Optional[np.ndarray], bias: Optional[np.ndarray], residual: Optional[np.ndarray], relu: bool
    ) -> None:
        """Writes y, at all positions."""
        x = self._x
        wide = (x.astype(np.float64) - _spread(self._mean, x)) * _spread(self._invstd, x)
        wide = wide if weight is None else wide * _spread(weight, x)
        wide = wide if bias is None else wide + _spread(bias, x)
        wide = wide if residual is None else wide + residual.astype(np.float64)
        if relu:
            self._gate = wide > 0
            wide = np.maximum(wide, 0.0)
        y[...] = wide

    def update(self, running: Optional[np.ndarray], new: np.ndarray, momentum: float) -> None:
        if running is not None and self.count > 0:
            running[...] = (1 - momentum) * running.astype(np.float64) + momentum * new

    def _merged(self, sum_dy: np.ndarray, sum_dy_xmu: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The sums over all workers. The protocol has one backward round; later passes send one vector, in turn."""
        if not self._has_round:
            return sum_dy, sum_dy_xmu
        self._backward_passes += 1
        if self._backward_passes == 1:
            sums = self._worker.synchronize_backward(self._layer, self._sequence, sum_dy, sum_dy_xmu)
            return sums.sum_dy, sums.sum_dy_xmu
        both = self._worker.all_reduce(_names.derived(self._layer, "/retained"), np.concatenate([sum_dy, sum_dy_xmu]))
        return both[: sum_dy.size], both[sum_dy.size :]

    @_quiet
    def gradients(
        self, dy: np.ndarray, weight: Optional[np.ndarray]
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """dx, d_weight, d_bias and d_residual, float64."""
        x = self._x
        wide = dy.astype(np.float64)
        wide = wide if self._gate is None else np.where(self._gate, wide, 0.0)
        xmu = x.astype(np.float64) - _spread(self._mean, x)
        # Padding may be anything: where it neither counts nor matters to the loss, it has no part in the sum.
        seen = np.where(self._counts | (wide != 0), xmu, 0.0)
        own_dy, own_dy_xmu = wide.sum(_others(x)), (wide * seen).sum(_others(x))
        sum_dy, sum_dy_xmu = self._merged(own_dy, own_dy_xmu)
        count = max(1, self.count)
        slope = np.where(self._depends, self._invstd**2 * sum_dy_xmu / count, 0.0)
        through = np.where(self._counts, _spread(sum_dy / count, x) + xmu * _spread(slope, x), 0.0)
        scale = self._invstd if weight is None else self._invstd * weight.astype(np.float64)
        return (wide - through) * _spread(scale, x), own_dy_xmu * self._invstd, own_dy, wide
