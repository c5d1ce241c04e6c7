"""Forward and backward passes over tensors in memory: what the fronts for torch and NumPy have in common.

Everything here goes by address: the caller keeps the memory alive for the length of the call.
"""

import ctypes
import functools
import time
from typing import Any, Optional, Union

import numpy as np

from syncbn import _library, errors
from syncbn._calls import calls
from syncbn._library import (
    BackwardInputs,
    BackwardOutputs,
    EvaluateOptions,
    ForwardOutputs,
    Tensor,
    Vector,
    call,
    lib,
)
from syncbn._rounds import wait_in_slices
from syncbn.core import Worker


def _bytes(given: Any) -> bytes:
    """Those of a struct."""
    return given if type(given) is bytes else bytes(given)


@functools.lru_cache(maxsize=256)  # A training has few. By position, which is found in a third of the time.
def _options(
    num_threads: int, stream: Optional[int], role: int, sequence: Optional[int], stream_ordered: bool, again: bool
) -> bytes:
    """A PassOptions."""
    layout = _library.PASS_OPTIONS
    has_sequence = sequence is not None
    return layout.pack(
        layout.size, num_threads, stream or 0, role, has_sequence, sequence or 0, stream_ordered, again
    )


def _wait(worker: Worker, function: Any, handle: Optional[int]) -> None:
    """Waits by one of `calls`; raises the error, if any."""

    def step(slice_ns: int) -> int:
        code: int = function(handle, slice_ns)
        if calls.has_log():
            _library.deliver_log()
        return code

    wait_in_slices(worker, step)


def _timed_wait(worker: Worker, layer: str, function: Any, handle: Optional[int]) -> None:
    """Waits for a pass's round; its length and its end go into the worker's statistics."""
    begun = time.monotonic_ns()
    try:
        _wait(worker, function, handle)
    except errors.Error as error:
        worker._recorder.add(layer, time.monotonic_ns() - begun, True, error.ranks)
        raise
    worker._recorder.add(layer, time.monotonic_ns() - begun, False, ())


class ForwardPass:
    """A forward pass, whose round begins here; after `wait` it can be finished, more than once, and gone back through.

    A stream-ordered one, as CUDA tensors have it where the worker is so, needs no `wait`; asked for its results, it
    waits. It keeps the merged statistics, never a tensor.
    """

    def __init__(
        self,
        worker: Worker,
        layer: str,
        x: Union[Tensor, bytes],
        *,
        role: int = _library.BACKWARD_REQUIRED,
        num_threads: int = 1,
        cuda_device: Optional[int] = None,
        stream: Optional[int] = None,
        sequence: Optional[int] = None,
        send: bool = False,
        eps: float,
        clamp: bool,
    ) -> None:
        """cuda_device: the index of x's; None: x is on the CPU. send: the contribution does not wait for `wait`, so that
        the caller can work meanwhile. eps and clamp are those that the layer was declared with.
        """
        self.worker = worker
        self.layer = layer
        self.eps, self.clamp = eps, clamp
        self._backward_passes = 0
        self._role = role
        self._waited = self._failed = self._required = False
        self._count = 0
        ordered = worker.stream_ordered and cuda_device is not None
        options = _options(num_threads, stream, role, sequence, ordered, False)
        self._held = worker.handle()
        with self._held as handle:
            made = calls.forward_start(handle, layer.encode(), _bytes(x), options, send)
            self._owned = _library.Owned(made, calls.forward_destroy)
        self.stream_ordered = ordered and bool(lib.syncbn_forward_stream_ordered(made))
        if cuda_device is not None and ordered and not self.stream_ordered:
            worker.explain_host_driven(cuda_device)

    @property
    def _handle(self) -> Optional[int]:
        return self._owned.value

    def wait(self) -> None:
        """Waits for the merged statistics; raises the round's error."""
        if self._waited:
            return
        function, handle = calls.forward_wait, self._owned.value
        with self._held:
            if self._failed:  # It has been counted.
                _wait(self.worker, function, handle)
            else:
                try:
                    _timed_wait(self.worker, self.layer, function, handle)
                except errors.Error:
                    self._failed = True
                    raise
        self._count = calls.forward_count(handle)
        self._required = calls.forward_backward_required(handle) != 0
        self._waited = True

    def _outcome(self) -> Optional[int]:
        """The handle, once the results are there."""
        if self.stream_ordered and not self._waited:
            self.wait()
        return self._handle

    def finish(self, x: Union[Tensor, bytes], outputs: Union[ForwardOutputs, bytes]) -> None:
        calls.forward_finish(self._owned.value, _bytes(x), _bytes(outputs))

    @property
    def sequence(self) -> int:
        return int(lib.syncbn_forward_sequence(self._outcome()))

    @property
    def count(self) -> int:
        """Values in each channel, over all workers."""
        return self._count if self._waited else int(calls.forward_count(self._outcome()))

    @property
    def backward_required(self) -> bool:
        if self.stream_ordered:  # Its role tells.
            return self._role == _library.BACKWARD_REQUIRED
        return self._required if self._waited else calls.forward_backward_required(self._handle) != 0

    @property
    def has_backward_round(self) -> bool:
        """Whether this worker and others exchange sums in a backward pass."""
        takes_part = self._role != _library.BACKWARD_NONE and self.backward_required
        return takes_part and (self.stream_ordered or self.count > 0)

    def mean(self, channels: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.syncbn_forward_mean(self._outcome()), (channels,)).copy()

    def var(self, channels: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.syncbn_forward_var(self._outcome()), (channels,)).copy()

    def backward(
        self,
        inputs: Union[BackwardInputs, bytes],
        outputs: Union[BackwardOutputs, bytes],
        *,
        num_threads: int = 1,
        stream: Optional[int] = None,
    ) -> None:
        """One backward pass from its start to its finish, its round between them or, stream-ordered, still to come.

        Any number of them may follow on one forward pass, as many at every worker.
        """
        options = _options(num_threads, stream, 0, None, False, self._backward_passes > 0)
        self._backward_passes += 1
        given = _bytes(inputs)
        # The worker is held, so that a close on another thread ends the wait instead of pulling it away.
        with self._held:
            handle = calls.backward_start(self._owned.value, given, options)
            try:
                if not self.stream_ordered:
                    self._wait_backward(handle)
                calls.backward_finish(handle, given, _bytes(outputs))
            finally:
                calls.backward_destroy(handle)

    def _wait_backward(self, handle: int) -> None:
        if self.has_backward_round:
            _timed_wait(self.worker, self.layer, calls.backward_wait, handle)
        else:  # The library ends the wait at once.
            _wait(self.worker, calls.backward_wait, handle)


def evaluate(x: Tensor, options: EvaluateOptions, y: Optional[int]) -> None:
    """y, of x's shape, type and layout, from x with given statistics; no round."""
    call(lib.syncbn_evaluate, ctypes.byref(x), ctypes.byref(options), y)


def evaluate_backward(inputs: BackwardInputs, options: EvaluateOptions, outputs: BackwardOutputs) -> None:
    """The gradient of `evaluate`, the statistics constant."""
    call(lib.syncbn_evaluate_backward, ctypes.byref(inputs), ctypes.byref(options), ctypes.byref(outputs))


def observed_variance(count: int, var: np.ndarray, biased: bool) -> Optional[np.ndarray]:
    """The variance that a round adds to running statistics, from the merged one; None: it has none to add."""
    if biased:
        return var if count > 0 else None
    return var * (count / (count - 1)) if count > 1 else None


NO_VECTOR = Vector(None, _library.FLOAT64)
