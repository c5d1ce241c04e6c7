"""Hearing Ctrl-C on threads that are not the main one.

Python runs a signal's handler on the main thread, between two of its instructions. While that thread waits in foreign
code for what another one does (autograd's threads of a GPU, JAX's callbacks), a round that the other one waits for would
go on to its deadline. So SIGINT is heard here too, by way of signal.set_wakeup_fd, by a thread that looks whether the main
thread moves afterwards. If it does not, then whoever waits on another thread gets KeyboardInterrupt; also where the
signal came first and the wait began later.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Optional, Tuple

_LOOK_AGAIN_MILLISECONDS = 100

_pipe: Optional[Tuple[int, int]] = None
_stuck_at: Any = None  # Where the main thread is, if a SIGINT has come and it has not moved since.
_answered = math.inf  # When a wait first ended for the newest SIGINT: what begins later is not concerned.


def listen() -> None:
    """Begins to hear signals, if this is the main thread, and if nobody else has a wakeup descriptor.

    Does without, where the system grants no thread or descriptor for it: a worker that has joined is worth more.
    """
    global _pipe
    if threading.current_thread() is not threading.main_thread():
        return
    if _pipe is None:
        _pipe = _start_to_hear()
    if _pipe is None:
        return
    before = signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    if before not in (-1, _pipe[1]):
        signal.set_wakeup_fd(before)


def _start_to_hear() -> Optional[Tuple[int, int]]:
    """Returns the pipe that is heard, or None if the system grants none."""
    try:
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    os.set_blocking(pipe[0], True)
    try:
        threading.Thread(target=_hear, args=(pipe[0],), name="syncbn-signals", daemon=True).start()
    except RuntimeError:
        for descriptor in pipe:
            os.close(descriptor)
        return None
    return pipe


def _forget() -> None:
    """In a forked child, whose signals are not its parent's, and which has no thread that hears."""
    global _pipe, _stuck_at
    pipe, _pipe = _pipe, None
    _stuck_at = None
    if pipe is not None:
        before = signal.set_wakeup_fd(-1)
        if before not in (-1, pipe[1]):
            signal.set_wakeup_fd(before)
        for descriptor in pipe:
            os.close(descriptor)


os.register_at_fork(after_in_child=_forget)


def _place_of_main_thread() -> Any:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame and (frame, frame.f_lasti)


def _hear(descriptor: int) -> None:
    """The thread that hears: notes, after each SIGINT, where the main thread is stuck, until it is not."""
    global _stuck_at, _answered
    arrivals = select.poll()
    arrivals.register(descriptor, select.POLLIN)
    place: Any = None
    while True:
        if arrivals.poll(None if place is None else _LOOK_AGAIN_MILLISECONDS):
            signals = os.read(descriptor, 4096)
            if not signals:
                return
            if signal.SIGINT in signals:
                _stuck_at, _answered, place = None, math.inf, _place_of_main_thread()
            continue
        if _place_of_main_thread() != place:  # It moves: it has heard.
            place = None
        _stuck_at = place


class Watch:
    """Over one wait on a thread that is not the main one, which began at that time of `time.monotonic`."""

    def __init__(self, begun: float) -> None:
        self._begun = begun

    def check(self) -> None:
        """To be called now and then: raises KeyboardInterrupt if the main thread should, and is stuck."""
        global _answered
        stuck_at = _stuck_at
        if stuck_at is None or self._begun > _answered or _place_of_main_thread() != stuck_at:
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _answered = min(_answered, time.monotonic())
            raise KeyboardInterrupt
