"""The rounds of the JAX front: host callbacks, and the operations of a traced program that call them.

A forward round is a callback. The sums of a backward pass are an operation of their own, since JAX's callbacks can be
neither batched nor differentiated, and both have a meaning here: under vmap, as jax.jacrev has it, each row of cotangents
is a backward pass, one after the other; the derivative of a sum over workers is the sum over workers of the derivatives.
"""

import collections
import contextlib
import functools
import threading
import weakref
from typing import Any, Callable, Deque, Dict, Iterator, NamedTuple, Set, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.interpreters import ad, batching, mlir

from syncbn.core import Worker

try:
    from jax.extend.core import Primitive
except ImportError:  # Before JAX 0.4.36.
    from jax.core import Primitive

# Errors that callbacks raised, oldest first, until `typed_errors` takes it.
_failures: Deque[BaseException] = collections.deque(maxlen=64)

MAPPED = (
    "sync_batch_norm cannot run under vmap, pmap or shard_map: each element would begin a round of its own. Run a process "
    "for each device, or let jit spread the batch over them"
)


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
        if found is None and "KeyboardInterrupt" in str(error):  # It came before the callback's first line.
            found = KeyboardInterrupt()
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


class Layer(NamedTuple):
    """What is constant in a trace."""

    worker: Worker
    name: str
    channels: int
    eps: float
    eps_mode: str
    momentum: float
    numeric: str
    biased_running_variance: bool
    axis: int

    @property
    def clamp(self) -> bool:
        return self.eps_mode == "clamp"

    def declare(self) -> None:
        """Makes the layer known to the master."""
        self.worker.declare_layer(
            self.name,
            self.channels,
            eps=self.eps,
            eps_mode=self.eps_mode,
            momentum=self.momentum,
            numeric=self.numeric,
            biased_running_variance=self.biased_running_variance,
        )


# ---- On the host ----


class _Named:
    """What a worker knows of a layer's name."""

    def __init__(self) -> None:
        self.channels = 0
        self.awaited: Set[int] = set()
        """Sequences of forward rounds whose backward rounds are still to come."""


class _Awaited:
    """The forward rounds of every worker whose backward rounds are still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: "weakref.WeakKeyDictionary[Worker, Dict[str, _Named]]" = weakref.WeakKeyDictionary()

    def _named(self, layer: Layer) -> _Named:
        return self._workers.setdefault(layer.worker, {}).setdefault(layer.name, _Named())

    def declare(self, layer: Layer) -> None:
        """Makes the layer known as it is in this program, which another program of the worker may have changed."""
        layer.declare()
        with self._lock:
            self._named(layer).channels = layer.channels

    def check(self, layer: Layer) -> None:
        """Refuses to go back through a layer whose name has been given to another one since its forward pass."""
        with self._lock:
            channels = self._named(layer).channels
        if channels not in (0, layer.channels):
            raise ValueError(
                f"layer {layer.name!r} has {layer.channels} channels, and its name was used again for {channels} channels "
                "before its backward pass: use another name for one of the two"
            )

    def add(self, layer: Layer, sequence: int) -> None:
        with self._lock:
            self._named(layer).awaited.add(sequence)

    def take(self, layer: Layer, sequence: int) -> bool:
        """Whether it was there; it is not any more."""
        with self._lock:
            awaited = self._named(layer).awaited
            found = sequence in awaited
            awaited.discard(sequence)
            return found


_awaited = _Awaited()


def _split(values: np.ndarray, pair: Any) -> Tuple[np.ndarray, np.ndarray]:
    """float64 as a sum of two values of a narrower type."""
    high = np.asarray(values, dtype=pair)
    wide = high.astype(np.float64)
    return high, np.where(np.isfinite(wide), values - np.where(np.isfinite(wide), wide, 0.0), 0.0).astype(pair)


def _check_mask(layer: Layer, faults: np.ndarray) -> None:
    if faults[0]:
        raise ValueError(f"mask of layer {layer.name!r} has values other than 0 and 1 (True and False)")
    if faults[1]:
        raise ValueError(
            f"mask of layer {layer.name!r} differs by channel: a mask counts positions, and a round has one count for all "
            "channels"
        )


def _merge(
    layer: Layer, positions: int, wanted: bool, count: Any, mean: Any, rest: Any, m2: Any, faults: Any
) -> Tuple[np.ndarray, ...]:
    """The forward round. `rest` is what rounding left of the sum of deviations from `mean`; count None: all positions."""
    _check_mask(layer, np.asarray(faults))
    mean, rest, m2 = np.asarray(mean), np.asarray(rest, np.float64), np.asarray(m2, np.float64)
    count = positions if count is None else int(count)
    pair = mean.dtype
    _awaited.declare(layer)
    if count == 0:
        merged = layer.worker.synchronize(layer.name, 0, backward=wanted)
    else:
        shift = rest / count
        moments = mean.astype(np.float64) + shift, np.maximum(m2 - rest * shift, 0.0)
        merged = layer.worker.synchronize(layer.name, count, *moments, backward=wanted)
    if merged.count == 1:
        raise ValueError("Expected more than 1 value per channel when training, and the other workers had none")
    if merged.count == 0 and positions:
        raise ValueError("the masks of all workers leave no position: there is nothing to take statistics of")
    if wanted:
        _awaited.add(layer, merged.sequence)
    # The sequence and the count as two numbers of 31 bits each: without x64 there is nothing wider.
    words = [merged.sequence >> 31, merged.sequence & 0x7FFFFFFF, merged.count >> 31, merged.count & 0x7FFFFFFF]
    return (*_split(merged.mean, pair), *_split(merged.var, pair)[:1], np.asarray(words, np.int32))


def _start_sums(layer: Layer, sequence: int, row: np.ndarray) -> Any:
    """The backward round of a forward round; for what goes back once more, a sum of the same vectors."""
    if not _awaited.take(layer, sequence):
        return layer.worker.start_all_reduce(f"{layer.name}/retained", row)
    try:
        return layer.worker.start_synchronize_backward(layer.name, sequence, *row)
    except BaseException:
        _awaited.add(layer, sequence)
        raise


def _exchange(layer: Layer, linear: bool, words: Any, values: Any) -> np.ndarray:
    """The means over the forward round's values of vectors [..., 2, C], summed over workers, row by row.

    `linear`: the derivative of such means, which no forward round waits for.
    """
    _awaited.check(layer)
    narrow = np.asarray(values)
    high, low, count_high, count_low = (int(word) for word in np.asarray(words))
    count = max(1, (count_high << 31) | count_low)
    rows = narrow.astype(np.float64).reshape(-1, 2, layer.channels)
    if linear:
        rounds = [layer.worker.start_all_reduce(f"{layer.name}/derivatives", row) for row in rows]
    else:
        rounds = [_start_sums(layer, (high << 31) | low, row) for row in rows]
    results = [_vectors(begun.result()) for begun in rounds]
    with np.errstate(over="ignore"):  # To infinity, as in the framework's own sums.
        return (np.reshape(results, narrow.shape) / count).astype(narrow.dtype)


def _vectors(result: Any) -> np.ndarray:
    """The two vectors of a round as one."""
    return result if isinstance(result, np.ndarray) else np.concatenate([result.sum_dy, result.sum_dy_xmu])


# ---- In the program ----


def merge(
    layer: Layer, positions: int, wanted: bool, count: Any, mean: Any, rest: Any, m2: Any, faults: Any
) -> Tuple[Any, ...]:
    """The merged mean, as the sum of two vectors, the variance, and `words` for `mean_over_workers`. Constants to JAX."""
    vector = jax.ShapeDtypeStruct((layer.channels,), mean.dtype)
    shapes = (vector, vector, vector, jax.ShapeDtypeStruct((4,), jnp.int32))
    body = functools.partial(_on_host, functools.partial(_merge, layer, positions, wanted))
    arguments = jax.lax.stop_gradient((count, mean, rest, m2, faults))
    return tuple(io_callback(body, shapes, *arguments, ordered=True))


def count_of(words: Any, dtype: Any) -> Any:
    """The forward round's count, rounded to `dtype`."""
    return words[2].astype(dtype) * 2.0**31 + words[3].astype(dtype)


