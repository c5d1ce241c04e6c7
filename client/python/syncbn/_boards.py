"""Boards: key-value stores that every process of a launch reaches, on which they leave each other notes.

A framework that has connected the processes of a launch has such a store: torch.distributed, behind its process group or
at MASTER_ADDR and MASTER_PORT; JAX, in its coordination service. Neither framework is imported here.
"""

import datetime
import logging
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, Optional

from syncbn import _environment, errors

_logger = logging.getLogger("syncbn")
# The time that a wait stays inside a store before the interpreter may look at signals (Ctrl-C).
_SLICE_SECONDS = 1.0
_CHECK_SECONDS = 0.02
TELL_AFTER_SECONDS = 10.0


class Gone(errors.Unavailable):
    """The store cannot be reached any more: the process that runs it has ended."""

    def __init__(self, message: str, code: int = errors.Code.UNAVAILABLE, *rest: Any) -> None:
        super().__init__(message, code, *rest)


class Board:
    """Notes by name. Thread safety: as the store's, which any thread may use.

    `identity` tells whether two boards are of one process group.
    """

    identity: Any

    def post(self, name: str, note: str) -> None:
        """Leaves a note. Errors: `Gone`."""
        raise NotImplementedError

    def count(self, name: str, step: int = 1) -> int:
        """Adds to a number that starts at 0, and returns it. Errors: `Gone`."""
        raise NotImplementedError

    def _look(self, name: str, seconds: float) -> Optional[str]:
        """The note; None if nobody has left it within `seconds`."""
        raise NotImplementedError

    def read(self, name: str, seconds: float, waiting_for: str) -> Optional[str]:
        """Waits for a note, and logs a warning if that takes long.

        Returns: the note; None if it is not there after `seconds`. Errors: `Gone`.
        """
        begun = time.monotonic()
        told = False
        while True:
            waited = time.monotonic() - begun
            note = self._look(name, max(0.01, min(_SLICE_SECONDS, seconds - waited)))
            if note is not None or waited >= seconds:
                return note
            if waited >= TELL_AFTER_SECONDS and not told:
                told = True
                _logger.warning("waiting for %s since %.0f seconds", waiting_for, waited)


class TorchBoard(Board):
    """A store of torch.distributed's, of any kind."""

    def __init__(self, store: Any, topic: str) -> None:
        self.identity = self._store = store
        # torchrun's store outlives a restart of the processes, and keeps the notes of those that have ended.
        launch = [_environment.text("TORCHELASTIC_RUN_ID"), _environment.attempt()]
        self._topic = "/".join([topic, *filter(None, launch)])

    def _key(self, name: str) -> str:
        return f"{self._topic}/{name}"

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise Gone(f"torch.distributed's store has failed, whose process may have ended: {error}") from error

    def post(self, name: str, note: str) -> None:
        self._call(self._store.set, self._key(name), note)

    def count(self, name: str, step: int = 1) -> int:
        return int(self._call(self._store.add, self._key(name), step))

    def _look(self, name: str, seconds: float) -> Optional[str]:
        key = self._key(name)
        there = self._check(key, seconds) if hasattr(self._store, "check") else self._wait(key, seconds)
        return str(self._call(self._store.get, key).decode()) if there else None

    def _check(self, key: str, seconds: float) -> bool:
        """Asks again and again: the store's own wait prints lines to stderr whenever its time is over."""
        deadline = time.monotonic() + seconds
        while not self._call(self._store.check, [key]):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_CHECK_SECONDS, left))
        return True

    def _wait(self, key: str, seconds: float) -> bool:
        """In torch before version 2, whose stores do not say whether a key is there."""
        try:
            self._store.wait([key], datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            # torch has no class of its own for this before version 2.
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                return False
            raise Gone(f"torch.distributed's store has failed, whose process may have ended: {error}") from error
        return True


class JaxBoard(Board):
    """The key-value store of jax.distributed's coordination service."""

    # Processes of JAX begin and end together, so each counts for itself.
    _counts: Dict[str, int] = {}
    _lock = threading.Lock()

    def __init__(self, client: Any, topic: str) -> None:
        self.identity = self._client = client
        self._topic = topic

    def post(self, name: str, note: str) -> None:
        try:
            self._client.key_value_set(f"{self._topic}/{name}", note)
        except RuntimeError as error:
            raise Gone(f"jax.distributed's store has failed: {error}") from error

    def count(self, name: str, step: int = 1) -> int:
        with self._lock:
            key = f"{self._topic}/{name}"
            self._counts[key] = self._counts.get(key, 0) + step
            return self._counts[key]

    def _look(self, name: str, seconds: float) -> Optional[str]:
        try:
            return str(self._client.blocking_key_value_get(f"{self._topic}/{name}", int(seconds * 1000)))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise Gone(f"jax.distributed's store has failed: {error}") from error


def torch_distributed() -> Optional[Any]:
    """The module torch.distributed, if the program has imported it and has a process group; else None."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def default_store(module: Any) -> Any:
    """The store behind torch.distributed's default process group."""
    return module.distributed_c10d._get_default_store()


def jax_state() -> Optional[Any]:
    """The state of jax.distributed, if it is initialized; else None."""
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    return state if getattr(state, "client", None) is not None else None


def launchers_board(topic: str) -> Optional[Board]:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun's agent runs, or else rank 0's init_process_group.

    Returns: None where the variables are not set. Errors: FAILED_PRECONDITION, at once, where nobody runs the store.
    """
    host, port = _environment.text("MASTER_ADDR"), _environment.integer("MASTER_PORT", 1, 65535)
    if host is None or port is None:
        return None
    try:
        # torch's own client would try for as long as its timeout.
        socket.create_connection((host, port), 30.0).close()
    except OSError as error:
        raise errors.make_error(
            f"nobody runs a store at MASTER_ADDR:MASTER_PORT, {host}:{port} ({error}): call "
            "torch.distributed.init_process_group first, start the script with torchrun, or set SYNCBN_TARGET to a master's "
            "address",
            errors.Code.FAILED_PRECONDITION,
        ) from None
    store: Any = getattr(sys.modules["torch.distributed"], "TCPStore")  # Unknown to torch's type hints.
    connected = store(host, port, None, False, datetime.timedelta(seconds=30), wait_for_workers=False)
    return TorchBoard(connected, topic)
