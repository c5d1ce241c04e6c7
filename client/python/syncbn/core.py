"""Masters, workers and rounds, over NumPy vectors."""

import atexit
import contextlib
import ctypes
import os
import threading
import time
import warnings
import weakref
from types import TracebackType
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Type

import numpy as np

from syncbn import _library, _signals, errors
from syncbn._library import call, create, lib, text

_NS = 1_000_000_000
# How long a wait stays inside the library before the interpreter may look at signals (Ctrl-C).
_SLICE_NS = 100_000_000
_BACKWARD_ROLES = {
    True: _library.BACKWARD_REQUIRED,
    None: _library.BACKWARD_IF_REQUIRED,
    False: _library.BACKWARD_NONE,
}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * _NS)


def wait(function: Any, handle: Any, timeout: Optional[float] = None) -> bool:
    """Waits in slices: whether it was done within `timeout` seconds (None: no limit of ours). Raises the error, if any.

    The interpreter's lock is free during a slice, and a signal's handler runs at its end; on other threads than the main
    one see `_signals`.
    """
    watch = None if threading.current_thread() is threading.main_thread() else _signals.Watch()
    deadline = None if timeout is None else time.monotonic_ns() + _nanoseconds(timeout)
    while True:
        slice_ns = _SLICE_NS if deadline is None else max(0, min(_SLICE_NS, deadline - time.monotonic_ns()))
        if call(function, handle, slice_ns) != _library.PENDING:
            return True
        if deadline is not None and time.monotonic_ns() >= deadline:
            return False
        if watch is not None:
            watch.check()