def _call(words: Any, values: Any, *, layer: Layer, linear: bool) -> Any:
    body = functools.partial(_on_host, functools.partial(_exchange, layer, linear))
    return io_callback(body, jax.ShapeDtypeStruct(values.shape, values.dtype), words, values, ordered=True)


_mean_p = Primitive("syncbn_mean_over_workers")
_ORDERED = jax.make_jaxpr(
    lambda: io_callback(lambda: np.zeros(()), jax.ShapeDtypeStruct((), np.float32), ordered=True)
)().effects


@_mean_p.def_impl
def _evaluate(words: Any, values: Any, *, layer: Layer, linear: bool) -> Any:
    return _call(words, values, layer=layer, linear=linear)


@_mean_p.def_effectful_abstract_eval
def _abstract(words: Any, values: Any, *, layer: Layer, linear: bool) -> Any:
    return values.update(weak_type=False), _ORDERED


def _batch(arguments: Any, axes: Any, *, layer: Layer, linear: bool) -> Any:
    words, values = arguments
    if axes[0] is not None:
        raise ValueError(MAPPED)
    return _mean_p.bind(words, jnp.moveaxis(values, axes[1], 0), layer=layer, linear=linear), 0


def _derivative(primals: Any, tangents: Any, *, layer: Layer, linear: bool) -> Any:
    words, values = primals
    result = _mean_p.bind(words, values, layer=layer, linear=linear)
    if type(tangents[1]) is ad.Zero:
        return result, tangents[1]
    return result, _mean_p.bind(words, tangents[1], layer=layer, linear=True)


def _transpose(cotangent: Any, words: Any, values: Any, *, layer: Layer, linear: bool) -> Any:
    """The sum over workers is its own adjoint."""
    if type(cotangent) is ad.Zero:
        return None, cotangent
    return None, _mean_p.bind(words, cotangent, layer=layer, linear=True)


mlir.register_lowering(_mean_p, mlir.lower_fun(_call, multiple_results=False))
batching.primitive_batchers[_mean_p] = _batch
ad.primitive_jvps[_mean_p] = _derivative
ad.primitive_transposes[_mean_p] = _transpose


def mean_over_workers(layer: Layer, words: Any, values: Any) -> Any:
    """[2, C], sum(dy) and sum(dy * (x - mean)), to their sums over workers divided by the forward round's count."""
    return _mean_p.bind(words, values, layer=layer, linear=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def differential(layer: Layer, words: Any, values: Any) -> Any:
    """Zeros, with the derivative of the mean over workers of `values`, [2, C]: makes a merged statistic depend on x."""
    return jnp.zeros_like(values)


@differential.defjvp
def _differential_jvp(layer: Layer, primals: Any, tangents: Any) -> Any:
    words, values = primals
    # The zeros are to have their derivative where this rule is differentiated in its turn.
    return differential(layer, words, values), _mean_p.bind(words, tangents[1], layer=layer, linear=True)
