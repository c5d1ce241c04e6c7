"""The master that workers without a target share: rank 0 starts it, and tells the others where it is.

Across hosts, the master speaks TLS with a certificate that is made for it. The others get the certificate from the board of
the launch, so they trust this master as far as they trust the board. Its token goes the same way, so that nobody else who
reaches its port can join, on one host either.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import tempfile
import time
from typing import Any, Dict, Iterable, Optional, Tuple

from syncbn import _boards, _environment, errors
from syncbn._boards import Board
from syncbn._master import Master

_logger = logging.getLogger("syncbn")
# Seconds that rank 0 keeps its master for workers that have not left.
_LEAVE_SECONDS = 600.0
# Seconds that it keeps the master once no worker is connected: a worker whose connection has broken comes back within
# them. On one host, connections break with their processes alone.
_RETURN_SECONDS = 30.0
_RETURN_SECONDS_ON_ONE_HOST = 1.0
_LOOK_SECONDS = 0.2
_ANY_OTHER_HOST = "192.0.2.1"  # Reserved for documentation: no packet is sent there, only the route is looked up.
_told_of_one = False
# The tokens of this process's meetings, by target.
_tokens: Dict[str, str] = {}
_begun = int(time.time())


def token_of(target: Any) -> Optional[str]:
    """The token of a master that another worker of this process has met: a further worker may name it by its target."""
    return _tokens.get(target) if isinstance(target, str) else None


class Meeting:
    """One worker's part of a meeting.

    Attributes: `target`, `trusted_ca_file` and `token`, with which the worker joins the master.
    """

    def __init__(
        self,
        note: Any,
        rank: int = 0,
        world_size: int = 1,
        master: Optional[Master] = None,
        board: Optional[Board] = None,
        topic: str = "",
        token: Optional[str] = None,
    ) -> None:
        self.target: str = note["target"]
        self.token: Optional[str] = note.get("token") or token
        if self.token is not None:
            _tokens[self.target] = self.token
        self.trusted_ca_file: Optional[str] = None
        self._return_seconds = _RETURN_SECONDS if note.get("certificate") else _RETURN_SECONDS_ON_ONE_HOST
        self._rank, self._world_size, self._master, self._board, self._topic = rank, world_size, master, board, topic
        if note.get("certificate"):
            file, self.trusted_ca_file = tempfile.mkstemp(prefix="syncbn-", suffix=".pem")
            with os.fdopen(file, "w") as writer:
                writer.write(note["certificate"])

    def joined(self) -> None:
        """Tells rank 0 that this worker has joined. Silent if the board is gone."""
        if self._board is not None and self._master is None:
            with contextlib.suppress(errors.Error):
                self._board.post(f"{self._topic}/joined/{self._rank}", "")

    def leave(self) -> None:
        """Tells rank 0 that this worker needs the master no more. Silent if the board is gone; twice is harmless."""
        path, self.trusted_ca_file = self.trusted_ca_file, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._board is not None and self._master is None:
            board, self._board = self._board, None
            with contextlib.suppress(errors.Error):
                board.post(f"{self._topic}/left/{self._rank}", "")

    def end(self, wait: bool, lost: Iterable[int] = ()) -> None:
        """Leaves, and at rank 0 ends the master.

        wait: rank 0 first waits until the others have left, except those that are lost.
        """
        self.leave()
        master, self._master = self._master, None
        board, self._board = self._board, None
        if master is None:
            return
        try:
            if wait and board is not None:
                with contextlib.suppress(errors.Error):  # The store is gone, and with it the launch.
                    self._wait_for_others(board, master, frozenset(lost))
        finally:
            master.shutdown(grace=0.0)

    def _wait_for_others(self, board: Board, master: Master, lost: Iterable[int]) -> None:
        """Returns when nobody can need the master any more: each of the others has left, or is lost, or has joined and ended.

        Those that have joined have ended if no worker has been connected for as long as one takes to come back.
        """
        begun = time.monotonic()
        lonely_since: Optional[float] = None
        told = False
        for rank in range(1, self._world_size):
            while rank not in lost and not self._has_said(board, "left", rank, _LOOK_SECONDS):
                now = time.monotonic()
                if master.workers() != 0:
                    lonely_since = None
                elif lonely_since is None:
                    lonely_since = now
                elif now - lonely_since >= self._return_seconds and self._has_said(board, "joined", rank, 0.0):
                    _logger.info("rank %d has ended without leaving its worker", rank)
                    break
                if now - begun >= _LEAVE_SECONDS:
                    _logger.warning("rank %d has not left its worker; rank 0 ends the master", rank)
                    break
                if now - begun >= _boards.TELL_AFTER_SECONDS and not told:
                    told = True
                    _logger.warning("waiting for rank %d to leave its worker since %.0f seconds", rank, now - begun)

    def _has_said(self, board: Board, word: str, rank: int, seconds: float) -> bool:
        return board.read(f"{self._topic}/{word}/{rank}", seconds, f"rank {rank} to leave its worker") is not None


def alone(token: Optional[str]) -> Meeting:
    """A group of one worker, with a master of its own."""
    global _told_of_one
    if not _told_of_one:
        _told_of_one = True
        _logger.warning(
            "SYNCBN_TARGET is not set and there is one worker: it is a group by itself, and normalizes over its own batches"
        )
    drawn = token or _draw_token()
    master = Master(token=drawn, http_token=_http_token(token))
    return Meeting({"target": master.target}, master=master, token=drawn)


def meet(board: Board, group: str, rank: int, world_size: int, seconds: float, token: Optional[str]) -> Meeting:
    """Starts the master at rank 0, and finds it at any other rank.

    Every rank comes to the n-th meeting of a group with its n-th call; a call that has failed does not count.

    Args:
      seconds: how long the others wait for rank 0.
      token: that of the user. The board does not get it: the others have it too. None: rank 0 draws one for the board.
    Errors: UNAVAILABLE where rank 0 does not come, cannot start a master, or has ended.
    """
    counter = f"{group}/meetings of rank {rank}"
    topic = f"{group}/{board.count(counter)}"
    if rank == 0:
        master, note = _start(board, topic, world_size, token)
        return Meeting(note, rank, world_size, master, board, topic, token)
    found = None
    try:
        found = _read(board, f"{topic}/master", group, rank, seconds, "which starts the master")
    finally:
        if found is None:
            with contextlib.suppress(errors.Error):
                board.count(counter, -1)
    note = json.loads(found)
    if "error" in note:
        raise errors.make_error(f"rank 0 could not start the master: {note['error']}", errors.Code.UNAVAILABLE)
    return Meeting(note, rank, world_size, None, board, topic, token)


def agree_on_restart(board: Board, group: str, rank: int, seconds: float) -> int:
    """A number of this attempt of an elastic launch, the same at all ranks and greater than those of attempts before.

    It is rank 0's start, in seconds since 1970: the agents of a launch have no count in common, and one that replaces another
    starts from 0. It has 32 bits until 2106.

    Errors: UNAVAILABLE where rank 0 has not come within `seconds`.
    """
    name = f"{group}/restart"
    if rank == 0:
        board.post(name, str(_begun))
        return _begun
    return int(_read(board, name, group, rank, seconds, "which numbers the restart"))


def _read(board: Board, name: str, group: str, rank: int, seconds: float, purpose: str) -> str:
    """Rank 0's note. Errors: UNAVAILABLE where it is not there within `seconds`."""
    found = board.read(name, seconds, f"rank 0, {purpose} for all")
    if found is not None:
        return found
    advice = ""
    if _environment.agents_share_a_store():
        advice = (
            "; torchrun's agents count their restarts each for itself, and keep one store for all: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )
    raise errors.make_error(
        f"rank {rank} has waited {seconds:g} seconds for rank 0, {purpose}, and rank 0 has not made its worker of group "
        f"{group!r}{advice}",
        errors.Code.UNAVAILABLE,
    )


def _draw_token() -> str:
    return secrets.token_urlsafe(32)


def _http_token(token: Optional[str]) -> Optional[str]:
    """Nobody knows a token that was drawn: then readers of the status page, where it is asked for, need none."""
    return None if token else os.environ.get("SYNCBN_INSPECTION_TOKEN") or ""


def _start(board: Board, topic: str, world_size: int, token: Optional[str]) -> Tuple[Master, Any]:
    """Starts the master, and posts how to reach it, or why it could not be started."""
    drawn = {} if token else {"token": _draw_token()}
    try:
        master, note = _start_master(world_size, token or drawn["token"], _http_token(token))
        note.update(drawn)
    except BaseException as error:
        with contextlib.suppress(errors.Error):
            board.post(f"{topic}/master", json.dumps({"error": str(error) or type(error).__name__}))
        raise
    try:
        board.post(f"{topic}/master", json.dumps(note))
    except BaseException:
        master.shutdown(grace=0.0)
        raise
    return master, note


def _start_master(world_size: int, token: str, http_token: Optional[str]) -> Tuple[Master, Any]:
    host, port = _address(world_size)
    if host is None:
        master = Master(token=token, http_token=http_token)
        return master, {"target": master.target}
    shown = f"[{host}]" if ":" in host else host
    master = Master(f"{shown}:{port}", auto_tls=True, token=token, http_token=http_token)
    _logger.info("rank 0 has started a master with TLS at %s", master.target)
    return master, {"target": master.target, "certificate": master.certificate}


def _address(world_size: int) -> Tuple[Optional[str], int]:
    """(host, port) for the master to listen at; host None: the loopback interface, without TLS, since all are here."""
    given = _environment.text("SYNCBN_ADDRESS")
    if given is not None:
        host, _, port = given.rpartition(":")
        if not host or not port.isdigit():
            raise errors.make_error(
                f"SYNCBN_ADDRESS is {given!r}; it is HOST:PORT, where port 0 is any free one", errors.Code.INVALID_ARGUMENT
            )
        return host.strip("[]"), int(port)
    if _environment.is_one_host(world_size):
        return None, 0
    for destination in (_environment.text("MASTER_ADDR"), _ANY_OTHER_HOST):
        source = _source_address(destination) if destination else None
        if source is not None and "%" not in source and not _environment.is_loopback(source):  # No certificate names a scope.
            return source, 0
    return None, 0  # This host has no network, so there is no other one.


def _source_address(destination: str) -> Optional[str]:
    """The address of this host from which it reaches another one; None if it has no route."""
    try:
        found = socket.getaddrinfo(destination, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as route:
            route.connect(address)  # A datagram socket: this sends nothing.
            return str(route.getsockname()[0])
    return None
