"""Hearing Ctrl-C on threads that are not the main one.

Python runs a signal's handler on the main thread, between two of its instructions. While that thread waits in foreign
code for what another one does (autograd's threads of a GPU, JAX's callbacks), a round that the other one waits for would
go on to its deadline. So SIGINT is noted here too, by way of signal.set_wakeup_fd; and a wait on another thread ends if
it has come, would raise KeyboardInterrupt, and the main thread does not move.
"""

import os
import signal
import sys
import threading
from typing import Any, Optional, Tuple

_lock = threading.Lock()
_pipe: Optional[Tuple[int, int]] = None
_count = 0  # Of SIGINTs that were read.


def listen() -> None:
    """Begins to note signals, if this is the main thread, and if nobody else has a wakeup descriptor."""
    global _pipe
    if threading.current_thread() is not threading.main_thread():
        return
    if _pipe is None:
        _pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    if before not in (-1, _pipe[1]):
        signal.set_wakeup_fd(before)


def _forget() -> None:
    """In a forked child, whose signals are not its parent's."""
    global _pipe
    pipe, _pipe = _pipe, None
    if pipe is not None:
        before = signal.set_wakeup_fd(-1)
        if before not in (-1, pipe[1]):
            signal.set_wakeup_fd(before)
        for descriptor in pipe:
            os.close(descriptor)


os.register_at_fork(after_in_child=_forget)


def _interrupts() -> int:
    """How many SIGINTs there have been."""
    global _count
    with _lock:
        try:
            while _pipe is not None:
                _count += os.read(_pipe[0], 4096).count(signal.SIGINT)
        except BlockingIOError:
            pass
        return _count


def _place_of_main_thread() -> Any:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame and (frame, frame.f_lasti)


class Watch:
    """Over one wait on a thread that is not the main one."""

    def __init__(self) -> None:
        self._before = _interrupts()
        self._place: Any = None

    def check(self) -> None:
        """Raises KeyboardInterrupt if the main thread should, and has not moved between two calls."""
        if _interrupts() == self._before or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        place = _place_of_main_thread()
        if place is not None and place == self._place:
            raise KeyboardInterrupt
        if self._place is not None:  # It moves: it has heard.
            self._before, place = _interrupts(), None
        self._place = place
