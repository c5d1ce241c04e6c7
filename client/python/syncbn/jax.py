"""Batch normalization over all workers for JAX, under jit, grad and vmap.

    y, state = syncbn.jax.sync_batch_norm(x, scale, bias, state, worker=worker, layer="stem.bn")

Moments and gradient sums are reduced on the device. Only those vectors go to the host and over the network, by
`jax.experimental.io_callback`, ordered: so the steps of one program meet the other workers' in the program's order.
float64 gets through without jax_enable_x64, as pairs of float32.

One process is one worker, on one device. An array that lies on several devices of the process is one batch.
pmap, shard_map over more than one device and forward mode are refused: there, rounds would have no order, or no partner
at the other workers. Under jax.checkpoint, a round is not repeated: what came back from the workers is kept, whatever the
policy, as are the results of the program's own ordered io_callbacks. One forward pass may be gone back through several
times (jax.vjp, jax.jacrev), and derivatives be differentiated again, in either mode, if all workers do it, and, for
derivatives of derivatives, are of JAX.

Under vmap, each element is a call of its own, which meets the same element of the other workers: an ensemble of models,
for example. An axis that is the batch itself, as in Equinox, is named: `jax.vmap(model, axis_name="batch")` and
`axis_name="batch"` here. Then the elements of all workers are one batch.

JAX reports what goes wrong in a callback as an error of its own, maybe not before the result is waited for. In
`typed_errors` it is what it was:

    with syncbn.jax.typed_errors():
        loss, gradients = jax.block_until_ready(step(parameters, batch))
"""

import functools
import math
from typing import Any, Iterable, NamedTuple, Optional, Sequence, Tuple, Union

import jax
import jax.numpy as jnp

from syncbn import _arguments, _jax_arguments, _jax_modes, _jax_rounds, _jax_statistics, _library
from syncbn._jax_rounds import Layer, typed_errors
from syncbn._jax_statistics import Statistics, counted, over_batch_axes, reduced, spread, wide_type
from syncbn.core import Worker, default_worker

__all__ = ["RunningStatistics", "init_statistics", "moments", "sync_batch_norm", "typed_errors"]