class Master:
    """A master in this process.

    Args:
      address: "HOST:PORT" (port 0: any free one) or "unix:PATH".
      insecure: listen beyond loopback without TLS.
      cert_file, key_file: this server's certificate: TLS.
      trusted_ca_file: with `client_cert_auth`, who may sign the workers' certificates.

    Use it in a `with` block, whose end shuts it down.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        *,
        insecure: bool = False,
        cert_file: Optional[str] = None,
        key_file: Optional[str] = None,
        trusted_ca_file: Optional[str] = None,
        client_cert_auth: bool = False,
    ) -> None:
        self._handle: Optional[int] = None
        self._pid = os.getpid()
        options = _library.MasterOptions(
            address=text(address),
            insecure=insecure,
            cert_file=text(cert_file),
            key_file=text(key_file),
            trusted_ca_file=text(trusted_ca_file),
            client_cert_auth=client_cert_auth,
        )
        self._handle = create(lib.syncbn_master_start, ctypes.byref(options))
        self._target = lib.syncbn_master_target(self._handle).decode()
        _open_masters.add(self)

    @property
    def target(self) -> str:
        """What workers pass as their target."""
        return self._target

    def shutdown(self, grace: float = 1.0) -> None:
        """Tells every worker, lets streams drain for at most `grace` seconds, and ends. Twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is not None and os.getpid() == self._pid:
            lib.syncbn_master_shutdown(handle, _nanoseconds(grace))
            lib.syncbn_master_destroy(handle)

    def __enter__(self) -> "Master":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()

    def __del__(self) -> None:
        self.shutdown(grace=0.0)

    def __repr__(self) -> str:
        return f"<syncbn.Master {self._target}{'' if self._handle else ' (ended)'}>"


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

    def __init__(self, worker: "Worker", handle: int, kind: str) -> None:
        self._worker = worker
        self._handle: Optional[int] = handle
        self._kind = kind
        self._pid = os.getpid()

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Whether there is an outcome within `timeout` seconds (None: until there is). Raises it if it is an error."""
        with self._worker.handle():
            return wait(lib.syncbn_round_wait, self._handle, timeout)

    @property
    def sequence(self) -> int:
        return int(lib.syncbn_round_sequence(self._handle))

    def _vector(self, function: Any) -> np.ndarray:
        length = lib.syncbn_round_length(self._handle)
        return np.ctypeslib.as_array(function(self._handle), (length,)).copy() if length else np.zeros(0)

    def result(self) -> Any:
        """Waits, then returns `Moments`, `GradientSums` or the float64 sum."""
        self.wait()
        ranks = ctypes.POINTER(ctypes.c_uint32)()
        length = lib.syncbn_round_missing_ranks(self._handle, ctypes.byref(ranks))
        missing = tuple(ranks[:length]) if length else ()
        first = self._vector(lib.syncbn_round_first)
        if self._kind == "sum":
            return first
        second = self._vector(lib.syncbn_round_second)
        if self._kind == "backward":
            return GradientSums(first, second, missing)
        return Moments(
            int(lib.syncbn_round_count(self._handle)),
            first,
            second,
            self.sequence,
            bool(lib.syncbn_round_backward_required(self._handle)),
            missing,
        )

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None and os.getpid() == self._pid:
            lib.syncbn_round_destroy(handle)


def _doubles(vector: Any) -> np.ndarray:
    return np.ascontiguousarray(vector, dtype=np.float64).reshape(-1)


def _pointer(vector: Optional[np.ndarray]) -> Any:
    return None if vector is None else vector.ctypes.data_as(ctypes.POINTER(ctypes.c_double))


def _environment_int(name: str) -> Optional[int]:
    value = os.environ.get(name)
    return int(value) if value else None


class Worker:
    """One member of a group: joins when it is made.

    Args:
      target: the master, "HOST:PORT" or "unix:PATH". Default: $SYNCBN_TARGET.
      group: which group of the job to join.
      rank, world_size: default $RANK and $WORLD_SIZE, as torchrun sets them.
      timeout: seconds after which a round that lacks a worker fails. The same for all workers of the group.
      job: default $TORCHELASTIC_RUN_ID, else "default".
      generation: which restart of the whole group this is. Default $TORCHELASTIC_RESTART_COUNT, else 0.
      join_timeout: seconds for which the master is tried, at first and after a broken connection.
      rejoin_grace: seconds for which the others wait for this worker when its connection breaks (0: none). The same for
        all.
      min_workers: rounds proceed without the missing as long as this many have contributed. None: they fail. The same
        for all.
      description: for people who inspect the group.
      trusted_ca_file, cert_file, key_file: any of these: TLS.
      stream_ordered: passes over CUDA tensors do not wait for their rounds; the CUDA stream does, and the calling thread
        runs ahead. Errors come late: a failed pass computes NaN, and its error is raised once, by this worker's next
        pass over CUDA tensors, `all_reduce`, `settle` or `leave`. Passes for which that cannot be are host-driven, with
        a warning if it is for want of support.

    In a `with` block, a normal end leaves the group; an exception closes the worker without goodbye, so that the others
    learn at once that it is lost. Any thread may use a worker.
    """

    def __init__(
        self,
        target: Optional[str] = None,
        group: str = "default",
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        timeout: float = 30.0,
        *,
        job: Optional[str] = None,
        generation: Optional[int] = None,
        join_timeout: float = 30.0,
        rejoin_grace: Optional[float] = None,
        min_workers: Optional[int] = None,
        description: Optional[str] = None,
        trusted_ca_file: Optional[str] = None,
        cert_file: Optional[str] = None,
        key_file: Optional[str] = None,
        stream_ordered: bool = False,
    ) -> None:
        self._handle: Optional[int] = None
        self._pid = os.getpid()
        self.stream_ordered = stream_ordered
        self.min_workers = min_workers
        self._explained: Set[int] = set()
        self._users = 0
        self._idle = threading.Condition()
        self._layers: Dict[str, Tuple[Any, ...]] = {}
        self._unnamed_layers = 0
        target = target or os.environ.get("SYNCBN_TARGET")
        rank = _environment_int("RANK") if rank is None else rank
        world_size = _environment_int("WORLD_SIZE") if world_size is None else world_size
        if not target:
            raise ValueError("Worker needs a target, or SYNCBN_TARGET in the environment")
        if rank is None or world_size is None:
            raise ValueError("Worker needs rank and world_size, or RANK and WORLD_SIZE in the environment")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. world_size-1, and {rank} does not in 0 .. {world_size - 1}")
        if timeout <= 0 or join_timeout <= 0:
            raise ValueError("timeout and join_timeout are positive")
        self.target, self.group = target, group
        self.job = job or os.environ.get("TORCHELASTIC_RUN_ID") or "default"
        options = _library.WorkerOptions(
            target=text(target),
            job=text(self.job),
            group=text(group),
            rank=rank,
            world_size=world_size,
            generation=(_environment_int("TORCHELASTIC_RESTART_COUNT") or 0) if generation is None else generation,
            round_timeout_ns=_nanoseconds(timeout),
            join_timeout_ns=_nanoseconds(join_timeout),
            rejoin_grace_ns=0 if rejoin_grace is None else _nanoseconds(rejoin_grace) or -1,
            missing_policy=_library.MISSING_FAIL if min_workers is None else _library.MISSING_PROCEED,
            min_workers=min_workers or 0,
            description=text(description),
            trusted_ca_file=text(trusted_ca_file),
            cert_file=text(cert_file),
            key_file=text(key_file),
        )
        self._handle = _join(options)
        self.rank = int(lib.syncbn_worker_rank(self._handle))
        self.world_size = int(lib.syncbn_worker_world_size(self._handle))
        self.incarnation = int(lib.syncbn_worker_incarnation(self._handle))
        self._thread = threading.get_ident()
        _signals.listen()
        with _open_lock:
            _open_workers.append(weakref.ref(self))

    # ---- Its life ----

    @property
    def closed(self) -> bool:
        return self._handle is None

    @property
    def run_id(self) -> int:
        """The run of the group, as the master numbers it."""
        with self.handle() as handle:
            return int(lib.syncbn_worker_run_id(handle))

    @contextlib.contextmanager
    def handle(self) -> Iterator[int]:
        """The C handle, kept alive for the length of the block."""
        if os.getpid() != self._pid:
            raise errors.make_error("a worker cannot be used in a forked child", 9, "FORKED")
        with self._idle:
            if self._handle is None:
                raise errors.make_error("the worker has been closed", 9, "LEFT")
            self._users += 1
            handle = self._handle
        try:
            yield handle
        finally:
            with self._idle:
                self._users -= 1
                if self._users == 0:
                    self._idle.notify_all()

    def wait_for_members(self, timeout: float = 30.0) -> bool:
        """Whether every rank of the group was present within `timeout` seconds."""
        with self.handle() as handle:
            return wait(lib.syncbn_worker_wait_for_members, handle, timeout)

    def resume_at(self, sequence: int) -> None:
        """Every layer's next sequence becomes `sequence`: after a restart, all workers call it with one new value."""
        with self.handle() as handle:
            call(lib.syncbn_worker_resume_at, handle, sequence)

    def interrupt(self) -> None:
        """Ends what any thread waits for with `Cancelled`, now. The worker stays usable."""
        with self.handle() as handle:
            lib.syncbn_worker_interrupt(handle)

    def settle(self, timeout: Optional[float] = None) -> bool:
        """Whether every stream-ordered pass has its outcome within `timeout` seconds (None: until they all have).

        Raises the first failure among them that no call has raised yet. Does not wait for the CUDA streams. Before an
        optimizer's step, it keeps the NaN of a failed pass out of the parameters, at the price of the run ahead.
        """
        with self.handle() as handle:
            return wait(lib.syncbn_worker_settle, handle, timeout)

    def explain_host_driven(self, device_index: int) -> None:
        """Warns, once, if passes on this CUDA device cannot be stream-ordered."""
        if device_index in self._explained:
            return
        self._explained.add(device_index)
        try:
            call(lib.syncbn_stream_order_check, device_index)
        except errors.Error as error:
            warnings.warn(f"{error.message}; the host drives them", RuntimeWarning, stacklevel=2)

    def leave(self, reason: str = "finished") -> None:
        """Says goodbye, after the last stream-ordered pass: this worker is not waited for any more. Then closes.

        Raises, having left, a failure of these passes that no call has raised yet.
        """
        try:
            failure = None
            try:
                self.settle()  # In slices, as leaving itself would not be.
            except errors.Error as error:
                failure = error
            with self.handle() as handle:
                call(lib.syncbn_worker_leave, handle, text(reason))
            if failure is not None:
                raise failure
        finally:
            self.close()

    def close(self) -> None:
        """Ends the worker. Without a `leave` before it, the others learn that it is lost. Closing twice is harmless."""
        with _open_lock:
            _open_workers[:] = [reference for reference in _open_workers if reference() not in (None, self)]
        with self._idle:
            handle, self._handle = self._handle, None
            if handle is None or os.getpid() != self._pid:
                return
            while self._users:  # More than once, since a wait may be between two slices.
                lib.syncbn_worker_interrupt(handle)
                self._idle.wait(0.02)
        lib.syncbn_worker_destroy(handle)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        exception: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if kind is None and not self.closed:
            self.leave()
        else:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else ""
        return f"<syncbn.Worker {self.job}/{self.group} rank {self.rank} of {self.world_size}{state}>"

    # A copy of a model goes on with the same worker; a model unpickled in another process finds the worker of its name
    # there.

    def __copy__(self) -> "Worker":
        return self

    def __deepcopy__(self, memo: Any) -> "Worker":
        return self

    def __reduce__(self) -> Any:
        return _find_worker, (self.job, self.group, self.rank)

    # ---- Layers and rounds ----

    def declare_layer(
        self,
        name: str,
        channels: int,
        *,
        eps: float = 1e-5,
        eps_mode: str = "add",
        momentum: Optional[float] = 0.1,
        numeric: str = "refuse",
        biased_running_variance: bool = False,
    ) -> None:
        """Makes a batch-norm layer known. What is known already costs nothing.

        Args:
          eps_mode: "add" (1/sqrt(var+eps)) or "clamp" (1/sqrt(max(var,eps))).
          momentum: for the master's own running statistics; None: the cumulative average.
          numeric: "refuse" fails rounds with NaN or infinity; "propagate" lets them flow.
        """
        declared = (channels, eps, eps_mode, momentum, numeric, biased_running_variance)
        if self._layers.get(name) == declared:
            return
        options = _library.LayerOptions(
            name=text(name),
            channels=channels,
            kind=_library.LAYER_BATCH_NORM,
            eps=eps,
            eps_mode=_library.EPS_MODES[eps_mode],
            numeric_policy=_library.NUMERIC_POLICIES[numeric],
            has_momentum=momentum is not None,
            momentum=momentum or 0.0,
            biased_running_variance=biased_running_variance,
        )
        with self.handle() as handle:
            call(lib.syncbn_worker_declare_layer, handle, ctypes.byref(options))
        self._layers[name] = declared

    def name_unnamed_layer(self) -> str:
        """A name for a layer that has none: numbered by first use, so that workers that run alike name alike."""
        with self._idle:
            self._unnamed_layers += 1
            return f"sync_batch_norm_{self._unnamed_layers - 1}"

    def start_synchronize(
        self,
        layer: str,
        count: int,
        mean: Optional[Any] = None,
        m2: Optional[Any] = None,
        sequence: Optional[int] = None,
        *,
        backward: Optional[bool] = False,
    ) -> Round:
        """As `synchronize`, without waiting: several rounds begun this way travel in one frame."""
        if (mean is None) != (m2 is None):
            raise ValueError("mean and m2 come together")
        means = None if mean is None else _doubles(mean)
        m2s = None if m2 is None else _doubles(m2)
        if means is not None and m2s is not None and means.size != m2s.size:
            raise ValueError(f"mean has {means.size} elements and m2 has {m2s.size}")
        if layer not in self._layers:
            if means is None:
                raise ValueError(f"layer {layer!r} is unknown: declare it, or give a mean that shows its channels")
            self.declare_layer(layer, means.size)
        channels = self._layers[layer][0] if means is None else means.size
        with self.handle() as handle:
            return Round(
                self,
                create(
                    lib.syncbn_round_start_forward,
                    handle,
                    text(layer),
                    _library.NEXT_SEQUENCE if sequence is None else sequence,
                    count,
                    _pointer(means),
                    _pointer(m2s),
                    channels,
                    _BACKWARD_ROLES[backward],
                ),
                "forward",
            )

    def synchronize(
        self,
        layer: str,
        count: int,
        mean: Optional[Any] = None,
        m2: Optional[Any] = None,
        sequence: Optional[int] = None,
        *,
        backward: Optional[bool] = False,
    ) -> Moments:
        """Merges this worker's moments of a layer with those of all other workers.

        Args:
          layer: its name. A layer not declared before is declared with `declare_layer`'s defaults.
          count: values in each channel here; 0 for an empty batch, with mean and m2 None.
          mean: [channels].
          m2: [channels], the sum of squared deviations from `mean`.
          sequence: which time this is; counted by the worker if None.
          backward: a call of `synchronize_backward` with the result's sequence follows. None: it does if the result's
            `backward_required` says that another worker's does.
        Returns:
          The merged count, mean and biased variance, in float64, the same bits at every worker.
        """
        result: Moments = self.start_synchronize(layer, count, mean, m2, sequence, backward=backward).result()
        return result

    def start_synchronize_backward(self, layer: str, sequence: int, sum_dy: Any, sum_dy_xmu: Any) -> Round:
        """As `synchronize_backward`, without waiting."""
        first, second = _doubles(sum_dy), _doubles(sum_dy_xmu)
        if first.size != second.size:
            raise ValueError(f"sum_dy has {first.size} elements and sum_dy_xmu has {second.size}")
        with self.handle() as handle:
            return Round(
                self,
                create(
                    lib.syncbn_round_start_backward,
                    handle,
                    text(layer),
                    sequence,
                    _pointer(first),
                    _pointer(second),
                    first.size,
                ),
                "backward",
            )

    def synchronize_backward(self, layer: str, sequence: int, sum_dy: Any, sum_dy_xmu: Any) -> GradientSums:
        """Sums what the input's gradient needs, over the workers of the forward round of the same sequence.

        dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd**2 * sum_dy_xmu / N), N the forward round's count.
        """
        result: GradientSums = self.start_synchronize_backward(layer, sequence, sum_dy, sum_dy_xmu).result()
        return result

    def start_all_reduce(self, name: str, vector: Any, sequence: Optional[int] = None) -> Round:
        """As `all_reduce`, without waiting; the result is flat."""
        values = _doubles(vector)
        with self.handle() as handle:
            return Round(
                self,
                create(
                    lib.syncbn_round_start_sum,
                    handle,
                    text(name),
                    _library.NEXT_SEQUENCE if sequence is None else sequence,
                    _pointer(values),
                    values.size,
                ),
                "sum",
            )

    def all_reduce(self, name: str, vector: Any, sequence: Optional[int] = None) -> np.ndarray:
        """The float64 sum of `vector` (of any shape, the same everywhere) over all workers, in the order of ranks."""
        result: np.ndarray = self.start_all_reduce(name, vector, sequence).result()
        return result.reshape(np.shape(vector))

    def flush(self) -> None:
        """Sends the rounds that have begun, without waiting."""
        with self.handle() as handle:
            call(lib.syncbn_worker_flush, handle)


