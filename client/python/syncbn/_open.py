"""Open workers of this process: found by name, closed when the program ends, refused in forked children."""

import atexit
import contextlib
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Callable, Iterator, List, Optional

from syncbn import _forks, _master

if TYPE_CHECKING:
    from syncbn._worker import Worker

_lock = threading.RLock()
_workers: List["weakref.ref[Worker]"] = []
_joining = 0  # Workers that are being made.
_ending = False  # The program has ended: what is open is being closed, and stays so.
_cancels: List[Callable[[], None]] = []  # Their joins' ends.


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """A worker is being made within."""
    global _joining
    with _lock:
        _joining += 1
    try:
        yield
    finally:
        with _lock:
            _joining -= 1


@contextlib.contextmanager
def cancelled_at_the_end(cancel: Callable[[], None]) -> Iterator[None]:
    """A join is under way within, which `cancel` ends if the program does."""
    with _lock:
        _cancels.append(cancel)
    try:
        yield
    finally:
        with _lock:
            _cancels.remove(cancel)


def add(worker: "Worker") -> None:
    """Notes a worker that has joined. It is not kept alive."""
    with _lock:
        _workers.append(weakref.ref(worker))


def remove(worker: "Worker") -> None:
    """Forgets a worker that ends, and those that are gone."""
    with _lock:
        _workers[:] = [reference for reference in _workers if reference() not in (None, worker)]


def workers() -> List["Worker"]:
    """Returns the open workers in the order in which they were made."""
    with _lock:
        return [worker for worker in (reference() for reference in _workers) if worker is not None]


def find(job: str, group: str, rank: int) -> Optional["Worker"]:
    """Returns the open worker of that name, else None: its user falls back to `default_worker`."""
    for worker in reversed(workers()):
        if (worker.job, worker.group, worker.rank) == (job, group, rank):
            return worker
    return None


def end_daemon() -> None:
    """Ends the calling thread without a word where the program has ended and the thread is a daemon, as the interpreter ends
    those a little later. Does nothing on other threads. To be called with an error of a worker that the program has left open.

    Foreign threads, as autograd's and JAX's, hand the error to whoever waits for them.
    """
    thread = threading.current_thread()
    if _ending and thread.daemon and not isinstance(thread, threading._DummyThread):
        raise SystemExit  # Ignored by `threading.excepthook`.


@atexit.register
def _close_all() -> None:
    """Closes what the program left open, while the interpreter is still whole; without a leave, as the program did."""
    global _ending
    _ending = True
    with _lock:
        cancels = list(_cancels)
    for cancel in cancels:
        cancel()
    left = workers()
    failed = getattr(sys, "last_type", None) is not None or getattr(sys, "last_exc", None) is not None
    for worker in left:
        worker._close()
    for worker in left:
        worker._end_meeting(wait=not failed)  # Other workers may still be in a round that this one has the result of.
    for master in _master.all_open():
        master.shutdown(grace=0.0)


def _after_fork() -> None:
    """In a forked child: its parent's workers are not its own, and locks may be as other threads held them."""
    global _lock, _joining
    if _joining or any(reference() is not None for reference in _workers):
        _forks.mark()
    _lock, _joining = threading.RLock(), 0
    _workers.clear()
    _cancels.clear()


os.register_at_fork(after_in_child=_after_fork)
