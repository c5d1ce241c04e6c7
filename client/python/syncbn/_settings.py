"""The settings of a worker: arguments, and the environment and the launch for those that are absent."""

import ctypes
import logging
from typing import Any, Callable, Optional, Sequence, Union

from syncbn import _arguments, _boards, _environment, _library, _meeting, _places, _variables, errors
from syncbn._library import text
from syncbn._places import Place
from syncbn._rounds import nanoseconds

_logger = logging.getLogger("syncbn")
# Seconds after which a round that lacks a worker fails: as long as a checkpoint or a validation may take.
DEFAULT_TIMEOUT = 600.0
DEFAULT_JOIN_TIMEOUT = 30.0
_MISSING_POLICIES = {
    "fail": _library.MISSING_FAIL,
    "wait": _library.MISSING_WAIT,
    "proceed": _library.MISSING_PROCEED,
}


class Missing(errors.InvalidArgument):
    """A setting that is needed is neither an argument nor in the environment, and no launch tells it."""

    def __init__(self, message: str, code: int = errors.Code.INVALID_ARGUMENT, *rest: Any) -> None:
        super().__init__(message, code, *rest)


def _first(given: Any, otherwise: Any, default: Any = None) -> Any:
    """The argument, else what the environment says (asked only then), else the default."""
    if given is not None:
        return given
    found = otherwise()
    return default if found is None else found


def _place(rank: Any, world_size: Any, has_target: bool, found: Optional[Place]) -> Place:
    """The arguments, and for those that are absent the place in the launch. Its rank and world size are not None."""
    if rank is not None:
        rank = _arguments.integer("rank", rank, 0, _arguments.MOST_UINT32)
    if world_size is not None:
        world_size = _arguments.integer("world_size", world_size, 1, _arguments.MOST_UINT32)
    if found is None and (rank is None or world_size is None):
        found = _places.find()
    said = "WORLD_SIZE and SYNCBN_TARGET are not set"
    if found is not None:
        # A launcher that was started by another one has the variables of both; so has one in a shell that exports some.
        said = _environment.alone() or "" if found.identity is None and found.world_size == 1 else ""
    if said and rank is None and world_size is None and not has_target:
        others = _environment.other_processes()
        if others is not None:
            raise Missing(
                f"this process is one of several ({others}), and {said}: pass target, rank and world_size, or set "
                "SYNCBN_TARGET, RANK and WORLD_SIZE in the environment"
            )
        if found is None:
            rank, world_size = 0, 1
    if found is not None:
        rank, world_size = _first(rank, lambda: found.rank), _first(world_size, lambda: found.world_size)
    if rank is None and world_size == 1:
        rank = 0
    if rank is None or world_size is None:
        missing = [name for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)) if value is None]
        absent = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        raise Missing(
            f"Worker needs rank and world_size, and in the environment {absent}: pass them, call "
            "torch.distributed.init_process_group first, or start the program with a launcher such as torchrun"
        )
    if rank >= world_size:
        raise _arguments.refused(f"rank is {rank}; in a world of {world_size} it lies in 0 .. {world_size - 1}")
    if found is None and not has_target and world_size > 1:
        found = _places.find()
    if found is None or (found.rank, found.world_size) != (rank, world_size):  # No board for ranks of another numbering.
        return Place(rank, world_size)
    return found


def targets(given: Any) -> str:
    """One address, or several, as the library takes them: separated by commas."""
    if isinstance(given, str):
        return _arguments.text("target", given, 65536)
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise TypeError(
            f"target is {given!r}, of type {type(given).__name__}; it has to be a string, a list of strings or a function"
        )
    if not given:
        raise _arguments.refused("target is an empty list")
    for one in given:
        if "," in _arguments.text("a target", one, 4096):
            raise _arguments.refused(f"a target is {one!r}; in a list each stands by itself, without a comma")
    return ",".join(given)


def finder(target: Callable[[], Any]) -> Any:
    """`target` as the library calls it, at each attempt to connect."""

    def find(buffer: Any, size: int, _: Any) -> int:
        try:
            found = targets(target()).encode() + b"\0"
            if len(found) > size:
                raise _arguments.refused(f"the target has {len(found) - 1} bytes; it has at most {size - 1}")
        except Exception as error:
            _logger.warning("the worker's target function failed, and is asked again: %s: %s", type(error).__name__, error)
            return int(errors.Code.UNAVAILABLE)
        ctypes.memmove(buffer, found, len(found))
        return 0

    return _library.TARGET_FUNCTION(find)