def _join(options: _library.WorkerOptions) -> int:
    """Joins on a thread of its own, so that Ctrl-C does not wait for a master that does not answer."""
    if threading.current_thread() is not threading.main_thread():
        return create(lib.syncbn_worker_join, ctypes.byref(options))
    lock, done = threading.Lock(), threading.Event()
    outcome: List[Any] = []
    abandoned = False

    def join() -> None:
        try:
            made: Any = create(lib.syncbn_worker_join, ctypes.byref(options))
        except errors.Error as error:
            made = error
        with lock:
            outcome.append(made)
            if abandoned and isinstance(made, int):
                lib.syncbn_worker_destroy(made)
        done.set()

    threading.Thread(target=join, name="syncbn-join", daemon=True).start()
    try:
        while not done.wait(0.1):
            pass
    except BaseException:
        with lock:
            abandoned = True
            if outcome and isinstance(outcome[0], int):
                lib.syncbn_worker_destroy(outcome[0])
        raise
    if isinstance(outcome[0], int):
        return outcome[0]
    raise outcome[0]


_open_lock = threading.RLock()
_open_workers: List["weakref.ref[Worker]"] = []
_open_masters: "weakref.WeakSet[Master]" = weakref.WeakSet()


def _all_open() -> List[Worker]:
    """In the order in which they were made."""
    with _open_lock:
        return [worker for worker in (reference() for reference in _open_workers) if worker is not None]


