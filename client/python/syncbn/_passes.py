"""Forward and backward passes over tensors in memory: what the fronts for torch and NumPy have in common.

Everything here goes by address: the caller keeps the memory alive for the length of the call. Structs are given as their
bytes.
"""

import functools
import time
from typing import Any, List, Optional

import numpy as np

from syncbn import _library, errors
from syncbn._calls import calls
from syncbn._library import call, lib
from syncbn._rounds import SLICE_NS, wait_in_slices
from syncbn._worker import Worker


_NO_WAIT = -1  # Nanoseconds of a backward pass's wait, in a stream-ordered one.


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


def _wait(worker: Worker, function: Any, handle: Optional[int], interrupts: Optional[int] = None) -> None:
    """Waits by one of `calls`; raises the error, if any."""

    def step(slice_ns: int) -> int:
        code: int = function(handle, slice_ns)
        if calls.has_log():
            _library.deliver_log()
        return code

    wait_in_slices(worker, step, interrupts=interrupts)


def _timed_wait(
    worker: Worker,
    waits: List[int],
    function: Any,
    handle: Optional[int],
    waited_ns: int = 0,
    interrupts: Optional[int] = None,
) -> None:
    """Waits for a pass's round; its length and its end are appended to `waits`, as Recorder.waits has them. waited_ns: what
    it has taken until now, and `interrupts` as wait_in_slices has it.
    """
    begun = time.monotonic_ns() - waited_ns
    try:
        _wait(worker, function, handle, interrupts)
    except errors.Error:
        waits.append(~(time.monotonic_ns() - begun))
        raise
    waits.append(time.monotonic_ns() - begun)


def _keep(worker: Worker, error: errors.Error) -> None:
    """Keeps what the error of a pass says of ranks and of a layer."""
    worker._recorder.add_missing(error.ranks)
    worker._note(error)


