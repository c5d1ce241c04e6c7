"""Moments over all workers for TensorFlow, eagerly and in tf.function.

    mean, var = syncbn.tensorflow.moments(x, (0, 1, 2), layer="stem")

`syncbn.keras.BatchNormalization` is a layer on top of it. A batch is reduced in TensorFlow, on whatever device; only vectors
go to the host, by `tf.numpy_function`, which graphs that are compiled by XLA do not have.
"""

import math
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow as tf

from syncbn import _arguments
from syncbn.core import Worker, default_worker


class _Caller:
    """The rounds of a name's calls, on the host."""

    def __init__(self, worker: Worker, layer: str, channels: int) -> None:
        self._worker, self._layer, self._channels = worker, layer, channels

    def merge(self, count: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> Tuple[np.ndarray, ...]:
        """The forward round. Returns: mean, variance, and for `exchange` the count, the sequence and 1 or 0."""
        self._worker.declare_layer(self._layer, self._channels, eps=0.0)
        vectors = (mean, m2) if count else (None, None)
        # TensorFlow does not tell here if a gradient follows; if no worker knows, none waits for a backward round.
        merged = self._worker.synchronize(self._layer, int(count), *vectors, backward=None)
        known = [merged.count, merged.sequence, merged.backward_required]
        return (*(_or_nan(v, merged.count) for v in (merged.mean, merged.var)), np.asarray(known, np.int64))

    def exchange(self, known: np.ndarray, of_mean: np.ndarray, of_var: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The sums of both vectors over all workers: the backward round where one is awaited, else a sum."""
        _, sequence, awaited = (int(number) for number in known)
        if awaited:
            sums = self._worker.start_synchronize_backward(self._layer, sequence, of_mean, of_var).result()
            return sums.sum_dy, sums.sum_dy_xmu
        both = self._worker.all_reduce(f"{self._layer}/gradients", np.concatenate([of_mean, of_var]))
        return both[: self._channels], both[self._channels :]


def _or_nan(vector: np.ndarray, count: int) -> np.ndarray:
    return vector if count else np.full_like(vector, np.nan)


def _merged(caller: _Caller, channels: int, count: Any, mean: Any, m2: Any) -> Tuple[Any, Any]:
    """Mean and variance over all workers, float64 [C], from this worker's; differentiable with regard to mean and m2."""

    @tf.custom_gradient
    def merge(mean: Any, m2: Any) -> Any:
        found, var, known = tf.numpy_function(caller.merge, [count, mean, m2], [tf.float64, tf.float64, tf.int64])
        found, var = tf.ensure_shape(found, [channels]), tf.ensure_shape(var, [channels])

        def gradient(of_mean: Any, of_var: Any) -> Any:
            sums = tf.numpy_function(caller.exchange, [known, of_mean, of_var], [tf.float64, tf.float64])
            first, second = (tf.ensure_shape(v, [channels]) / tf.cast(tf.maximum(known[0], 1), tf.float64) for v in sums)
            return tf.cast(count, tf.float64) * (first + 2.0 * (mean - found) * second), second

        return (found, var), gradient

    result: Tuple[Any, Any] = merge(mean, m2)
    return result


@tf.autograph.experimental.do_not_convert
def moments(
    x: Any,
    axes: Union[int, Sequence[int]],
    *,
    layer: str,
    worker: Optional[Worker] = None,
    keepdims: bool = False,
    mask: Any = None,
) -> Tuple[Any, Any]:
    """Mean and biased variance of a tensor over all workers, for normalizations of your own.

    Every worker of the group calls it for the same layers, each as often as the others, and goes back through it as often.
    The gradient is that of the sum of the losses of all workers; it has no derivatives in its turn. A batch may be empty.

    Args:
      x: a floating tensor whose sizes are known but for those of `axes`.
      axes: those that the moments are taken over; the others have the same sizes at every worker.
      layer: a name that no other layer has, the same at every worker.
      worker: default `syncbn.default_worker()`, when the function is called or traced.
      keepdims: the results have size 1 in `axes`, instead of lacking them.
      mask: True where a position counts. It broadcasts to x's shape, with size 1 but along `axes`.
    Returns:
      (mean, var), the same at every worker, of x's type, and float32 for narrower types. NaN where no worker has a value.

    Raises:
      TypeError: for a tensor of another type.
      ValueError: for axes that x has not, unknown sizes of the others, a mask that does not fit.
      tf.errors.OpError, with the message of a syncbn.Error: what a round fails with.
    """
    layer = _arguments.text("layer", layer)
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise TypeError(f"x is {x.dtype.name}; a floating type is needed")
    over, kept = _split_axes(axes, x)
    sizes = [x.shape[axis] for axis in kept]
    if None in sizes or 0 in sizes:
        raise ValueError(f"x has shape {x.shape}; the sizes of its axes {kept} have to be known, and not 0")
    channels, wide = math.prod(sizes), x.dtype if x.dtype == tf.float64 else tf.float32
    values = tf.reshape(tf.cast(tf.transpose(x, over + kept), tf.float64), [-1, channels])
    counts = tf.ones_like(values[:, :1]) if mask is None else _counts(mask, x, over, kept)
    count = tf.reduce_sum(counts)
    mean = tf.reduce_sum(tf.where(counts > 0, values, 0.0), 0) / tf.maximum(count, 1.0)
    m2 = tf.reduce_sum(tf.where(counts > 0, tf.square(values - mean), 0.0), 0)
    found = _merged(_Caller(worker or default_worker(), layer, channels), channels, tf.cast(count, tf.int64), mean, m2)
    shape = [1 if axis in over else x.shape[axis] for axis in range(len(x.shape))] if keepdims else sizes
    return tf.reshape(tf.cast(found[0], wide), shape), tf.reshape(tf.cast(found[1], wide), shape)


def _split_axes(axes: Any, x: Any) -> Tuple[List[int], List[int]]:
    """`axes` as numbers from 0 on, and the other ones."""
    given = [axes] if isinstance(axes, int) else list(axes)
    dimensions = len(x.shape)
    for axis in given:
        if not -dimensions <= axis < dimensions:
            raise ValueError(f"axes has {axis}; x of shape {x.shape} has the axes 0 .. {dimensions - 1}")
    over = sorted({axis % dimensions for axis in given})
    if not over or len(over) != len(given):
        raise ValueError(f"axes is {axes!r}; it names at least one axis, and each once")
    return over, [axis for axis in range(dimensions) if axis not in over]


def _counts(mask: Any, x: Any, over: List[int], kept: List[int]) -> Any:
    """The mask as float64 [positions, 1]."""
    mask = tf.cast(tf.convert_to_tensor(mask), tf.bool)
    if len(mask.shape) != len(x.shape) or any(mask.shape[axis] != 1 for axis in kept):
        raise ValueError(f"mask has shape {mask.shape}, and x {x.shape}: it has as many axes, of size 1 but along {over}")
    sizes, given = tf.shape(x), tf.shape(mask)
    whole = tf.broadcast_to(mask, [sizes[axis] if axis in over else given[axis] for axis in range(len(x.shape))])
    return tf.reshape(tf.cast(tf.transpose(whole, over + kept), tf.float64), [-1, 1])