@atexit.register
def _close_all() -> None:
    """Ends what the program left open, while the interpreter is still whole; without goodbye, as the program did."""
    for worker in _all_open():
        worker.close()
    for master in list(_open_masters):
        master.shutdown(grace=0.0)


def _find_worker(job: str, group: str, rank: int) -> Optional[Worker]:
    """The open worker of that name in this process, else None: its user falls back to `default_worker`."""
    for worker in reversed(_all_open()):
        if (worker.job, worker.group, worker.rank) == (job, group, rank):
            return worker
    return None


_environment_lock = threading.Lock()
_environment_worker: Optional[Worker] = None  # Kept open until the process ends.


def default_worker() -> Worker:
    """The worker that layers without one use: this thread's newest open one, else the only open one of the process.

    Where none is open, one is made if SYNCBN_TARGET, RANK and WORLD_SIZE are set, and stays open until the process ends.
    """
    global _environment_worker
    with _environment_lock:  # Of threads that come at the same time, one makes it.
        workers = _all_open()
        own = [worker for worker in workers if worker._thread == threading.get_ident()]
        if own:
            return own[-1]
        if len(workers) == 1:
            return workers[0]
        if workers:
            text = f"{len(workers)} workers are open, none of them by this thread: pass worker="
        elif all(os.environ.get(name) for name in ("SYNCBN_TARGET", "RANK", "WORLD_SIZE")):
            _environment_worker = Worker()
            return _environment_worker
        else:
            text = (
                "no worker is open: make a syncbn.Worker first, pass worker=, or set SYNCBN_TARGET, RANK and WORLD_SIZE "
                "in the environment"
            )
    raise errors.make_error(text, 9, "NO_WORKER")
