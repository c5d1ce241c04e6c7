"""The join of a worker, which may take long and may be ended."""

import ctypes
import threading
from typing import Any, List, Optional

from syncbn import _environment, _library, _open, _places, _settings, errors
from syncbn._library import create, lib

# Seconds for a join to end that is cancelled.
_MOST_CANCELLING = 5.0


def _joined(options: _library.WorkerOptions) -> int:
    """Joins on a thread of its own, so that neither Ctrl-C nor the log waits for a master that does not answer.

    Where an exception ends the wait, it ends the join too: the rank is not taken later on, and no thread is within the
    library when the process ends.
    """
    lock, done = threading.Lock(), threading.Event()
    cancelled = ctypes.c_int32(0)
    options.join_cancelled = ctypes.pointer(cancelled)
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

    def cancel() -> None:
        cancelled.value = 1
        done.wait(_MOST_CANCELLING)  # A function that finds targets may take its time.

    try:
        threading.Thread(target=join, name="syncbn-join", daemon=True).start()
    except RuntimeError as error:
        _open.end_daemon()
        raise errors.ResourceExhausted(
            f"no thread can be had for the join: {error}; the limit of the user's or the container's processes (ulimit -u, "
            "pids.max) may have been reached",
            errors.Code.RESOURCE_EXHAUSTED,
        ) from None
    try:
        with _open.cancelled_at_the_end(cancel):
            while not done.wait(0.1):
                _library.deliver_log()
    except BaseException:
        with lock:
            abandoned = True
            if outcome and isinstance(outcome[0], int):
                lib.syncbn_worker_destroy(outcome[0])
        cancel()
        raise
    if isinstance(outcome[0], int):
        return outcome[0]
    _open.end_daemon()
    raise outcome[0]


def join(options: _library.WorkerOptions, settings: _settings.Settings) -> int:
    """Joins. Returns: the handle, which is the caller's to destroy.

    Errors: those of the join. One for a rank that is taken tells what may have led to it.
    """
    try:
        return _joined(options)
    except errors.RankTaken as error:
        for reason in (_own_worker(settings), _two_launchers(settings.place)):
            if reason is not None:
                error.add_note_to_message(reason)
        raise


def _own_worker(settings: _settings.Settings) -> Optional[str]:
    """A worker that this process has made before: a notebook's cell that runs again makes its second one first."""
    held = _open.find(settings.job, settings.group, settings.rank)
    if held is None or held.target != settings.target:
        return None
    return (
        "it is an open worker of this process: end that one first, with leave() or close(), or at the end of a `with` block, or "
        "go on with it"
    )


def _two_launchers(place: _places.Place) -> Optional[str]:
    """Variables of the environment that number this process twice."""
    if place.identity is not None or place.rank is None or place.world_size is None:
        return None
    launchers = _environment.launchers_around(place.rank, place.world_size)
    if launchers is None:
        return None
    return (
        f"two launchers have numbered this process ({launchers}): if each task of the outer one has started an inner one, start "
        "all processes by one of the two, or pass rank and world_size of the whole"
    )
