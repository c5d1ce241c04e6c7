"""Where threads are, for a close that waits until none is within a worker any more.

A thread notes itself on its way in, and takes the note back on its way out. Ctrl-C on the first instruction of the way out
leaves the note behind, and Python has no way to put that off. A note without anybody is told by the thread's stack.
"""

import sys
import threading
from types import CodeType, FrameType
from typing import List, Optional, Sequence, Tuple, Union

User = Union[int, Tuple[int, CodeType]]
"""The identifier of a thread within a function of this package; or with the code of the function that it is within."""


def thread_of(user: User) -> int:
    return user if isinstance(user, int) else user[0]


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_FOLDER)


_FOLDER = _is_ours.__code__.co_filename[: -len("_presence.py")]


def _is_within(user: User, frame: Optional[FrameType]) -> bool:
    while frame is not None:
        if _is_ours(frame) if isinstance(user, int) else frame.f_code is user[1]:
            return True
        frame = frame.f_back
    return False


def absent(users: Sequence[User]) -> List[User]:
    """Returns those of whom their threads' stacks show nothing. Of the calling thread's own, what called this package to ask
    counts: a signal's handler runs within the wait that it interrupts.
    """
    frames = dict(sys._current_frames())
    own = threading.get_ident()
    frame: Optional[FrameType] = frames.pop(own)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    if frame is not None:
        frames[own] = frame
    return [user for user in users if not _is_within(user, frames.get(thread_of(user)))]
