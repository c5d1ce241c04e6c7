"""The rounds of the JAX front: host callbacks, and the operations of a traced program that call them.

Forward rounds and the sums of backward passes are operations of their own, since JAX's callbacks can be neither batched
nor differentiated, and both have a meaning here. Under vmap each element is a call, with a round of its own; the rounds
of all elements travel together. Where only the cotangents are batched, as under jax.jacrev, each row is a backward pass.
The derivative of a sum over workers is the sum over workers of the derivatives.
"""

import collections
import contextlib
import functools
import threading
import weakref
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.interpreters import ad, batching, mlir

from syncbn import _jax_devices, _jax_modes, _names
from syncbn.core import Worker

try:
    from jax.extend.core import Primitive
except ImportError:  # Before JAX 0.4.36.
    from jax.core import Primitive

# Errors that callbacks raised, oldest first, until `typed_errors` takes them.
_failures: Deque[BaseException] = collections.deque(maxlen=64)
_failures_lock = threading.Lock()

MAPPED = (
    "syncbn.jax cannot run under pmap, or shard_map over several devices: each device would begin a round of its own. Run "
    "a process for each device, or let jit spread the batch over them. An axis of vmap is named by axis_name="
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
        found = _take_failure(str(error))
        if found is None and "KeyboardInterrupt" in str(error):  # It came before the callback's first line.
            found = KeyboardInterrupt()
        if found is None or type(error) is type(found):
            raise
        raise found from error


def _take_failure(text: str) -> Optional[BaseException]:
    """The newest failure that an error of JAX's quotes. Others may be older, or of other threads' programs."""
    with _failures_lock:
        for failure in reversed(_failures):
            name, message = type(failure).__name__, str(failure)
            if (f"{name}: {message}" if message else name) in text:
                _failures.remove(failure)
                return failure
    return None


def _on_host(function: Callable[..., Any], *arguments: Any) -> Any:
    """A callback's body, whose error `typed_errors` can find."""
    try:
        return function(*arguments)
    except BaseException as error:
        with _failures_lock:
            _failures.append(error)
        raise


class Layer(NamedTuple):
    """The constants of a trace."""

    worker: Worker
    name: str
    channels: int
    eps: float
    eps_mode: str
    momentum: float
    numeric: str
    biased_running_variance: bool
    axis: int
    axis_name: Any
    """The axes of vmap that belong to the batch."""
    normalizes: bool
    """A single value in all is refused, since its normalized value would always be 0."""

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
    """A worker's knowledge of a layer's name."""

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
        """Takes it away. Returns whether it was there."""
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


class _Own(NamedTuple):
    """A batch's moments, on the host; the vectors [C]. `rest` is what rounding left of the sum of deviations from `mean`."""

    number: int
    mean: np.ndarray
    rest: np.ndarray
    m2: np.ndarray


def _start_merge(layer: Layer, wanted: bool, own: _Own) -> Any:
    if own.number == 0:
        return layer.worker.start_synchronize(layer.name, 0, backward=wanted)
    shift = own.rest.astype(np.float64) / own.number
    mean = own.mean.astype(np.float64) + shift
    m2 = np.maximum(own.m2.astype(np.float64) - own.rest * shift, 0.0)
    return layer.worker.start_synchronize(layer.name, own.number, mean, m2, backward=wanted)


def _check_merged(layer: Layer, positions: int, merged: Any) -> None:
    if not layer.normalizes:
        return
    if merged.count == 1:
        raise ValueError("Expected more than 1 value per channel when training, and the other workers had none")
    if merged.count == 0 and positions:
        raise ValueError("the masks of all workers leave no position: there is nothing to take statistics of")


def _merge(layer: Layer, positions: int, wanted: bool, *arguments: Any) -> Tuple[np.ndarray, ...]:
    """The forward rounds of all elements. Arguments: see `merge`, with the axes of vmap before their own."""
    *counts, means, rests, m2s, faults = (np.asarray(argument) for argument in arguments)
    _check_mask(layer, faults.reshape(-1, 2).any(0))
    elements, pair = means.shape[:-1], means.dtype
    vectors = [v.reshape(-1, layer.channels) for v in (means, rests, m2s)]
    numbers = counts[0].reshape(-1) if counts else np.full(len(vectors[0]), positions)
    _awaited.declare(layer)
    begun = [_start_merge(layer, wanted, _Own(int(n), *own)) for n, *own in zip(numbers, *vectors)]
    found = [round.result() for round in begun]
    for merged in found:
        _check_merged(layer, positions, merged)
    if wanted:
        for merged in found:
            _awaited.add(layer, merged.sequence)
    mean, rest = _split(np.reshape([merged.mean for merged in found], means.shape), pair)
    var = np.reshape([merged.var for merged in found], means.shape).astype(pair)
    return mean, rest, var, _words(found).reshape(*elements, 4)


def _words(found: List[Any]) -> np.ndarray:
    """Sequences and counts, each as two numbers of 31 bits: without x64 there is nothing wider."""
    numbers = [(merged.sequence, merged.count) for merged in found]
    rows = [[part for n in pair for part in (n >> 31, n & 0x7FFFFFFF)] for pair in numbers]
    return np.asarray(rows, np.int32)


def _sequence_and_count(words: np.ndarray) -> Tuple[int, int]:
    high, low, count_high, count_low = (int(word) for word in words)
    return (high << 31) | low, (count_high << 31) | count_low


def _start_sums(layer: Layer, sequence: int, row: np.ndarray) -> Any:
    """The backward round of a forward round; for what goes back once more, a sum of the same vectors."""
    if not _awaited.take(layer, sequence):
        return layer.worker.start_all_reduce(_names.derived(layer.name, "/retained"), row)
    try:
        return layer.worker.start_synchronize_backward(layer.name, sequence, *row)
    except BaseException:
        _awaited.add(layer, sequence)
        raise


def _exchange(layer: Layer, linear: bool, words: Any, values: Any) -> np.ndarray:
    """The means over the forward round's values of vectors [*rows, 2, *elements, C], summed over workers.

    Each row is a backward pass of each element; words are [*elements, 4]. `linear`: the derivative of such means, which
    no forward round waits for.
    """
    _awaited.check(layer)
    narrow, forwards = np.asarray(values), np.asarray(words).reshape(-1, 4)
    rows = np.moveaxis(narrow.astype(np.float64).reshape(-1, 2, len(forwards), layer.channels), 1, 2)
    known = [_sequence_and_count(row) for row in forwards]
    if linear:
        rounds = [layer.worker.start_all_reduce(_names.derived(layer.name, "/derivatives"), own) for row in rows for own in row]
    else:
        rounds = [_start_sums(layer, sequence, own) for row in rows for (sequence, _), own in zip(known, row)]
    results = np.reshape([_vectors(begun.result()) for begun in rounds], rows.shape)
    counts = np.asarray([max(1, count) for _, count in known], np.float64)
    with np.errstate(over="ignore"):  # To infinity, as in the framework's own sums.
        means = np.moveaxis(results / counts[:, None, None], 1, 2)
        return means.reshape(narrow.shape).astype(narrow.dtype)


def _vectors(result: Any) -> np.ndarray:
    """The two vectors of a round as one."""
    return result if isinstance(result, np.ndarray) else np.concatenate([result.sum_dy, result.sum_dy_xmu])


# ---- In the program ----


_ORDERED = jax.make_jaxpr(
    lambda: io_callback(lambda: np.zeros(()), jax.ShapeDtypeStruct((), np.float32), ordered=True)
)().effects
_jax_modes.allow_checkpoints(_ORDERED)

_merge_p = Primitive("syncbn_merge")
_merge_p.multiple_results = True


def merge(
    layer: Layer, wanted: bool, positions: int, count: Any, mean: Any, rest: Any, m2: Any, faults: Any
) -> Tuple[Any, ...]:
    """The merged mean, as the sum of two vectors, the variance, and `words` for `mean_over_workers`. Constants to JAX.

    count None: all positions.
    """
    arguments = jax.lax.stop_gradient((() if count is None else (count,)) + (mean, rest, m2, faults))
    return tuple(_merge_p.bind(*arguments, layer=layer, positions=positions, wanted=wanted))


def _merge_body(layer: Layer, positions: int, wanted: bool) -> Callable[..., Any]:
    return functools.partial(_on_host, functools.partial(_merge, layer, positions, wanted))


def _call_merge(body: Callable[..., Any], *arguments: Any) -> Any:
    mean = arguments[-4]
    vectors = jax.ShapeDtypeStruct(mean.shape, mean.dtype)
    shapes = (vectors, vectors, vectors, jax.ShapeDtypeStruct((*mean.shape[:-1], 4), jnp.int32))
    return io_callback(body, shapes, *arguments, ordered=True)


@_merge_p.def_impl
def _evaluate_merge(*arguments: Any, **constants: Any) -> Any:
    return _jax_devices.outside_of_programs(_merge_body(**constants), _call_merge, arguments)


def _merge_in_a_program(*arguments: Any, **constants: Any) -> Any:
    return _call_merge(_merge_body(**constants), *arguments)


@_merge_p.def_effectful_abstract_eval
def _abstract_merge(*arguments: Any, **constants: Any) -> Any:
    mean = arguments[-4].update(weak_type=False)
    return [mean, mean, mean, jax.core.ShapedArray((*mean.shape[:-1], 4), np.dtype(np.int32))], _ORDERED


def _batch_merge(arguments: Any, axes: Any, **constants: Any) -> Any:
    """Each element is a call, masks and all."""
    size = next(a.shape[axis] for a, axis in zip(arguments, axes) if axis is not None)
    each = [_lead(argument, axis, size) for argument, axis in zip(arguments, axes)]
    found = _merge_p.bind(*each, **constants)
    return found, [0] * len(found)


def _lead(value: Any, axis: Any, size: int) -> Any:
    """The value with its batch axis in front, repeated where it has none."""
    return jnp.broadcast_to(value, (size, *value.shape)) if axis is None else jnp.moveaxis(value, axis, 0)


mlir.register_lowering(_merge_p, mlir.lower_fun(_merge_in_a_program, multiple_results=True))
batching.primitive_batchers[_merge_p] = _batch_merge


def count_of(words: Any, dtype: Any) -> Any:
    """The forward round's count, rounded to `dtype`."""
    return words[2].astype(dtype) * 2.0**31 + words[3].astype(dtype)


def _mean_body(layer: Layer, linear: bool) -> Callable[..., Any]:
    return functools.partial(_on_host, functools.partial(_exchange, layer, linear))


def _call_mean(body: Callable[..., Any], words: Any, values: Any) -> Any:
    return io_callback(body, jax.ShapeDtypeStruct(values.shape, values.dtype), words, values, ordered=True)


_mean_p = Primitive("syncbn_mean_over_workers")


@_mean_p.def_impl
def _evaluate_mean(words: Any, values: Any, **constants: Any) -> Any:
    return _jax_devices.outside_of_programs(_mean_body(**constants), _call_mean, (words, values))


def _mean_in_a_program(words: Any, values: Any, **constants: Any) -> Any:
    return _call_mean(_mean_body(**constants), words, values)


@_mean_p.def_effectful_abstract_eval
def _abstract(words: Any, values: Any, *, layer: Layer, linear: bool) -> Any:
    return values.update(weak_type=False), _ORDERED


def _batch(arguments: Any, axes: Any, *, layer: Layer, linear: bool) -> Any:
    """Another row, or, where the forward pass was batched too, another element: [*rows, 2, *elements, C]."""
    words, values = arguments
    if axes[0] is None:
        return _mean_p.bind(words, jnp.moveaxis(values, axes[1], 0), layer=layer, linear=linear), 0
    words = jnp.moveaxis(words, axes[0], 0)
    values = _lead(values, axes[1], words.shape[0])
    first = values.ndim - words.ndim
    found = _mean_p.bind(words, jnp.moveaxis(values, 0, first), layer=layer, linear=linear)
    return found, first


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


mlir.register_lowering(_mean_p, mlir.lower_fun(_mean_in_a_program, multiple_results=False))
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
