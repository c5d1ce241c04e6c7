"""Statistics of a batch over all workers, in a traced program."""

import functools
from typing import Any, NamedTuple, Optional, Tuple

import jax
import jax.numpy as jnp

from syncbn import _jax_rounds
from syncbn._jax_rounds import Layer

# ---- Shapes and types ----


def wide_type(x: Any) -> Any:
    """The type to compute in: float32 at least."""
    return x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def reduced(x: Any, layer: Layer) -> Tuple[int, ...]:
    """All axes of x but that of the channels."""
    return tuple(axis for axis in range(x.ndim) if axis != layer.axis)


def spread(vector: Any, x: Any, layer: Layer) -> Any:
    """[C] to the shape in which it broadcasts over x."""
    return vector.reshape([-1 if axis == layer.axis else 1 for axis in range(x.ndim)])


def counted(values: Any, mask: Any) -> Any:
    """The values at positions that count, zeros elsewhere, whatever stands there."""
    return values if mask is None else jnp.where(mask, values, 0)


def over_batch_axes(layer: Layer, value: Any) -> Any:
    """The sum over the axes of vmap that belong to the batch."""
    return value if layer.axis_name is None else jax.lax.psum(value, layer.axis_name)


def varied(layer: Layer, x: Any) -> Any:
    """x as an array that varies over the axes of vmap that belong to the batch, as sums over these axes suppose."""
    return x if layer.axis_name is None else x + (jax.lax.axis_index(layer.axis_name) * 0).astype(x.dtype)


# ---- This worker's moments ----


class Local(NamedTuple):
    """The moments of this worker's batch. Derivatives run through `mean` and `m2`."""

    positions: int
    """Values in each channel, masked ones included."""
    counted: Optional[Any]
    """Those that the mask counts; None: all positions."""
    mean: Any
    """[C]."""
    rest: Any
    """[C], the sum of deviations from `mean`: what rounding has left of it."""
    m2: Any
    """[C], the sum of squared deviations from `mean`."""


def local_moments(layer: Layer, x: Any, mask: Any) -> Local:
    """The moments of x, with the vmapped axes that belong to the batch."""
    wide, axes = wide_type(x), reduced(x, layer)
    values = x.astype(wide)
    positions = int(over_batch_axes(layer, 1)) * (x.size // layer.channels)
    count = None if mask is None else over_batch_axes(layer, mask.sum(dtype=jnp.uint32))
    divisor = max(positions, 1) if count is None else jnp.maximum(count, 1).astype(wide)
    mean = over_batch_axes(layer, counted(values, mask).sum(axes)) / divisor
    deviations = counted(values - spread(mean, x, layer), mask)
    rest, m2 = (over_batch_axes(layer, v.sum(axes)) for v in (deviations, jnp.square(deviations)))
    return Local(positions, count, mean, rest, m2)


def _number(local: Local) -> Any:
    """The number of values that count in each channel."""
    return local.positions if local.counted is None else local.counted.astype(local.mean.dtype)


# ---- The statistics of all workers ----


class Statistics(NamedTuple):
    """The result of a forward round."""

    mean: Any
    """[C], and with `rest` longer than its type."""
    rest: Any
    var: Any
    words: Any
    """Its sequence and count."""


def merged(layer: Layer, local: Local, faults: Any, wanted: bool) -> Statistics:
    """The forward round. Where a backward round is `wanted`, the results have derivatives, by rounds of their own.

    They are there for derivatives of derivatives: who calls this gives the first derivatives by a rule of its own.
    """
    if layer.axis_name is not None:
        faults = over_batch_axes(layer, faults.astype(jnp.int32)) > 0
    mean, rest, var, words = _jax_rounds.merge(layer, wanted, *local, faults)
    if not wanted:
        return Statistics(mean, rest, var, words)
    number = _number(local)
    shift = (local.mean - mean) - rest
    xmu = local.rest + number * shift
    xmu_squared = local.m2 + shift * (2 * local.rest + number * shift)
    moved = _jax_rounds.differential(layer, words, jnp.stack([xmu, xmu_squared]))
    # The variance is the mean square of deviations from any constant, less the square of that constant's distance.
    return Statistics(mean, rest + moved[0], var + moved[1] - jnp.square(moved[0]), words)


def _rounded(found: Statistics) -> Tuple[Any, Any]:
    """Mean and variance; NaN where no worker had a value."""
    nothing = _jax_rounds.count_of(found.words, found.mean.dtype)[..., None] == 0
    return jnp.where(nothing, jnp.nan, found.mean + found.rest), jnp.where(nothing, jnp.nan, found.var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moments(layer: Layer, positions: int, count: Any, mean: Any, rest: Any, m2: Any, faults: Any) -> Tuple[Any, Any]:
    return _rounded(merged(layer, Local(positions, count, mean, rest, m2), faults, wanted=False))


def _moments_forward(
    layer: Layer, positions: int, count: Any, mean: Any, rest: Any, m2: Any, faults: Any
) -> Tuple[Any, Any]:
    found = merged(layer, Local(positions, count, mean, rest, m2), faults, wanted=True)
    return _rounded(found), ((count, mean, rest, m2), found)


def _moments_backward(layer: Layer, positions: int, residuals: Any, cotangents: Any) -> Tuple[Any, ...]:
    given, found = residuals
    local = Local(positions, *given)
    of_mean, of_var = _jax_rounds.mean_over_workers(layer, found.words, jnp.stack(cotangents))
    shift = (local.mean - found.mean) - found.rest
    # The rest of rounding does not depend on x.
    d_mean = _number(local) * (of_mean + 2 * shift * of_var)
    return None, d_mean, jnp.zeros_like(local.rest), of_var, None


_moments.defvjp(_moments_forward, _moments_backward)


def moments(layer: Layer, local: Local, faults: Any) -> Tuple[Any, Any]:
    """Mean and biased variance, [C], over all workers: differentiable with regard to `local`'s mean and m2."""
    return _moments(layer, *local, faults)
