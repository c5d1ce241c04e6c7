"""Batch normalization over all workers for JAX, under jit and grad.

    y, state = syncbn.jax.sync_batch_norm(x, scale, bias, state, worker=worker, layer="stem.bn")

Moments and gradient sums are reduced on the device. Only those vectors go to the host and over the network, by
`jax.experimental.io_callback`, ordered: so the steps of one program meet the other workers' in the program's order.
float64 gets through without jax_enable_x64, as pairs of float32.

One process is one worker, on one device. An array that jit spreads over several devices of the process is one batch.
vmap, pmap, shard_map over more than one device, jax.checkpoint and a second differentiation are refused, by JAX or here:
there, rounds would have no order, or no partner at the other workers.

JAX reports what goes wrong in a callback as an error of its own, maybe not before the result is waited for. In
`typed_errors` it is what it was:

    with syncbn.jax.typed_errors():
        loss, gradients = jax.block_until_ready(step(parameters, batch))
"""

import collections
import contextlib
import functools
from typing import Any, Callable, Deque, Iterable, Iterator, NamedTuple, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from syncbn.core import Worker, default_worker

# What callbacks raised, oldest first, until `typed_errors` takes it.
_failures: Deque[BaseException] = collections.deque(maxlen=64)


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """In this block, a round that fails raises its own error: a syncbn.Error with code, reason, layer and ranks.

    Without, it is a JaxRuntimeError (XlaRuntimeError before JAX 0.5) whose text has the error's. A KeyboardInterrupt
    that ended a round comes through likewise. JAX dispatches asynchronously: wait for results within the block.
    """
    try:
        yield
    except RuntimeError as error:
        # The first is the root: what fails after it may only follow from it.
        found = next((f for f in list(_failures) if type(f).__name__ in str(error)), None)
        if found is None or type(error) is type(found):
            raise
        _failures.clear()
        raise found from error


def _on_host(function: Callable[..., Any], *arguments: Any) -> Any:
    """A callback's body, whose error `typed_errors` can find."""
    try:
        return function(*arguments)
    except BaseException as error:
        _failures.append(error)
        raise


_MAPPED = (
    "sync_batch_norm cannot run under vmap, pmap or shard_map: each element would begin a round of its own. Run a process "
    "for each device, or let jit spread the batch over them"
)


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
        raise ValueError(_MAPPED)
    try:
        yield
    except ValueError as error:
        if "vmap" in str(error):  # JAX's own refusal, where the axis has no name.
            raise ValueError(_MAPPED) from error
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


class _Layer(NamedTuple):
    """What is constant in a trace."""

    worker: Worker
    name: str
    eps: float
    clamp: bool
    axis: int


def _split(values: np.ndarray, pair: Any) -> Tuple[np.ndarray, np.ndarray]:
    """float64 as a sum of two values of a narrower type."""
    high = np.asarray(values, dtype=pair)
    return high, np.asarray(values - high, dtype=pair)


def _exchange_moments(layer: _Layer, mean: Any, rest: Any, m2: Any, count: int, wanted: bool) -> Tuple[np.ndarray, ...]:
    """On the host: the forward round. `rest` is what rounding left of the sum of deviations from `mean`."""
    mean, rest, m2 = np.asarray(mean), np.asarray(rest, np.float64), np.asarray(m2, np.float64)
    pair = mean.dtype
    if count == 0:
        merged = layer.worker.synchronize(layer.name, 0, backward=wanted)
    else:
        shift = rest / count
        moments = mean.astype(np.float64) + shift, np.maximum(m2 - rest * shift, 0.0)
        merged = layer.worker.synchronize(layer.name, count, *moments, backward=wanted)
    if merged.count == 1:
        raise ValueError("Expected more than 1 value per channel when training, and the other workers had none")
    # The sequence and the count as two numbers of 31 bits each: without x64 there is nothing wider.
    words = [merged.sequence >> 31, merged.sequence & 0x7FFFFFFF, merged.count >> 31, merged.count & 0x7FFFFFFF]
    return (*_split(merged.mean, pair), *_split(merged.var, pair), np.asarray(words, np.int32))


def _exchange_sums(layer: _Layer, words: Any, sum_dy: Any, sum_dy_xmu: Any) -> Tuple[np.ndarray, np.ndarray]:
    """On the host: the backward round; returns the sums divided by the count."""
    high, low, count_high, count_low = (int(word) for word in np.asarray(words))
    sums = layer.worker.synchronize_backward(layer.name, (high << 31) | low, np.asarray(sum_dy), np.asarray(sum_dy_xmu))
    count = max(1, (count_high << 31) | count_low)
    pair = np.asarray(sum_dy).dtype
    return (sums.sum_dy / count).astype(pair), (sums.sum_dy_xmu / count).astype(pair)


