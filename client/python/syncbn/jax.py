"""Batch normalization over all workers for JAX, under jit and grad.

    y, state = syncbn.jax.sync_batch_norm(x, scale, bias, state, worker=worker, layer="stem.bn")

Moments and gradient sums are reduced on the device. Only those vectors go to the host and over the network, by
`jax.experimental.io_callback`, ordered: so the steps of one program meet the other workers' in the program's order.
float64 gets through without jax_enable_x64, as pairs of float32.

One process is one worker, on one device. An array that jit spreads over several devices of the process is one batch.
vmap, pmap, shard_map over more than one device, jax.checkpoint and forward mode are refused, by JAX or here: there,
rounds would have no order, or no partner at the other workers. One forward pass may be gone back through several times
(jax.vjp, jax.jacrev), and derivatives be differentiated again, if all workers do it, and, for derivatives of
derivatives, are of JAX.

JAX reports what goes wrong in a callback as an error of its own, maybe not before the result is waited for. In
`typed_errors` it is what it was:

    with syncbn.jax.typed_errors():
        loss, gradients = jax.block_until_ready(step(parameters, batch))
"""

import contextlib
import functools
from typing import Any, Iterable, Iterator, NamedTuple, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from syncbn import _arguments, _jax_rounds, _library
from syncbn._jax_rounds import Layer, typed_errors
from syncbn.core import Worker, default_worker

__all__ = ["RunningStatistics", "init_statistics", "sync_batch_norm", "typed_errors"]


