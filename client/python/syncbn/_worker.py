"""Workers: members of a group."""

import contextlib
import ctypes
import logging
import sys
import threading
import warnings
from threading import get_ident
from types import TracebackType
from typing import Any, Dict, List, Optional, Set, Tuple, Type

import numpy as np

from syncbn import _arguments, _forks, _joins, _layers, _library, _meeting, _open, _places, _presence, _rounds
from syncbn import _settings, _signals, _stats, errors
from syncbn._library import call, create, lib, text
from syncbn._rounds import GradientSums, Moments, Round, wait

_logger = logging.getLogger("syncbn")
_LOOK_AGAIN_SECONDS = 0.1
_BACKWARD_ROLES = {
    True: _library.BACKWARD_REQUIRED,
    None: _library.BACKWARD_IF_REQUIRED,
    False: _library.BACKWARD_NONE,
}


def _pointer(vector: Optional[np.ndarray]) -> Any:
    return None if vector is None else vector.ctypes.data_as(ctypes.POINTER(ctypes.c_double))


def _sequence(value: Any) -> int:
    return _library.NEXT_SEQUENCE if value is None else _arguments.integer("sequence", value, 0, _arguments.MOST_SEQUENCE)


def _role(backward: Any) -> int:
    if backward is not None and not isinstance(backward, (bool, np.bool_)):
        raise TypeError(f"backward is {backward!r}; it has to be True, False or None")
    return _BACKWARD_ROLES[None if backward is None else bool(backward)]


def _by_layer(rounds: List[Tuple[str, int, int]]) -> Dict[str, Dict[str, int]]:
    layers: Dict[str, Dict[str, int]] = {}
    for layer, phase, sequence in rounds:
        layers.setdefault(layer, {})[_rounds.PHASES[phase]] = sequence
    return layers


class _Held:
    """A worker's C handle, kept alive for the length of a `with` block: a close on another thread waits for its end. One that a
    signal's handler calls, within the block on the same thread, leaves the handle for the block to destroy.
    """

    __slots__ = ("_worker", "_user")

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._user: Optional[_presence.User] = None

    def __enter__(self) -> int:
        self._user = (get_ident(), sys._getframe(1).f_code)
        return self._worker._enter(self._user)

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._worker._exit(self._user)
        if error is not None:
            self._worker._note(error)


