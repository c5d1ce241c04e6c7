"""Rounds that have begun, and what comes of them."""

import ctypes
import functools
import threading
import time
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np

from syncbn import _arguments, _library, _signals, errors
from syncbn._library import call, create, lib

_NS = 1_000_000_000
# Nanoseconds that a wait stays inside the library before the interpreter may look at signals (Ctrl-C).
SLICE_NS = 100_000_000


def nanoseconds(seconds: float) -> int:
    """At least 1 of what is more than 0, which the library would take for the default."""
    return max(int(seconds * _NS), 1) if seconds > 0 else 0


def wait(worker: Any, function: Any, handle: Any, timeout: Optional[float] = None) -> bool:
    """`wait_in_slices` by a function of the library."""
    return wait_in_slices(worker, functools.partial(call, function, handle), timeout)


def wait_in_slices(
    worker: Any, step: Callable[[int], int], timeout: Optional[float] = None, interrupts: Optional[int] = None
) -> bool:
    """Waits, at most so many nanoseconds in each call of `step`, which returns PENDING if it has to go on: whether it was
    done within `timeout` seconds (None: no limit of ours). Raises the error, if any.

    The interpreter's lock is free during a slice, and a signal's handler runs at its end; on other threads than the main
    one see `_signals`. The library knows of no interrupt that comes between two slices, as a handler's does:
    `interrupts` is the worker's number of them at the begin of the wait, if a slice has been before.
    """
    watch: Optional[_signals.Watch] = None
    interrupts = worker._interrupts if interrupts is None else interrupts
    begun = time.monotonic()
    deadline = None if timeout is None else time.monotonic_ns() + nanoseconds(timeout)
    while True:
        slice_ns = SLICE_NS if deadline is None else max(0, min(SLICE_NS, deadline - time.monotonic_ns()))
        if step(slice_ns) != _library.PENDING:
            return True
        if worker._interrupts != interrupts:
            raise errors.make_error("the wait was interrupted", errors.Code.CANCELLED, "INTERRUPTED")
        if deadline is not None and time.monotonic_ns() >= deadline:
            return False
        if watch is None and threading.current_thread() is not threading.main_thread():
            watch = _signals.Watch(begun)
        if watch is not None:
            watch.check()


PHASES = {_library.PHASE_FORWARD: "forward", _library.PHASE_BACKWARD: "backward", _library.PHASE_SUM: "sum"}
_PHASE_NUMBERS = {name: number for number, name in PHASES.items()}


def listed(function: Any, handle: Any) -> List[Tuple[str, int, int]]:
    """(layer, phase, sequence) of each round in the list that a function of the library makes."""
    rounds = _library.Owned(create(function, handle), lib.syncbn_rounds_destroy)
    return [
        (
            lib.syncbn_rounds_layer(rounds.value, i).decode(),
            lib.syncbn_rounds_phase(rounds.value, i),
            lib.syncbn_rounds_sequence(rounds.value, i),
        )
        for i in range(lib.syncbn_rounds_size(rounds.value))
    ]


def of_state(state: Any) -> Tuple[int, List[Tuple[str, int, int]]]:
    """Reads a worker's state_dict: the sequence of layers that it does not name, and (layer, phase, sequence) of others.

    Errors: `InvalidArgument` for anything else, naming the value.
    """

    def sequence(name: str, value: Any) -> int:
        return _arguments.integer(name, value, 0, _arguments.MOST_SEQUENCE)

    if not isinstance(state, dict) or set(state) != {"first", "next"} or not isinstance(state["next"], dict):
        raise _arguments.refused(f'the state is {state!r}; it has to be what state_dict returned, with "first" and "next"')
    rounds = []
    for layer, phases in state["next"].items():
        _arguments.text("a layer's name in the state", layer)
        if not isinstance(phases, dict) or not set(phases) <= set(_PHASE_NUMBERS):
            raise _arguments.refused(f"the state of layer {layer!r} is {phases!r}; it has a sequence for some of {list(_PHASE_NUMBERS)}")
        for phase, value in phases.items():
            rounds.append((layer, _PHASE_NUMBERS[phase], sequence(f"the {phase} sequence of layer {layer!r}", value)))
    return sequence("the first sequence of the state", state["first"]), rounds


class Moments(NamedTuple):
    """The merged moments of a forward round."""

    count: int  # type: ignore[assignment]  # Hides tuple.count, which nobody wants of moments.
    """Values in each channel, over all contributors; 0 if all batches were empty."""
    mean: np.ndarray
    """float64 [channels]."""
    var: np.ndarray
    """float64 [channels]: the biased variance, M2 / count."""
    sequence: int
    backward_required: bool
    """Some worker will contribute to the backward round, so that those with the role may have to."""
    missing_ranks: Tuple[int, ...]
    """Ranks that are not in the result."""


class GradientSums(NamedTuple):
    """The summed gradients of a backward round: what dx needs."""

    sum_dy: np.ndarray
    """float64 [channels]."""
    sum_dy_xmu: np.ndarray
    """float64 [channels]: sum of dy * (x - mean)."""
    missing_ranks: Tuple[int, ...]


class Round:
    """A round that has begun. It belongs to one thread at a time."""

    def __init__(self, worker: Any, handle: int, kind: str, layer: str) -> None:
        self._worker = worker
        self._stopwatch = worker._recorder.stopwatch(layer)
        self._handle = _library.Owned(handle, lib.syncbn_round_destroy)
        self._kind = kind

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits for the outcome, for `timeout` seconds at most (None: until there is one), and raises it if it is an error.
        Sends the round even if the time is up, for which it may take 0.1 s longer if an earlier frame is still being
        written. Without a connection, a later wait sends it.

        Returns: True if there is one.
        """
        timeout = _arguments.patience("timeout", timeout)
        with self._worker.handle(), self._stopwatch:
            done = wait(self._worker, lib.syncbn_round_wait, self._handle.value, timeout)
        if done:
            self._stopwatch.ended(self._missing_ranks())
        return done

    @property
    def sequence(self) -> int:
        """The number that the worker has given the round, among its layer's of this kind."""
        return int(lib.syncbn_round_sequence(self._handle.value))

    def _missing_ranks(self) -> Tuple[int, ...]:
        ranks = ctypes.POINTER(ctypes.c_uint32)()
        length = lib.syncbn_round_missing_ranks(self._handle.value, ctypes.byref(ranks))
        return tuple(ranks[:length]) if length else ()

    def _vector(self, function: Any) -> np.ndarray:
        length = lib.syncbn_round_length(self._handle.value)
        return np.ctypeslib.as_array(function(self._handle.value), (length,)).copy() if length else np.zeros(0)

    def result(self) -> Any:
        """Waits, then returns `Moments`, `GradientSums` or the float64 sum."""
        self.wait()
        missing = self._missing_ranks()
        first = self._vector(lib.syncbn_round_first)
        if self._kind == "sum":
            return first
        second = self._vector(lib.syncbn_round_second)
        if self._kind == "backward":
            return GradientSums(first, second, missing)
        return Moments(
            int(lib.syncbn_round_count(self._handle.value)),
            first,
            second,
            self.sequence,
            bool(lib.syncbn_round_backward_required(self._handle.value)),
            missing,
        )