def _mapped_axes(own: Any) -> Iterable[Any]:
    """The names of the axes that pmap or shard_map runs this trace over; `own` names those that vmap does."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", None)
    if mesh is not None:
        return tuple(mesh().manual_axes)
    # JAX before 0.5 has the axes of vmap among them.
    named = own if isinstance(own, (tuple, list)) else (own,)
    return tuple(n for n in getattr(jax.core, "unsafe_get_axis_names_DO_NOT_USE", tuple)() if n not in named)


def _refuse_several_devices(own: Any) -> None:
    if any(jax.lax.psum(1, name) != 1 for name in _mapped_axes(own)):
        raise ValueError(_jax_rounds.MAPPED)


class RunningStatistics(NamedTuple):
    """The running statistics as Flax keeps them: a state that goes in and comes out."""

    mean: Any
    """[C]."""
    var: Any
    """[C]."""


def init_statistics(channels: int, dtype: Any = jnp.float32) -> RunningStatistics:
    """Mean 0 and variance 1."""
    return RunningStatistics(jnp.zeros(channels, dtype), jnp.ones(channels, dtype))


def _running(statistics: Any, channels: int) -> RunningStatistics:
    try:
        mean, var = statistics
    except (TypeError, ValueError):
        kind = type(statistics).__name__
        raise TypeError(f"statistics is a {kind}; it has to be RunningStatistics, a mean and a variance") from None
    return RunningStatistics(_jax_arguments.vector(mean, channels, "statistics.mean"), _jax_arguments.vector(var, channels, "statistics.var"))


def _check_worker(worker: Any) -> None:
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")


def _names(axis_name: Any) -> Any:
    """Hashable, as constants of a trace are."""
    return tuple(axis_name) if isinstance(axis_name, list) else axis_name


# ---- The operation ----


def _invstd(layer: Layer, var: Any) -> Any:
    # Nothing depends on x where epsilon clamps: jnp.maximum would halve the derivative where they are equal.
    return jax.lax.rsqrt(jnp.where(var < layer.eps, layer.eps, var) if layer.clamp else var + layer.eps)


def _deviations(layer: Layer, x: Any, found: Statistics) -> Any:
    # Two subtractions: the mean is longer than the type.
    return (x.astype(wide_type(x)) - spread(found.mean, x, layer)) - spread(found.rest, x, layer)


def _forward(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any, wanted: bool) -> Tuple[Any, Any]:
    """y, of the wide type, and the statistics."""
    local, wide = _jax_statistics.local_moments(layer, x, mask), wide_type(x)
    found = _jax_statistics.merged(layer, local, faults, wanted)
    factor = _invstd(layer, found.var) * scale.astype(wide)
    return _deviations(layer, x, found) * spread(factor, x, layer) + spread(bias.astype(wide), x, layer), found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any) -> Tuple[Any, Any]:
    return _forward(layer, x, scale, bias, mask, faults, wanted=False)


def _normalize_forward(layer: Layer, x: Any, scale: Any, bias: Any, mask: Any, faults: Any) -> Tuple[Any, Any]:
    y, found = _forward(layer, x, scale, bias, mask, faults, wanted=True)
    return (y, found), (x, scale, bias, mask, found)


def _normalize_backward(layer: Layer, residuals: Any, cotangents: Any) -> Tuple[Any, ...]:
    x, scale, bias, mask, found = residuals
    wide, axes, dy = wide_type(x), reduced(x, layer), cotangents[0]
    invstd, xmu = _invstd(layer, found.var), _deviations(layer, x, found)
    # y is normalized everywhere, so that the sums run over all positions; the statistics come from those that count.
    # Padding may be anything: where it neither counts nor matters to the loss, it has no part in the sum.
    seen = xmu if mask is None else jnp.where(mask | (dy != 0), xmu, 0)
    sums = jnp.stack([dy.sum(axes), (dy * seen).sum(axes)])
    mean_dy, mean_dy_xmu = _jax_rounds.mean_over_workers(layer, found.words, over_batch_axes(layer, sums))
    slope = invstd * invstd * mean_dy_xmu
    if layer.clamp:
        slope = jnp.where(found.var < layer.eps, 0.0, slope)
    through = spread(mean_dy, x, layer) + xmu * spread(slope, x, layer)
    dx = spread(scale.astype(wide) * invstd, x, layer) * (dy - counted(through, mask))
    return dx.astype(x.dtype), (sums[1] * invstd).astype(scale.dtype), sums[0].astype(bias.dtype), None, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _evaluate(x: Any, scale: Any, bias: Any, statistics: RunningStatistics, eps: float, axis: int) -> Any:
    """y, of the wide type."""
    wide, shape = wide_type(x), [-1 if a == axis else 1 for a in range(x.ndim)]
    factor = scale.astype(wide) * jax.lax.rsqrt(statistics.var.astype(wide) + eps)
    y = (x.astype(wide) - statistics.mean.astype(wide).reshape(shape)) * factor.reshape(shape)
    return y + bias.astype(wide).reshape(shape)


def _activated(y: Any, z: Any, relu: bool, dtype: Any) -> Any:
    """The addend and the activation, in the wide type, rounded once."""
    if z is not None:
        y = y + z.astype(y.dtype)
    return (jax.nn.relu(y) if relu else y).astype(dtype)


def _update(statistics: RunningStatistics, found: Statistics, momentum: float, biased: bool) -> RunningStatistics:
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
    z: Any = None,
    activation: Optional[str] = None,
    axis_name: Any = None,
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
      z: of x's shape and type; added to the normalized values, before the activation. A residual connection.
      activation: "relu": returns max(0, y), or max(0, y + z). Its gradient at 0 is 0.
      axis_name: the axis, or a tuple of axes, of vmap whose elements belong to one batch. x may then be [C].
    Returns:
      y of x's type, and the new running statistics.

    The gradient, the sums over all workers' batches, N the number of values that count in each channel there:
    dx = scale * invstd * (dy - counts * (sum(dy)/N + (x - mean) * invstd**2 * sum(dy * (x - mean))/N)), with counts 1, or
    0 where the mask is False. Gradients of scale and bias are this worker's own.

    Under grad, every worker of the group has to differentiate, since each forward round then has a backward round.

    Raises:
      TypeError: for x, scale, bias or statistics that are not of a real floating type; in forward mode.
      ValueError: under pmap and shard_map; for shapes and numbers that do not fit; where the global batch has a
        single value for each channel; where all masks leave no position.
      NameError: for an `axis_name` that no vmap binds.
      syncbn.Error: what a round fails with, in `typed_errors`; a RuntimeError of JAX's outside, as are errors about the
        values of a mask and about the global batch.
    """
    x = _jax_arguments.floating(x, "x")
    axis = _jax_arguments.axis_of(axis, x, axis_name)
    layer = _arguments.text("layer", layer)
    momentum, eps = _arguments.fraction("momentum", momentum), _arguments.not_negative("eps", eps)
    _arguments.choice("eps_mode", eps_mode, _library.EPS_MODES)
    _arguments.choice("numeric", numeric, _library.NUMERIC_POLICIES)
    biased_running_variance = _arguments.truth("biased_running_variance", biased_running_variance)
    relu = _jax_arguments.activation_of(activation)
    _check_worker(worker)
    channels, wide = x.shape[axis], wide_type(x)
    scale = jnp.ones(channels, wide) if scale is None else _jax_arguments.vector(scale, channels, "scale")
    bias = jnp.zeros(channels, wide) if bias is None else _jax_arguments.vector(bias, channels, "bias")
    addend = None if z is None else _jax_arguments.addend(z, x)
    kept = None if statistics is None else _running(statistics, channels)
    positions, faults = (None, jnp.zeros(2, bool)) if mask is None else _jax_arguments.positions(mask, x, axis)
    if not train:
        if kept is None:
            raise ValueError("evaluation needs running statistics")
        return _activated(_evaluate(x, scale, bias, kept, eps, axis), addend, relu, x.dtype), statistics
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
        _names(axis_name),
        normalizes=True,
    )
    _refuse_several_devices(axis_name)
    x, scale, bias = _jax_modes.reverse_only(_jax_statistics.varied(constants, x), scale, bias)
    y, found = _normalize(constants, x, scale, bias, positions, faults)
    new = None if kept is None else _update(kept, found, momentum, biased_running_variance)
    return _activated(y, addend, relu, x.dtype), new