class Settings:
    """Checked settings. `target` is None until `meet` where neither an argument nor the environment names one."""

    def __init__(
        self,
        *,
        target: Any,
        group: Any,
        rank: Any,
        world_size: Any,
        timeout: Any,
        job: Any,
        generation: Any,
        join_timeout: Any,
        rejoin_grace: Any,
        min_workers: Any,
        on_worker_lost: Any,
        description: Any,
        trusted_ca_file: Any,
        cert_file: Any,
        key_file: Any,
        token: Any,
        stream_ordered: Any,
        place: Optional[Place] = None,
    ) -> None:
        _variables.warn_of_misspelled()
        if place is None or target:  # A worker of a process group is of the group's own master, unless one is named.
            target = _first(target or None, lambda: _environment.text("SYNCBN_TARGET"))
        self.target: Union[str, Callable[[], Any], None] = target if target is None or callable(target) else targets(target)
        self.place = _place(rank, world_size, self.target is not None, place)
        self.rank, self.world_size = self.place.rank or 0, self.place.world_size or 1
        self.job = _arguments.text("job", _first(job, _environment.job))
        self.group = _arguments.text("group", _first(group, lambda: _environment.text("SYNCBN_GROUP"), "default"))
        self.generation = _arguments.integer("generation", _first(generation, _environment.generation), 0, 2**64 - 1)
        self._is_elastic = generation is None and _environment.is_elastic()
        self.timeout = _seconds("timeout", timeout, DEFAULT_TIMEOUT, zero=False) or DEFAULT_TIMEOUT
        self.join_timeout = _seconds("join_timeout", join_timeout, DEFAULT_JOIN_TIMEOUT, zero=False)
        self.rejoin_grace = _seconds("rejoin_grace", rejoin_grace, None)
        workers = _first(min_workers, lambda: _environment.integer("SYNCBN_MIN_WORKERS", 1, self.world_size))
        self.min_workers = None if workers is None else _arguments.integer("min_workers", workers, 1, self.world_size)
        described = _first(description, lambda: _environment.text("SYNCBN_DESCRIPTION"))
        most = _arguments.MOST_DESCRIPTION_BYTES
        self.on_worker_lost = _on_worker_lost(on_worker_lost, self.min_workers)
        self.description = None if described is None else _arguments.text("description", described, most, empty=True)
        self.trusted_ca_file = _file("trusted_ca_file", trusted_ca_file)
        self.cert_file = _file("cert_file", cert_file)
        self.key_file = _file("key_file", key_file)
        found = _first(token, lambda: _environment.text("SYNCBN_TOKEN"), _meeting.token_of(self.target))
        self.token = _arguments.token(found)
        ordered = _first(stream_ordered, lambda: _environment.flag("SYNCBN_STREAM_ORDERED"))
        self.stream_ordered = _arguments.truth("stream_ordered", ordered)

    def agree(self) -> None:
        """Sets `generation` to one that all processes of an elastic launch have, and no attempt before.

        The variables serve where there is no process group, or where its store has notes of attempts before.

        Errors: as `_meeting.agree_on_restart`.
        """
        if self._is_elastic and self.world_size > 1 and not _environment.agents_share_a_store():
            board = self.place.find_board() if self.place.identity is not None else None
            if isinstance(board, _boards.TorchBoard):
                restart = _meeting.agree_on_restart(board, self.group, self.rank, self.timeout)
                self.generation = _environment.generation_of(restart)

    def meet(self) -> _meeting.Meeting:
        """Finds a master where no target is named, or starts it, and sets `target` and the files for TLS to reach it.

        Errors: `Missing` where there are several workers without a board; else as `_meeting.meet`.
        """
        if self.world_size == 1:
            meeting = _meeting.alone(self.token)
        else:
            board = self.place.find_board()
            if board is None:
                raise Missing(
                    f"Worker needs a target where there are {self.world_size} workers: pass the master's address, or set "
                    "SYNCBN_TARGET in the environment (syncbn-master prints it). Without a target, workers find one another by "
                    "torch.distributed or jax.distributed, once they are initialized, or by a store at MASTER_ADDR and "
                    "MASTER_PORT, and there is none"
                )
            meeting = _meeting.meet(board, self.group, self.rank, self.world_size, self.timeout, self.token)
        self.target, self.trusted_ca_file, self.token = meeting.target, meeting.trusted_ca_file, meeting.token
        self.cert_file = self.key_file = None  # These are for a master that the user has named.
        return meeting

    def options(self) -> _library.WorkerOptions:
        """The options for the library, with a target. They keep alive what they point to."""
        target = self.target
        grace = self.rejoin_grace
        return _library.WorkerOptions(
            target=None if callable(target) else text(target),
            job=text(self.job),
            group=text(self.group),
            rank=self.rank,
            world_size=self.world_size,
            generation=self.generation,
            round_timeout_ns=nanoseconds(self.timeout),
            join_timeout_ns=nanoseconds(self.join_timeout or DEFAULT_JOIN_TIMEOUT),
            rejoin_grace_ns=0 if grace is None else nanoseconds(grace) or -1,
            missing_policy=_MISSING_POLICIES[self.on_worker_lost],
            min_workers=self.min_workers or 0,
            description=text(self.description),
            trusted_ca_file=text(self.trusted_ca_file),
            cert_file=text(self.cert_file),
            key_file=text(self.key_file),
            token=text(self.token),
            find_target=finder(target) if callable(target) else _library.TARGET_FUNCTION(),
        )


def _seconds(name: str, given: Any, default: Optional[float], *, zero: bool = True) -> Optional[float]:
    if given is not None:
        return _arguments.seconds(name, given, zero=zero)
    found = _environment.seconds(f"SYNCBN_{name.upper()}", zero=zero)
    return default if found is None else found


def _on_worker_lost(given: Any, min_workers: Optional[int]) -> str:
    """The end of rounds that lack a lost worker: "fail", "wait" or "proceed", which min_workers stands for."""
    proceeds = min_workers is not None
    found = _first(given, lambda: _environment.text("SYNCBN_ON_WORKER_LOST"), "proceed" if proceeds else "fail")
    if found not in _MISSING_POLICIES:
        raise _arguments.refused(f'on_worker_lost is {found!r}; it is "fail", "wait" or "proceed"')
    if proceeds != (found == "proceed"):
        raise _arguments.refused(
            f"on_worker_lost is {found!r} and min_workers {min_workers}: rounds proceed without lost workers with min_workers, "
            "and only with it"
        )
    return str(found)


def _file(name: str, given: Any) -> Optional[str]:
    found = _first(given, lambda: _environment.text(f"SYNCBN_CLIENT_{name.upper()}"))
    return _arguments.path(name, found)