class Worker(_layers.Declares):
    """One member of a group: joins when it is made.

    Each argument that is None has the value of an environment variable, where that is set; see the README's table.

    Args:
      target: the master, "HOST:PORT" or "unix:PATH"; or several, of which one that answers is taken: separated by commas,
        or a list. Or a function that returns either, called at each attempt to connect, on any thread, for a short time;
        if it raises, that is a warning in the log, and an attempt that failed. Default: $SYNCBN_TARGET. Without either,
        rank 0 starts a master, in a process beside it, and the others find it through the store of torch.distributed, of
        jax.distributed, or of torchrun; it ends when all have left. Rank 0 of a world of one normalizes over its own batches.
      group: the group of the job to join. Default: $SYNCBN_GROUP, else "default".
      rank, world_size: default torch.distributed's, if it is initialized, else jax.distributed's, else the launcher's
        ($RANK and $WORLD_SIZE, or the variables of Open MPI, PMI, PMIx, Horovod, Slurm, Kubeflow), else 0 and 1.
      timeout: seconds after which a round that lacks a worker fails. The same for all workers of the group. Default:
        $SYNCBN_TIMEOUT, else 600. A warning names the workers that are late long before.
      job: a name that the workers of one launch share, and no other launch has. Default: $SYNCBN_JOB, else
        $TORCHELASTIC_RUN_ID unless it is "none", $SLURM_JOB_ID, Ray's job, $MASTER_ADDR:$MASTER_PORT, else "default".
      generation: which restart of the whole group this is. Default: $SYNCBN_GENERATION, else $SLURM_RESTART_COUNT times
        2**32 plus $TORCHELASTIC_RESTART_COUNT. Under torchrun with a process group, the second at which rank 0 has started
        takes the place of the count, which is not the same on all hosts.
      join_timeout: seconds for which the master is tried, at first and after a broken connection. Default: 30.
      rejoin_grace: seconds for which the others wait for this worker when its connection breaks (0: none). The same for
        all.
      min_workers: rounds proceed without the missing as long as this many have contributed. None: they do not. The same
        for all.
      on_worker_lost: what rounds do that lack a lost worker, the same for all. "fail": they end with `WorkerLost`, once
        rejoin_grace is over. "wait": they wait until the worker has restarted, for rejoin_grace, by default half of
        `timeout`; it goes on from its checkpoint with `load_state_dict`. "proceed": what min_workers says. Default:
        $SYNCBN_ON_WORKER_LOST, else "proceed" with min_workers, else "fail".
      description: for people who inspect the group.
      trusted_ca_file, cert_file, key_file: any of these: TLS. Default: $SYNCBN_CLIENT_TRUSTED_CA_FILE and so on.
      token: the job's secret, the same for all its workers. A master that has a token accepts no other. Default:
        $SYNCBN_TOKEN. Where rank 0 starts the master, it draws one at random and hands it to the others.
      stream_ordered: passes over CUDA tensors do not wait for their rounds; the CUDA stream does, and the calling thread
        runs ahead. Errors come late: a failed pass computes NaN, and its error is raised once, by this worker's next
        pass over CUDA tensors, `all_reduce`, `settle` or `leave`. Passes for which that cannot be are host-driven, with
        a warning if it is for want of support.

    In a `with` block, a normal end leaves the group; an exception closes the worker without a leave, so that the others
    learn at once that it is lost. Any thread may use a worker.
    """

    def __init__(
        self,
        target: Optional[Any] = None,
        group: Optional[str] = None,
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        timeout: Optional[float] = None,
        *,
        job: Optional[str] = None,
        generation: Optional[int] = None,
        join_timeout: Optional[float] = None,
        rejoin_grace: Optional[float] = None,
        min_workers: Optional[int] = None,
        on_worker_lost: Optional[str] = None,
        description: Optional[str] = None,
        trusted_ca_file: Optional[Any] = None,
        cert_file: Optional[Any] = None,
        key_file: Optional[Any] = None,
        token: Optional[str] = None,
        stream_ordered: Optional[bool] = None,
        _place: Optional[_places.Place] = None,
    ) -> None:
        self._handle: Optional[int] = None
        self._generation = _forks.here.generation
        self._explained: Set[int] = set()
        self._users: List[_presence.User] = []  # The threads within `handle` blocks, one for each block.
        self._abandoned: Optional[int] = None  # A handle that is closed, and to be destroyed with the last of these.
        self._interrupts = 0
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        super().__init__()
        self._meeting: Optional[_meeting.Meeting] = None
        self._lost: Set[int] = set()
        self._recorder = _stats.Recorder()
        self._thread = threading.get_ident()
        _forks.refuse()
        settings = _settings.Settings(
            target=target,
            group=group,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            job=job,
            generation=generation,
            join_timeout=join_timeout,
            rejoin_grace=rejoin_grace,
            min_workers=min_workers,
            on_worker_lost=on_worker_lost,
            description=description,
            trusted_ca_file=trusted_ca_file,
            cert_file=cert_file,
            key_file=key_file,
            token=token,
            stream_ordered=stream_ordered,
            place=_place,
        )
        self.job, self.group, self.stream_ordered = settings.job, settings.group, settings.stream_ordered
        self.rank, self.world_size, self.min_workers = settings.rank, settings.world_size, settings.min_workers
        self.on_worker_lost = settings.on_worker_lost
        self._launch = settings.place.identity
        try:
            settings.agree()
            if settings.target is None:
                self._meeting = settings.meet()
            self.target = settings.target
            with _open.joining():
                self._options = settings.options()  # The library may call a function that they point to.
                self._handle = _joins.join(self._options, settings)
                _open.add(self)
            if self._meeting is not None:
                self._meeting.joined()
        except BaseException:
            self._end_meeting(wait=False)
            raise
        self.incarnation = int(lib.syncbn_worker_incarnation(self._handle))
        _signals.listen()

    # ---- Its life ----

    @property
    def closed(self) -> bool:
        """True once the worker has left or was closed: it takes part in no further round."""
        return self._handle is None

    @property
    def run_id(self) -> int:
        """The run of the group, as the master numbers it."""
        with self.handle() as handle:
            return int(lib.syncbn_worker_run_id(handle))

    def handle(self) -> "_Held":
        """The C handle, kept alive for the length of a `with` block."""
        return _Held(self)

    def _enter(self, user: Optional[_presence.User] = None) -> int:
        """The C handle, which is kept alive until `_exit`, on the same thread. There is none to be called after an error.

        user: the thread within the function that has the handle; None: the calling one, whose caller is of this package.
        Neither takes a lock, in a worker that is open: to append to a list and to remove from one are single steps.
        """
        if self._generation != _forks.here.generation:
            raise _forks.error()
        users, own = self._users, user or get_ident()
        try:
            users.append(own)  # First: a close looks here once it has taken the handle away.
            handle = self._handle
            if handle is not None:
                return handle
            _open.end_daemon()
            raise errors.make_error("the worker has been closed", errors.Code.FAILED_PRECONDITION, "LEFT")
        except BaseException:  # Ctrl-C too.
            self._exit(own)
            raise

    def _exit(self, user: Optional[_presence.User] = None) -> None:
        self._users.remove(user or get_ident())
        if self._handle is not None:
            return
        abandoned = None
        with self._idle:  # A close waits, or has been.
            self._idle.notify_all()
            if not self._users:
                abandoned, self._abandoned = self._abandoned, None
        if abandoned is not None:
            lib.syncbn_worker_destroy(abandoned)

    def _note(self, error: BaseException) -> None:
        """Remembers which workers an error says are lost, and completes what it says of a layer's name.

        On a daemon thread at the program's end: ends the thread, whose error only says that the worker was closed.
        """
        if not isinstance(error, errors.Error):
            return
        if isinstance(error, errors.LayerMismatch):
            self._advise(error)
        elif isinstance(error, errors.WorkerLost):
            self._lost.update(error.ranks)
        _open.end_daemon()

    def wait_for_members(self, timeout: Optional[float] = 30.0) -> bool:
        """Waits until every rank of the group is present. Returns: whether they were within `timeout` seconds."""
        timeout = _arguments.patience("timeout", timeout)
        with self.handle() as handle:
            return wait(self, lib.syncbn_worker_wait_for_members, handle, timeout)

    def resume_at(self, sequence: int) -> None:
        """Every layer's next sequence becomes `sequence`: after a restart, all workers call it with one new value."""
        sequence = _arguments.integer("sequence", sequence, 0, _arguments.MOST_SEQUENCE)
        with self.handle() as handle:
            call(lib.syncbn_worker_resume_at, handle, sequence)

    def state_dict(self) -> Dict[str, Any]:
        """The part of a checkpoint that belongs to this worker, between two steps: the next sequences of its layers.

        Returns {"first": n, "next": {layer: {"forward": n, "backward": n, "sum": n}}}; "first" is the next sequence of
        every layer that is not named.
        """
        with self.handle() as handle:
            (_, _, first), *rounds = _rounds.listed(lib.syncbn_worker_next_rounds, handle)
        return {"first": first, "next": _by_layer(rounds)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Goes on after the step that `state_dict` was called after, in an earlier life of this worker.

        With on_worker_lost="wait" the others need not go back: this worker gets the outcomes of the rounds that they have
        had since, as long as it contributes the same numbers as before. That takes the same batches, and the same random
        numbers: keep what they depend on in the checkpoint.

        Errors: `InvalidArgument` for what is not a state, naming the value; the sequences are then unchanged.
        """
        first, rounds = _rounds.of_state(state)
        with self.handle() as handle:
            call(lib.syncbn_worker_resume_at, handle, first)
            for layer, phase, sequence in rounds:
                call(lib.syncbn_worker_resume_layer_at, handle, text(layer), phase, sequence)

    def newest_rounds(self) -> Dict[str, Dict[str, int]]:
        """The state of the group when this worker joined: {layer: {"forward": n, "backward": n, "sum": n}}, the greatest
        sequence that had completed, for each layer and phase that had any. Empty in a group that began then.
        """
        with self.handle() as handle:
            return _by_layer(_rounds.listed(lib.syncbn_worker_newest_rounds, handle))

    def interrupt(self) -> None:
        """Ends what any thread waits for with `Cancelled`, now. The worker stays usable."""
        with self.handle() as handle:
            self._interrupts += 1
            lib.syncbn_worker_interrupt(handle)

    def settle(self, timeout: Optional[float] = None) -> bool:
        """Waits until every stream-ordered pass has its outcome, for `timeout` seconds at most (None: for ever).

        Returns: whether they all have. Raises the first failure among them that no call has raised yet. Does not wait
        for the CUDA streams. Before an optimizer's step, it keeps the NaN of a failed pass out of the parameters, at the
        price of the run ahead.
        """
        timeout = _arguments.patience("timeout", timeout)
        with self.handle() as handle:
            return wait(self, lib.syncbn_worker_settle, handle, timeout)

    def stats(self) -> _stats.Stats:
        """The number of rounds so far, and how long threads have waited for them: in all, and by layer.

        `print(worker.stats())` shows a table. A worker that ends logs the totals at level INFO.
        """
        return self._recorder.stats()._replace(transport=self._transport())

    def _transport(self) -> Optional[str]:
        try:
            with self.handle() as handle:
                return "shared memory" if lib.syncbn_worker_shares_memory(handle) else "gRPC"
        except errors.Error:
            return None

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
        """Leaves the group, after the last stream-ordered pass: other workers stop waiting for this one. Then closes.

        Waits for the master's answer, which comes once the others have read that this worker leaves, and with it the results
        of its last rounds: up to a second if one of them computes, two without a master.

        Rank 0, if it has started the master for all, first waits until the others have left, or have joined and ended: until
        no worker has been connected for a second on one host, for 30 seconds across hosts. Ten minutes at most.

        Errors: a failure of a stream-ordered pass that no call has raised yet; the worker has left nevertheless.
        """
        reason = _arguments.text("reason", reason, _arguments.MOST_DESCRIPTION_BYTES, empty=True)
        left = False
        try:
            failure = None
            try:
                self.settle()  # In slices, unlike the library's own leave.
            except errors.Error as error:
                failure = error
            with self.handle() as handle:
                call(lib.syncbn_worker_leave, handle, text(reason))
            left = True
            if failure is not None:
                raise failure
        finally:
            self._close()
            self._end_meeting(wait=left)

    def close(self) -> None:
        """Ends the worker. Without a `leave` before it, the others learn that it is lost. Closing twice is harmless."""
        self._close()
        self._end_meeting(wait=False)

    def _close(self) -> None:
        """Ends the worker, but no master that it has started."""
        if self._generation != _forks.here.generation:  # Its locks may be as another thread held them at the fork.
            self._handle = self._meeting = None
            return
        _open.remove(self)
        with self._idle:
            handle, self._handle = self._handle, None
        if handle is not None:
            lib.syncbn_worker_close(handle)  # Ends what other threads wait for.
            own = threading.get_ident()
            with self._idle:
                while any(_presence.thread_of(user) != own for user in self._users):
                    if not self._idle.wait(_LOOK_AGAIN_SECONDS):
                        self._forget_absent()
                self._forget_absent()
                if self._users:
                    self._abandoned, handle = handle, None
            if handle is not None:
                lib.syncbn_worker_destroy(handle)
            self._log_summary()
        if self._meeting is not None:
            self._meeting.leave()

    def _forget_absent(self) -> None:
        """Takes back the notes that Ctrl-C has kept their threads from taking back."""
        for user in _presence.absent(list(self._users)):
            with contextlib.suppress(ValueError):  # The thread has just done so.
                self._users.remove(user)

    def _log_summary(self) -> None:
        if not _logger.isEnabledFor(logging.INFO):
            return
        found = self.stats()
        if found.rounds:
            slowest, layer = next(iter(found.layers.items()))
            _logger.info(
                "%r has waited %.3f s for %d rounds (%d failed), %.3f ms at the median and %.3f ms at the 99th percentile; most "
                "for %s: %.3f s",
                self,
                found.seconds_waited,
                found.rounds,
                found.failed,
                found.p50 * 1e3,
                found.p99 * 1e3,
                slowest,
                layer.seconds_waited,
            )

    def _end_meeting(self, wait: bool) -> None:
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.end(wait, self._lost)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        exception: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if kind is None and not self.closed and self._generation == _forks.here.generation:
            self.leave()
        else:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __repr__(self) -> str:
        where = "a function's target" if callable(self.target) else self.target
        state = "closed" if self.closed else f"at {where}"
        return f"<syncbn.Worker {self.job}/{self.group}, rank {self.rank} of {self.world_size}, {state}>"

    # A copy of a model goes on with the same worker; a model unpickled in another process finds the worker of its name
    # there.

    def __copy__(self) -> "Worker":
        return self

    def __deepcopy__(self, memo: Any) -> "Worker":
        return self

    def __reduce__(self) -> Any:
        return _open.find, (self.job, self.group, self.rank)

    # ---- Rounds ----

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
        layer = _arguments.text("the layer's name", layer)
        count = _arguments.integer("count", count, 0, _arguments.MOST_COUNT)
        means = None if mean is None else _arguments.vector("mean", mean)
        m2s = None if m2 is None else _arguments.vector("m2", m2)
        if means is not None and m2s is not None and means.size != m2s.size:
            raise ValueError(f"mean has {means.size} elements and m2 has {m2s.size}")
        if means is None and count > 0:
            raise _arguments.refused(f"count is {count}, and mean and m2 are absent; they are for an empty batch alone")
        if layer not in self._layers:
            if means is None:
                raise ValueError(f"layer {layer!r} is unknown: declare it, or give a mean that shows its channels")
            self.declare_layer(layer, means.size)
        channels = self._layers[layer][0] if means is None else means.size
        if channels != self._layers[layer][0]:
            self._declare_width(layer, channels)
        with self.handle() as handle:
            return Round(
                self,
                create(
                    lib.syncbn_round_start_forward,
                    handle,
                    text(layer),
                    _sequence(sequence),
                    count,
                    _pointer(means),
                    _pointer(m2s),
                    channels,
                    _role(backward),
                ),
                "forward",
                layer,
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
          layer: its name. A layer not declared before is declared with `declare_layer`'s defaults, and one whose mean has
            another size than before is declared anew.
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
        layer = _arguments.text("the layer's name", layer)
        sequence = _arguments.integer("sequence", sequence, 0, _arguments.MOST_SEQUENCE)
        first, second = _arguments.vector("sum_dy", sum_dy), _arguments.vector("sum_dy_xmu", sum_dy_xmu)
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
                layer,
            )

    def synchronize_backward(self, layer: str, sequence: int, sum_dy: Any, sum_dy_xmu: Any) -> GradientSums:
        """Sums what the input's gradient needs, over the workers of the forward round of the same sequence.

        dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd**2 * sum_dy_xmu / N), N the forward round's count.
        """
        result: GradientSums = self.start_synchronize_backward(layer, sequence, sum_dy, sum_dy_xmu).result()
        return result

    def start_all_reduce(self, name: str, vector: Any, sequence: Optional[int] = None) -> Round:
        """As `all_reduce`, without waiting; the result is flat."""
        name = _arguments.text("the sum's name", name)
        values = _arguments.vector("vector", vector)
        self._layers.pop(name, None)  # A layer of this name is declared anew when it is used again.
        with self.handle() as handle:
            return Round(
                self,
                create(
                    lib.syncbn_round_start_sum,
                    handle,
                    text(name),
                    _sequence(sequence),
                    _pointer(values),
                    values.size,
                ),
                "sum",
                name,
            )

    def all_reduce(self, name: str, vector: Any, sequence: Optional[int] = None) -> np.ndarray:
        """The float64 sum of `vector` (of any shape, the same everywhere) over all workers, in the order of ranks."""
        result: np.ndarray = self.start_all_reduce(name, vector, sequence).result()
        return result.reshape(np.shape(vector))

    def flush(self) -> None:
        """Sends the rounds that have begun, without waiting."""
        with self.handle() as handle:
            call(lib.syncbn_worker_flush, handle)
