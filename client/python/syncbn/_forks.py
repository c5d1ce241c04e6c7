"""Processes that were forked from one with an open worker.

gRPC's threads stay behind at a fork, and its locks as they were: there, joining would hang. So it is refused at once.
"""

import os

from syncbn import errors

_forked = False


class _Process:
    """Tells a process from the one that it was forked from, without a system call."""

    generation = 0


here = _Process()


def _count() -> None:
    here.generation += 1


os.register_at_fork(after_in_child=_count)


def mark() -> None:
    """In the child."""
    global _forked
    _forked = True


def error() -> errors.Error:
    return errors.make_error(
        "this process was forked from one that has an open worker; start it with spawn or forkserver, or before the worker "
        "is made",
        errors.Code.FAILED_PRECONDITION,
        "FORKED",
    )


def refuse() -> None:
    """Raises in such a process."""
    if _forked:
        raise error()