def _wide(x: Any) -> Any:
    """The type to compute in: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _reduced(x: Any, layer: _Layer) -> Tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != layer.axis)


def _spread(vector: Any, x: Any, layer: _Layer) -> Any:
    """[C] to the shape in which it broadcasts over x."""
    return vector.reshape([-1 if axis == layer.axis else 1 for axis in range(x.ndim)])


def _forward(layer: _Layer, x: Any, scale: Any, bias: Any, wanted: bool) -> Tuple[Any, ...]:
    """y, the residuals for backward, and (mean, var, words)."""
    wide, axes, channels = _wide(x), _reduced(x, layer), x.shape[layer.axis]
    count = x.size // channels
    values = x.astype(wide)
    mean = values.mean(axes) if count else jnp.zeros(channels, wide)
    deviations = values - _spread(mean, x, layer)
    vector = jax.ShapeDtypeStruct((channels,), wide)
    shapes = (vector, vector, vector, vector, jax.ShapeDtypeStruct((4,), jnp.int32))
    mean_high, mean_low, var, var_low, words = io_callback(
        functools.partial(_on_host, functools.partial(_exchange_moments, layer, count=count, wanted=wanted)),
        shapes,
        mean,
        deviations.sum(axes),
        jnp.square(deviations).sum(axes),
        ordered=True,
    )
    invstd = jax.lax.rsqrt(jnp.maximum(var, layer.eps) if layer.clamp else var + layer.eps)
    # Two subtractions: the mean is longer than the type.
    xmu = (values - _spread(mean_high, x, layer)) - _spread(mean_low, x, layer)
    y = xmu * _spread(invstd * scale, x, layer) + _spread(bias.astype(wide), x, layer)
    residuals = (x, scale, bias, mean_high, mean_low, var, invstd, words)
    return y.astype(x.dtype), residuals, (mean_high, var, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(layer: _Layer, x: Any, scale: Any, bias: Any) -> Tuple[Any, Any]:
    y, _, statistics = _forward(layer, x, scale, bias, wanted=False)
    return y, statistics


def _normalize_forward(layer: _Layer, x: Any, scale: Any, bias: Any) -> Tuple[Any, Any]:
    y, residuals, statistics = _forward(layer, x, scale, bias, wanted=True)
    return (y, statistics), residuals


def _normalize_backward(layer: _Layer, residuals: Any, cotangents: Any) -> Tuple[Any, Any, Any]:
    x, scale, bias, mean_high, mean_low, var, invstd, words = residuals
    wide, axes = _wide(x), _reduced(x, layer)
    dy = cotangents[0].astype(wide)
    xmu = (x.astype(wide) - _spread(mean_high, x, layer)) - _spread(mean_low, x, layer)
    sum_dy, sum_dy_xmu = dy.sum(axes), (dy * xmu).sum(axes)
    vector = jax.ShapeDtypeStruct(sum_dy.shape, wide)
    mean_dy, mean_dy_xmu = io_callback(
        functools.partial(_on_host, functools.partial(_exchange_sums, layer)),
        (vector, vector),
        words,
        sum_dy,
        sum_dy_xmu,
        ordered=True,
    )
    slope = invstd * invstd * mean_dy_xmu
    if layer.clamp:
        slope = jnp.where(var < layer.eps, 0.0, slope)
    centred = dy - _spread(mean_dy, x, layer) - xmu * _spread(slope, x, layer)
    dx = _spread(scale.astype(wide) * invstd, x, layer) * centred
    return dx.astype(x.dtype), (sum_dy_xmu * invstd).astype(scale.dtype), sum_dy.astype(bias.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)


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
    Returns:
      y of x's type, and the new running statistics (the variance unbiased).

    The gradient, the sums over all workers' batches, N the number of values in each channel there:
    dx = scale * invstd * (dy - sum(dy)/N - (x - mean) * invstd**2 * sum(dy * (x - mean))/N). Gradients of scale and bias
    are this worker's own.

    Under grad, every worker of the group has to differentiate, since each forward round then has a backward round.

    Raises:
      ValueError: under pmap, shard_map and vmap; for shapes that do not fit; where the global batch has a single value
        for each channel.
      syncbn.Error: what a round fails with, in `typed_errors`; a RuntimeError of JAX's outside.
    """
    if x.ndim < 2:
        raise ValueError(f"expected [batch, ..., channels], got {list(x.shape)}")
    axis = axis % x.ndim
    channels, wide = x.shape[axis], _wide(x)
    scale = jnp.ones(channels, wide) if scale is None else scale
    bias = jnp.zeros(channels, wide) if bias is None else bias
    if not train:
        if statistics is None:
            raise ValueError("evaluation needs running statistics")
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        invstd = jax.lax.rsqrt(statistics.var.astype(wide) + eps)
        y = (x.astype(wide) - statistics.mean.reshape(shape)) * (scale * invstd).reshape(shape) + bias.reshape(shape)
        return y.astype(x.dtype), statistics
    worker = worker or default_worker()
    worker.declare_layer(layer, channels, eps=eps, eps_mode=eps_mode, momentum=momentum)
    with _not_mapped():
        y, (mean, var, words) = _normalize(_Layer(worker, layer, eps, eps_mode == "clamp", axis), x, scale, bias)
    if statistics is None:
        return y, None
    mean, var, words = jax.lax.stop_gradient((mean, var, words))
    count = words[2].astype(wide) * 2.0**31 + words[3].astype(wide)
    unbiased = var * (count / jnp.maximum(count - 1, 1))
    # A round without any value changes nothing.
    rate = jnp.where(count > 0, momentum, 0.0)
    return y, RunningStatistics(
        ((1 - rate) * statistics.mean + rate * mean).astype(statistics.mean.dtype),
        ((1 - rate) * statistics.var + rate * unbiased).astype(statistics.var.dtype),
    )