def _mapped_axes() -> Iterable[Any]:
    """The names of the axes that pmap or shard_map runs this trace over."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", None)
    if mesh is not None:
        return tuple(mesh().manual_axes)
    # Before JAX 0.5.
    return tuple(getattr(jax.core, "unsafe_get_axis_names_DO_NOT_USE", tuple)())


@contextlib.contextmanager
def _not_mapped() -> Iterator[None]:
    """Refuses to be traced for several devices or batch elements at once."""
    if any(jax.lax.psum(1, name) != 1 for name in _mapped_axes()):
        raise ValueError(_jax_rounds.MAPPED)
    try:
        yield
    except ValueError as error:
        if "vmap" in str(error):  # JAX's own refusal, where the axis has no name.
            raise ValueError(_jax_rounds.MAPPED) from error
        raise


class RunningStatistics(NamedTuple):
    """The running statistics as Flax keeps them: a state that goes in and comes out."""

    mean: Any
    """[C]."""
    var: Any
    """[C]."""


def init_statistics(channels: int, dtype: Any = jnp.float32) -> RunningStatistics:
    """Mean 0 and variance 1."""
    return RunningStatistics(jnp.zeros(channels, dtype), jnp.ones(channels, dtype))


# ---- Arguments ----


def _floating(value: Any, name: str) -> Any:
    """An array of a real floating type."""
    if isinstance(value, (list, tuple)):
        raise TypeError(f"sync_batch_norm: {name} is a {type(value).__name__}; an array of a floating type is needed")
    given = getattr(value, "dtype", None)
    try:
        array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__ if given is None else given
        raise TypeError(f"sync_batch_norm: {name} is {kind}; an array of a floating type is needed") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"sync_batch_norm: {name} is {array.dtype if given is None else given}; a floating type is needed")
    if given is not None and np.dtype(given).itemsize > 8:  # JAX would round it without a word.
        raise TypeError(f"sync_batch_norm: {name} is {given}; the widest type is float64")
    return array


def _vector(value: Any, channels: int, name: str) -> Any:
    array = _floating(value, name)
    if array.shape != (channels,):
        raise ValueError(f"sync_batch_norm: {name} has shape {array.shape}, and x {channels} channels")
    return array


def _running(statistics: Any, channels: int) -> RunningStatistics:
    try:
        mean, var = statistics
    except (TypeError, ValueError):
        kind = type(statistics).__name__
        raise TypeError(f"statistics is a {kind}; it has to be RunningStatistics, a mean and a variance") from None
    return RunningStatistics(_vector(mean, channels, "statistics.mean"), _vector(var, channels, "statistics.var"))


def _positions(mask: Any, x: Any, axis: int) -> Tuple[Any, Any]:
    """The mask as booleans that broadcast over x, with a channel axis of size 1; and what is wrong with its values.

    The latter are two numbers for the host, since a traced mask has no values: whether some are neither 0 nor 1, and
    whether some differ between channels.
    """
    if isinstance(mask, (list, tuple)):
        raise TypeError(f"sync_batch_norm: mask is a {type(mask).__name__}; an array is needed")
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise TypeError(f"sync_batch_norm: mask is {mask.dtype}; booleans are needed, or numbers that are 0 or 1")
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    whole = positions[:axis] + (mask.shape[axis] if mask.ndim == x.ndim else 1,) + positions[axis:]
    if mask.ndim < x.ndim:
        mask = mask.reshape((1,) * (x.ndim - 1 - mask.ndim) + mask.shape)
        mask = jnp.expand_dims(mask, axis)
    fits = mask.ndim == x.ndim and all(have in (1, want) for have, want in zip(mask.shape, whole))
    if not fits or mask.shape[axis] not in (1, x.shape[axis]):
        raise ValueError(
            f"sync_batch_norm: mask does not fit: it broadcasts over positions, here {positions}, with or without a "
            f"channel axis of size 1, and x has shape {x.shape}"
        )
    faults = jnp.zeros(2, bool)
    if mask.dtype != jnp.bool_:
        faults = faults.at[0].set(jnp.any((mask != 0) & (mask != 1)))
        mask = mask != 0
    if mask.shape[axis] > 1:
        first = jax.lax.slice_in_dim(mask, 0, 1, axis=axis)
        faults = faults.at[1].set(jnp.any(mask != first))
        mask = first
    return jnp.broadcast_to(mask, positions[:axis] + (1,) + positions[axis:]), faults


def _axis(axis: Any, x: Any) -> int:
    """The channel axis, counted from 0."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"sync_batch_norm: axis is a whole number, not {axis!r}")
    if x.ndim < 2:
        raise ValueError(f"expected [batch, ..., channels], got {list(x.shape)}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"sync_batch_norm: axis is {axis}, and x has {x.ndim} dimensions")
    found = int(axis) % x.ndim
    if x.shape[found] == 0:
        raise ValueError(f"sync_batch_norm: x has shape {x.shape}, with no channels in axis {axis}")
    return found


# ---- The operation ----


def _wide(x: Any) -> Any:
    """The type to compute in: float32 at least."""
    return x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _reduced(x: Any, layer: Layer) -> Tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != layer.axis)


def _spread(vector: Any, x: Any, layer: Layer) -> Any:
    """[C] to the shape in which it broadcasts over x."""
    return vector.reshape([-1 if axis == layer.axis else 1 for axis in range(x.ndim)])


def _counted(values: Any, mask: Any) -> Any:
    """The values at positions that count, zeros elsewhere, whatever stands there."""
    return values if mask is None else jnp.where(mask, values, 0)


class _Statistics(NamedTuple):
    """What a forward round brought."""

    mean: Any
    """[C], and with `rest` longer than its type."""
    rest: Any
    var: Any
    words: Any
    """Its sequence and count."""


def _merged(layer: Layer, x: Any, mask: Any, faults: Any, wanted: bool) -> _Statistics:
    """The forward round. Derivatives of the results run to x, by a round of their own."""
    wide, axes = _wide(x), _reduced(x, layer)
    values = x.astype(wide)
    positions = x.size // layer.channels
    count = None if mask is None else mask.sum(dtype=jnp.uint32)
    divisor = max(positions, 1) if count is None else jnp.maximum(count, 1).astype(wide)
    mean = _counted(values, mask).sum(axes) / divisor
    deviations = _counted(values - _spread(mean, x, layer), mask)
    moments = mean, deviations.sum(axes), jnp.square(deviations).sum(axes)
    mean, rest, var, words = _jax_rounds.merge(layer, positions, wanted, count, *moments, faults)
    if not wanted:
        return _Statistics(mean, rest, var, words)
    xmu = _counted((values - _spread(mean, x, layer)) - _spread(rest, x, layer), mask)
    moved = _jax_rounds.differential(layer, words, jnp.stack([xmu.sum(axes), jnp.square(xmu).sum(axes)]))
    # The variance is the mean square of deviations from any constant, less the square of that constant's distance.
    return _Statistics(mean, rest + moved[0], var + moved[1] - jnp.square(moved[0]), words)


