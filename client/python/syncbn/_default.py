"""The worker of layers that are given none."""

import os
import threading
from typing import Optional

from syncbn import _forks, _open, _places, _settings, errors
from syncbn._worker import Worker

_environment_lock = threading.RLock()
_environment_worker_is_made = False  # By the thread with the lock, in this moment.
_environment_worker: Optional[Worker] = None  # Kept open until the process ends.


def _after_fork() -> None:
    """In a forked child: the lock may be as another thread held it."""
    global _environment_lock, _environment_worker_is_made
    _environment_lock, _environment_worker_is_made = threading.RLock(), False


os.register_at_fork(after_in_child=_after_fork)


def default_worker() -> Worker:
    """The worker that layers without one use: this thread's newest open one, else the only open one of the process.

    Where none is open, `Worker()` makes one of the launch and the environment, which stays open until the process ends. It
    is replaced when torch.distributed has been initialized anew.

    Errors: FAILED_PRECONDITION (NO_WORKER) where several are open and none is this thread's, where a setting is missing, and
    in a signal's handler while this thread makes it.
    """
    global _environment_worker, _environment_worker_is_made
    _forks.refuse()
    with _environment_lock:  # One of the threads that come at the same time makes it.
        outdated = _environment_worker
        if outdated is not None and not outdated.closed and _places.is_outdated(outdated._launch):
            outdated.leave("torch.distributed has been initialized anew")
        workers = _open.workers()
        own = [worker for worker in workers if worker._thread == threading.get_ident()]
        if own:
            return own[-1]
        if len(workers) == 1:
            return workers[0]
        if workers:
            text = f"{len(workers)} workers are open, none of them by this thread: pass worker="
        elif _environment_worker_is_made:
            text = "no worker is open: this thread is making one, below the handler that asks for it"
        else:
            _environment_worker_is_made = True
            try:
                _environment_worker = Worker()
            except _settings.Missing as missing:
                text = f"no worker is open: make a syncbn.Worker first, or pass worker=; {missing.message}"
            else:
                return _environment_worker
            finally:
                _environment_worker_is_made = False
    raise errors.make_error(text, errors.Code.FAILED_PRECONDITION, "NO_WORKER")