class ForwardPass(_library.Owned):
    """A forward pass, whose round begins here; after `wait` it can be finished, more than once, and gone back through.

    A stream-ordered one, as CUDA tensors have it where the worker is so, needs no `wait`; asked for its results, it
    waits. It keeps the merged statistics, never a tensor.
    """

    _backward_passes = _count = 0
    _waited = _failed = False

    def __init__(
        self,
        worker: Worker,
        layer: str,
        x: bytes,
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
        """x: a Tensor. cuda_device: the index of its device; None: the CPU. send: the contribution does not wait for `wait`,
        so that the caller can work meanwhile. eps and clamp are those that the layer was declared with.
        """
        self.value = None  # Until there is one to destroy.
        self.worker = worker
        self.layer = layer
        self.eps, self.clamp = eps, clamp
        self._role = role
        self._waits = worker._recorder.waits(layer)
        ordered = cuda_device is not None and worker.stream_ordered
        options = _options(num_threads, stream, role, sequence, ordered, False)
        handle = worker._enter()
        try:
            made = calls.forward_start(handle, layer.encode(), x, options, send)
            super().__init__(made, calls.forward_destroy)
        except errors.Error as error:
            worker._note(error)
            raise
        finally:
            worker._exit()
        self.stream_ordered = ordered and bool(lib.syncbn_forward_stream_ordered(made))
        if ordered and cuda_device is not None and not self.stream_ordered:
            worker.explain_host_driven(cuda_device)

    def wait(self) -> None:
        """Waits for the merged statistics; raises the round's error."""
        if self._waited:
            return
        worker, function, handle = self.worker, calls.forward_wait, self.value
        worker._enter()
        try:
            if self._failed:  # It has been counted.
                _wait(self.worker, function, handle)
            else:
                _timed_wait(worker, self._waits, function, handle)
        except errors.Error as error:
            self._fail(error)
            raise
        finally:
            worker._exit()
        self._count = calls.forward_count(handle)
        self._waited = True

    def _fail(self, error: errors.Error) -> None:
        if self._failed:
            self.worker._note(error)
        else:
            self._failed = True
            _keep(self.worker, error)

    def _outcome(self) -> Optional[int]:
        """The handle, once the results are there."""
        if self.stream_ordered and not self._waited:
            self.wait()
        return self.value

    def finish(self, x: bytes, outputs: bytes) -> None:
        calls.forward_finish(self.value, x, outputs)

    def end(self, x: bytes, outputs: bytes, ended: List[int]) -> int:
        """`wait` and `finish` by one call of the library. Not for a stream-ordered pass.

        Returns: `count`. If it is less than 2, nothing has been written: whether that is an error is the caller's to say.
        Else it is also appended to `ended`, which tells that the outputs are written where Ctrl-C ends this call.
        """
        worker, handle = self.worker, self.value
        if self._waited or self._failed:
            self.wait()
            return self._finish_late(x, outputs, ended)
        interrupts = worker._interrupts
        worker._enter()
        try:
            count: int = calls.forward_end(handle, SLICE_NS, x, outputs, self._waits, ended)
            if count == _library.PENDING:
                _timed_wait(worker, self._waits, calls.forward_wait, handle, SLICE_NS, interrupts)
                count = self._finish_late(x, outputs, ended)
        except errors.Error as error:
            self._fail(error)
            raise
        finally:
            worker._exit()
        self._waited, self._count = True, count
        return count

    def _finish_late(self, x: bytes, outputs: bytes, ended: List[int]) -> int:
        """The rest of `end`, after a wait of its own, which is counted."""
        count: int = calls.forward_end(self.value, SLICE_NS, x, outputs, [], ended)
        return count

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
        return calls.forward_backward_required(self.value) != 0

    @property
    def has_backward_round(self) -> bool:
        """Returns True if this worker and others exchange sums in a backward pass."""
        if self._role == _library.BACKWARD_NONE:
            return False
        if self._waited:
            return self._count > 0 and calls.forward_backward_required(self.value) != 0
        return self.backward_required and (self.stream_ordered or self.count > 0)

    def mean(self, channels: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.syncbn_forward_mean(self._outcome()), (channels,)).copy()

    def var(self, channels: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.syncbn_forward_var(self._outcome()), (channels,)).copy()

    def backward(
        self,
        inputs: bytes,
        outputs: bytes,
        *,
        num_threads: int = 1,
        stream: Optional[int] = None,
    ) -> None:
        """One backward pass from its start to its finish, its round between them or, stream-ordered, still to come.

        Any number of them may follow on one forward pass, as many at every worker.
        """
        worker, ordered = self.worker, self.stream_ordered
        options = _options(num_threads, stream, 0, None, False, self._backward_passes > 0)
        self._backward_passes += 1
        # Without a round the library ends the wait at once, and it is not counted.
        waits = [] if ordered or not self.has_backward_round else self._waits
        interrupts = worker._interrupts
        # The worker is held, so that a close on another thread ends the wait instead of pulling it away.
        worker._enter()
        try:
            handle = calls.backward(self.value, inputs, options, outputs, _NO_WAIT if ordered else SLICE_NS, waits)
            if handle != 0:  # The round takes longer than a slice.
                try:
                    _timed_wait(worker, waits, calls.backward_wait, handle, SLICE_NS, interrupts)
                    calls.backward_finish(handle, inputs, outputs)
                finally:
                    calls.backward_destroy(handle)
        except errors.Error as error:
            _keep(worker, error)
            raise
        finally:
            worker._exit()


def evaluate(x: bytes, options: bytes, y: int) -> None:
    """y, of x's shape, type and layout, from x with given statistics; no round. x: a Tensor; options: EvaluateOptions."""
    call(lib.syncbn_evaluate, x, options, y)


def observed_variance(count: int, var: np.ndarray, biased: bool) -> Optional[np.ndarray]:
    """The variance that a round adds to running statistics, from the merged one; None: it has none to add."""
    if biased:
        return var if count > 0 else None
    return var * (count / (count - 1)) if count > 1 else None