def _invstd(layer: Layer, var: Any) -> Any:
    # Where epsilon clamps, nothing depends on x: jnp.maximum would halve the derivative where they are equal.
    return jax.lax.rsqrt(jnp.where(var < layer.eps, layer.eps, var) if layer.clamp else var + layer.eps)


def _forward(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any, wanted: bool) -> Tuple[Any, Any]:
    """y, and the statistics."""
    found, wide = _merged(layer, x, mask, faults, wanted), _wide(x)
    # Two subtractions: the mean is longer than the type.
    xmu = (x.astype(wide) - _spread(found.mean, x, layer)) - _spread(found.rest, x, layer)
    y = xmu * _spread(_invstd(layer, found.var) * scale.astype(wide), x, layer) + _spread(bias.astype(wide), x, layer)
    return y.astype(x.dtype), found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any) -> Tuple[Any, Any]:
    return _forward(layer, x, scale, bias, mask, faults, wanted=False)


def _normalize_forward(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any) -> Tuple[Any, Any]:
    y, found = _forward(layer, x, scale, bias, mask, faults, wanted=True)
    return (y, found), (x, scale, bias, mask, found)


def _normalize_backward(layer: Layer, residuals: Any, cotangents: Any) -> Tuple[Any, ...]:
    x, scale, bias, mask, found = residuals
    wide, axes = _wide(x), _reduced(x, layer)
    dy = cotangents[0].astype(wide)
    invstd = _invstd(layer, found.var)
    xmu = (x.astype(wide) - _spread(found.mean, x, layer)) - _spread(found.rest, x, layer)
    # y is normalized everywhere, so that the sums run over all positions; the statistics come from those that count.
    # Padding may be anything: where it neither counts nor matters to the loss, it has no part in the sum.
    seen = xmu if mask is None else jnp.where(mask | (dy != 0), xmu, 0)
    sums = jnp.stack([dy.sum(axes), (dy * seen).sum(axes)])
    mean_dy, mean_dy_xmu = _jax_rounds.mean_over_workers(layer, found.words, sums)
    slope = invstd * invstd * mean_dy_xmu
    if layer.clamp:
        slope = jnp.where(found.var < layer.eps, 0.0, slope)
    through = _spread(mean_dy, x, layer) + xmu * _spread(slope, x, layer)
    dx = _spread(scale.astype(wide) * invstd, x, layer) * (dy - _counted(through, mask))
    return dx.astype(x.dtype), (sums[1] * invstd).astype(scale.dtype), sums[0].astype(bias.dtype), None, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _evaluate(x: Any, scale: Any, bias: Any, statistics: RunningStatistics, eps: float, axis: int) -> Any:
    wide, shape = _wide(x), [-1 if a == axis else 1 for a in range(x.ndim)]
    factor = scale.astype(wide) * jax.lax.rsqrt(statistics.var.astype(wide) + eps)
    y = (x.astype(wide) - statistics.mean.astype(wide).reshape(shape)) * factor.reshape(shape)
    return (y + bias.astype(wide).reshape(shape)).astype(x.dtype)


def _update(statistics: RunningStatistics, found: _Statistics, momentum: float, biased: bool) -> RunningStatistics:
    mean, var, words = jax.lax.stop_gradient((found.mean, found.var, found.words))
    count = _jax_rounds.count_of(words, mean.dtype)
    observed = var if biased else var * (count / jnp.maximum(count - 1, 1))
    # A round without any value changes nothing.
    rate = jnp.where(count > 0, momentum, 0.0)
    return RunningStatistics(
        ((1 - rate) * statistics.mean + rate * mean).astype(statistics.mean.dtype),
        ((1 - rate) * statistics.var + rate * observed).astype(statistics.var.dtype),
    )


