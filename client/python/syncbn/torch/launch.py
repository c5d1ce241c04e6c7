"""Joining a group under torchrun, and any launcher that sets the same variables, without further configuration."""

import contextlib
import datetime
import os
import socket
from typing import Any, Dict, Iterator, Optional, Tuple

import torch.distributed

from syncbn import _environment, errors
from syncbn.core import Master, Worker

# How long rank 0 keeps its master for workers that have not left.
_LEAVE_LIMIT = datetime.timedelta(minutes=10)
_DEFAULT_TIMEOUT = 30.0
_joins: Dict[str, int] = {}


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Board:
    """Where the processes of one launch leave each other notes: the store behind MASTER_ADDR and MASTER_PORT.

    torchrun's agent runs it, and else rank 0's init_process_group does.
    """

    def __init__(self, topic: str, timeout: datetime.timedelta) -> None:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(f"join needs SYNCBN_TARGET, or torchrun's variables: {' and '.join(missing)} are not set")
        host, port = os.environ["MASTER_ADDR"], _environment.integer("MASTER_PORT", 1, 65535)
        self._probe(host, port or 0, timeout.total_seconds())
        store: Any = getattr(torch.distributed, "TCPStore")  # Which torch's hints do not know.
        self._store = store(host, port, None, False, timeout, wait_for_workers=False)
        self._topic = topic

    @staticmethod
    def _probe(host: str, port: int, timeout: float) -> None:
        """Raises at once where nobody runs the store: torch's own client would try for as long as the timeout."""
        try:
            socket.create_connection((host, port), timeout).close()
        except OSError as error:
            advice = (
                "the process group was made otherwise, so set SYNCBN_TARGET to a master's address"
                if _initialized()
                else "call torch.distributed.init_process_group first, start the script with torchrun, or set SYNCBN_TARGET to a "
                "master's address"
            )
            raise errors.make_error(
                f"join finds no store at MASTER_ADDR:MASTER_PORT, {host}:{port} ({error}): {advice}",
                errors.Code.FAILED_PRECONDITION,
            ) from None

    def post(self, name: str, text: str = "") -> None:
        self._store.set(f"{self._topic}/{name}", text)

    def read(self, name: str) -> str:
        """Waits for the note, up to the store's timeout."""
        try:
            return str(self._store.get(f"{self._topic}/{name}").decode())
        except RuntimeError as error:
            raise errors.make_error(
                f"join waited for rank 0, which starts the master, and it did not come to its join of this group ({error})",
                errors.Code.UNAVAILABLE,
            ) from error

    def wait_for(self, name: str, limit: datetime.timedelta) -> None:
        """Waits in slices, so that Ctrl-C is heard; silent if the limit passes."""
        end = datetime.datetime.now() + limit
        while datetime.datetime.now() < end:
            try:
                return self._store.wait([f"{self._topic}/{name}"], datetime.timedelta(seconds=1))
            except RuntimeError as error:
                if "timeout" not in str(error).lower():  # The store itself is gone.
                    return None


def _place(rank: Optional[int], world_size: Optional[int]) -> Tuple[int, int]:
    """(rank, world size): what is given, else the environment's, else the process group's."""
    rank = _environment.integer("RANK", 0, 2**32 - 1) if rank is None else rank
    world_size = _environment.integer("WORLD_SIZE", 1, 2**32 - 1) if world_size is None else world_size
    if rank is None or world_size is None:
        if _initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        raise ValueError(
            f"join needs torchrun's variables: {'RANK' if rank is None else 'WORLD_SIZE'} is not set. Start the script with "
            "torchrun, or call torch.distributed.init_process_group first; a process by itself needs syncbn.Worker() alone"
        )
    return rank, world_size


@contextlib.contextmanager
def join(group: Optional[str] = None, target: Optional[Any] = None, **options: Any) -> Iterator[Worker]:
    """A worker of this process, and a master if none is named: all that a script under torchrun needs.

        with syncbn.torch.join() as worker:
            model = syncbn.torch.convert_sync_batchnorm(model, worker)
            ...

    With a `target` or SYNCBN_TARGET this is `syncbn.Worker`. Without, rank 0 starts a master on a free port of the
    loopback interface, and the others read its address from the store that torchrun's processes share. It ends when
    every worker has left. A launch over several hosts has to name a master, since one that listens beyond loopback
    needs TLS.

    Args:
      options: the worker's: timeout, join_timeout, min_workers and so on. Rank and world size are by default the
        environment's, and without a target else those of torch.distributed's process group.

    Errors: ValueError and `syncbn.FailedPrecondition`, at once, where there is no launcher and no process group.
    """
    target = target or os.environ.get("SYNCBN_TARGET")
    if target:
        with Worker(target, group, **options) as worker:
            yield worker
        return
    rank, world_size = _place(options.pop("rank", None), options.pop("world_size", None))
    if (_environment.integer("LOCAL_WORLD_SIZE", 1, 2**32 - 1) or world_size) != world_size:
        raise ValueError("the workers are on several hosts: start syncbn-master on one, and set SYNCBN_TARGET for all")
    with contextlib.ExitStack() as stack:
        if world_size == 1:
            master = stack.enter_context(Master())
            yield stack.enter_context(Worker(master.target, group, rank, world_size, **options))
            return
        board = _Board(_topic(group or "default"), datetime.timedelta(seconds=options.get("join_timeout") or _DEFAULT_TIMEOUT))
        if rank == 0:
            master = stack.enter_context(Master())
            board.post("target", master.target)
        with Worker(board.read("target"), group, rank, world_size, **options) as worker:
            yield worker
        board.post(f"left/{rank}")
        if rank == 0:
            for other in range(1, world_size):
                board.wait_for(f"left/{other}", _LEAVE_LIMIT)


def _topic(group: str) -> str:
    """One for each launch, restart and join, so that no note of an earlier one is read."""
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    _joins[group] = _joins.get(group, 0) + 1
    return "/".join(["syncbn", *launch, group, str(_joins[group])])
