"""Failures, as exceptions.

Every failure that the library reports is a `syncbn.Error`. Those that the protocol lists (PROTOCOL.md, section 9) have the
subclass of their code; reasons that programs treat apart from their code have a class of their own below it. A code of
another kind, such as INTERNAL or UNIMPLEMENTED, is an `Error` itself.
"""

import enum
from typing import Dict, Sequence, Tuple, Type


class Code(enum.IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Error(RuntimeError):
    """A call or a round that failed.

    Attributes:
      code: gRPC's code.
      reason: one of the reasons that the protocol lists ("WORKER_LOST"), or "" where the error is not the service's
        own.
      layer: the layer concerned, or "".
      ranks: the ranks to blame, ascending.
      message: the text for people.
    """

    def __init__(
        self, message: str, code: int = Code.UNKNOWN, reason: str = "", layer: str = "", ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(message, code, reason, layer, tuple(ranks))
        self.message = message
        self.code = Code(code) if code in Code._value2member_map_ else Code.UNKNOWN
        self.reason = reason
        self.layer = layer
        self.ranks: Tuple[int, ...] = tuple(int(rank) for rank in ranks)

    def add_note_to_message(self, note: str) -> None:
        """Says more, for people; once."""
        if note not in self.message:
            self.message = f"{self.message}; {note}"
            self.args = (self.message, *self.args[1:])

    def __str__(self) -> str:
        return f"{self.code.name}{f' ({self.reason})' if self.reason else ''}: {self.message}"


class Cancelled(Error):
    """The wait was interrupted (`Worker.interrupt`), or the group ended."""


class InvalidArgument(Error, ValueError):
    """An argument or a contribution that no state of the service would accept."""


class NotFinite(InvalidArgument):
    """NaN, infinity, or a value too large to be merged; the message names rank and channel."""


class DeadlineExceeded(Error, TimeoutError):
    """A round's deadline passed; `ranks` did not contribute."""


class Unavailable(Error, ConnectionError):
    """The master cannot be reached, or is going away."""


class WorkerLost(Unavailable):
    """The workers of `ranks` are gone."""


class Aborted(Error):
    """The service ended the call or the round: see `reason`."""


class Deadlock(Aborted):
    """Every member waits, and for different rounds; the message says who waits for what."""


class Fenced(Aborted):
    """Another worker has taken this one's rank."""


class FailedPrecondition(Error):
    """Not possible in this state: see `reason`."""


class LayerMismatch(FailedPrecondition):
    """The workers disagree about a layer, or about the set of layers."""


class ResourceExhausted(Error):
    """A limit of the master, which the message names."""


class AlreadyExists(Error):
    """An object that the call would make exists: see `reason`, which is "PAYLOAD_CHANGED" for a sequence that has been used."""


class RankTaken(AlreadyExists):
    """Another worker, which is alive, has this one's rank; the message names its host and process."""


class Unauthenticated(Error):
    """The certificates of the two sides do not fit, or the token is not the job's (`reason` "TOKEN_MISMATCH")."""


class PermissionDenied(Error):
    """This worker's certificate does not stand for this job and rank; the message names both."""


_BY_REASON: Dict[str, Type[Error]] = {
    "WORKER_LOST": WorkerLost,
    "DEADLOCK": Deadlock,
    "FENCED": Fenced,
    "LAYER_SPEC_MISMATCH": LayerMismatch,
    "LAYER_SET_MISMATCH": LayerMismatch,
    "NOT_FINITE": NotFinite,
    "RANK_TAKEN": RankTaken,
}

_BY_CODE: Dict[int, Type[Error]] = {
    Code.CANCELLED: Cancelled,
    Code.INVALID_ARGUMENT: InvalidArgument,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.PERMISSION_DENIED: PermissionDenied,
    Code.RESOURCE_EXHAUSTED: ResourceExhausted,
    Code.FAILED_PRECONDITION: FailedPrecondition,
    Code.ABORTED: Aborted,
    Code.UNAVAILABLE: Unavailable,
    Code.UNAUTHENTICATED: Unauthenticated,
}


def make_error(message: str, code: int, reason: str = "", layer: str = "", ranks: Sequence[int] = ()) -> Error:
    """The exception that suits `reason`, else `code`."""
    cls = _BY_REASON.get(reason) or _BY_CODE.get(code, Error)
    return cls(message, code, reason, layer, ranks)