def moments(
    x: Any,
    axes: Union[int, Sequence[int]],
    *,
    layer: str,
    worker: Optional[Worker] = None,
    keepdims: bool = False,
    mask: Any = None,
    axis_name: Any = None,
) -> Tuple[Any, Any]:
    """Mean and biased variance of an array over all workers, for normalizations of your own.

        mean, var = syncbn.jax.moments(x, (0, 1, 2), layer="stem", keepdims=True)
        y = (x - mean) * jax.lax.rsqrt(var + 1e-5)

    Every worker of the group calls it for the same layers, each as often as the others, and goes back through it as often.
    The gradient is that of the sum of the losses of all workers. A batch may be empty. PyTorch workers with
    `syncbn.torch.moments` may belong to the group.

    Args:
      axes: those that the moments are taken over; the others have the same sizes at every worker.
      layer: a name that no other layer has, the same at every worker.
      worker: default `syncbn.default_worker()`, when the function is traced.
      keepdims: the results have size 1 in `axes`, instead of lacking them.
      mask: True, or 1, where a position counts. It broadcasts to x's shape, and differs along `axes` alone.
      axis_name: the axis, or a tuple of axes, of vmap whose elements belong to one batch. `axes` may then be ().
    Returns:
      (mean, var), the same at every worker, of x's type, and float32 for narrower types; differentiable in reverse mode
      any number of times. NaN where no worker has a value.

    Raises:
      TypeError: for x that is not of a real floating type, and arguments of other types; in forward mode.
      ValueError: under pmap and shard_map; for axes that x has not; for a mask that does not fit.
      NameError: for an `axis_name` that no vmap binds.
      syncbn.Error: what a round fails with, in `typed_errors`; a RuntimeError of JAX's outside.
    """
    x = _jax_arguments.floating(x, "x")
    layer = _arguments.text("layer", layer)
    _check_worker(worker)
    over = _jax_arguments.reduced_axes(axes, x, axis_name)
    kept = tuple(axis for axis in range(x.ndim) if axis not in over)
    shape = tuple(x.shape[axis] for axis in kept)
    channels, positions = math.prod(shape), math.prod(x.shape[axis] for axis in over)
    if channels == 0:
        raise ValueError(f"x has shape {x.shape}, with no elements in its other axes than {over}")
    values = x.transpose(*over, *kept).reshape(positions, channels)
    counts, faults = None, jnp.zeros(2, bool)
    if mask is not None:
        counts, faults = _jax_arguments.positions(_jax_arguments.flattened(mask, x, over, kept), values, 1)
    constants = Layer(
        worker or default_worker(), layer, channels, 0.0, "add", 0.1, "refuse", False, 1, _names(axis_name), normalizes=False
    )
    _refuse_several_devices(axis_name)
    (values,) = _jax_modes.reverse_only(_jax_statistics.varied(constants, values))
    local = _jax_statistics.local_moments(constants, values, counts)
    found = _jax_statistics.moments(constants, local, faults)
    if keepdims:
        shape = tuple(1 if axis in over else size for axis, size in enumerate(x.shape))
    return found[0].reshape(shape), found[1].reshape(shape)