def sync_batch_norm(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    statistics: Optional[RunningStatistics] = None,
    *,
    layer: str,
    worker: Optional[Worker] = None,
    train: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "add",
    axis: int = -1,
    mask: Any = None,
    biased_running_variance: bool = False,
    numeric: str = "refuse",
) -> Tuple[Any, Optional[RunningStatistics]]:
    """y = scale * (x - mean) * invstd + bias, with mean and invstd per channel over the batches of all workers.

    Args:
      x: [N, ..., C], or with the channels in another `axis`; any floating type. It may be empty.
      scale, bias: [C]; absent: 1 and 0.
      statistics: the running ones. Absent: none are kept; evaluation needs them.
      layer: the same name at every worker.
      worker: default `syncbn.default_worker()`, when the function is traced.
      train: False: normalize with `statistics`, and return them unchanged; no round.
      momentum: the new value's weight, as in torch (Flax's is the old value's: 1 - momentum).
      eps_mode: "add" or "clamp" (the variance in training; evaluation adds).
      mask: True, or 1, where a position counts: statistics are taken from those positions alone, and y is normalized
        everywhere. Of x's shape without the channel axis, or with it at size 1, or a shape that broadcasts to these.
        Evaluation takes no notice of its values.
      biased_running_variance: the running variance is M2/N, as in Flax, instead of M2/(N-1), as in torch.
      numeric: "refuse": NaN and infinity in a batch fail the round, NotFinite; "propagate" lets them flow. Those of
        gradients always flow.
    Returns:
      y of x's type, and the new running statistics.

    The gradient, the sums over all workers' batches, N the number of values that count in each channel there:
    dx = scale * invstd * (dy - counts * (sum(dy)/N + (x - mean) * invstd**2 * sum(dy * (x - mean))/N)), with counts 1, or
    0 where the mask is False. Gradients of scale and bias are this worker's own.

    Under grad, every worker of the group has to differentiate, since each forward round then has a backward round.

    Raises:
      TypeError: for x, scale, bias or statistics that are not of a real floating type.
      ValueError: under pmap, shard_map and vmap; for shapes and numbers that do not fit; where the global batch has a
        single value for each channel; where all masks leave no position.
      syncbn.Error: what a round fails with, in `typed_errors`; a RuntimeError of JAX's outside, as are errors about the
        values of a mask and about the global batch.
    """
    x = _floating(x, "x")
    axis = _axis(axis, x)
    layer = _arguments.text("layer", layer)
    momentum, eps = _arguments.fraction("momentum", momentum), _arguments.not_negative("eps", eps)
    _arguments.choice("eps_mode", eps_mode, _library.EPS_MODES)
    _arguments.choice("numeric", numeric, _library.NUMERIC_POLICIES)
    biased_running_variance = _arguments.truth("biased_running_variance", biased_running_variance)
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")
    channels, wide = x.shape[axis], _wide(x)
    scale = jnp.ones(channels, wide) if scale is None else _vector(scale, channels, "scale")
    bias = jnp.zeros(channels, wide) if bias is None else _vector(bias, channels, "bias")
    kept = None if statistics is None else _running(statistics, channels)
    counted, faults = (None, jnp.zeros(2, bool)) if mask is None else _positions(mask, x, axis)
    if not train:
        if kept is None:
            raise ValueError("evaluation needs running statistics")
        return _evaluate(x, scale, bias, kept, eps, axis), statistics
    constants = Layer(
        worker or default_worker(),
        layer,
        channels,
        eps,
        eps_mode,
        momentum,
        numeric,
        biased_running_variance,
        axis,
    )
    with _not_mapped():
        y, found = _normalize(constants, x, scale, bias, counted, faults)
    return y, None if kept is None else _update(kept, found, momentum, biased_running_variance)
