"""Joining a group under torchrun, and any launcher that sets the same variables, without further configuration."""

import contextlib
import datetime
import os
from typing import Any, Dict, Iterator, Optional

import torch.distributed

from syncbn.core import Master, Worker

# How long rank 0 keeps its master for workers that have not left.
_LEAVE_LIMIT = datetime.timedelta(minutes=10)
_joins: Dict[str, int] = {}


class _Board:
    """Where the processes of one launch leave each other notes: the store behind MASTER_ADDR and MASTER_PORT.

    torchrun's agent runs it, and else rank 0's init_process_group does.
    """

    def __init__(self, topic: str, timeout: datetime.timedelta) -> None:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(f"join needs SYNCBN_TARGET, or torchrun's variables: {' and '.join(missing)} are not set")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = getattr(torch.distributed, "TCPStore")  # Which torch's hints do not know.
        self._store = store(host, port, None, False, timeout, wait_for_workers=False)
        self._topic = topic

    def post(self, name: str, text: str = "") -> None:
        self._store.set(f"{self._topic}/{name}", text)

    def read(self, name: str) -> str:
        """Waits for the note, up to the store's timeout."""
        return str(self._store.get(f"{self._topic}/{name}").decode())

    def wait_for(self, name: str, limit: datetime.timedelta) -> None:
        """Waits in slices, so that Ctrl-C is heard; silent if the limit passes."""
        end = datetime.datetime.now() + limit
        while datetime.datetime.now() < end:
            try:
                return self._store.wait([f"{self._topic}/{name}"], datetime.timedelta(seconds=1))
            except RuntimeError as error:
                if "timeout" not in str(error).lower():  # The store itself is gone.
                    return None


def _environment(name: str) -> int:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"join needs torchrun's variables: {name} is not set")
    return int(value)


@contextlib.contextmanager
def join(group: str = "default", target: Optional[str] = None, **options: Any) -> Iterator[Worker]:
    """A worker of this process, and a master if none is named: all that a script under torchrun needs.

        with syncbn.torch.join() as worker:
            model = syncbn.torch.convert_sync_batchnorm(model, worker)
            ...

    With a `target` or SYNCBN_TARGET this is `syncbn.Worker`. Without, rank 0 starts a master on a free port of the
    loopback interface, and the others read its address from the store that torchrun's processes share. It ends when
    every worker has left. A launch over several hosts has to name a master, since one that listens beyond loopback
    needs TLS.

    Args:
      options: the worker's: timeout, join_timeout, min_workers and so on. Rank and world size are the environment's.
    """
    target = target or os.environ.get("SYNCBN_TARGET")
    if target:
        with Worker(target, group, **options) as worker:
            yield worker
        return
    rank, world_size = _environment("RANK"), _environment("WORLD_SIZE")
    if int(os.environ.get("LOCAL_WORLD_SIZE") or world_size) != world_size:
        raise ValueError("the workers are on several hosts: start syncbn-master on one, and set SYNCBN_TARGET for all")
    # One topic for each launch, restart and join, so that no note of an earlier one is read.
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    _joins[group] = _joins.get(group, 0) + 1
    topic = "/".join(["syncbn", *launch, group, str(_joins[group])])
    board = _Board(topic, datetime.timedelta(seconds=options.get("join_timeout", 30.0)))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            master = stack.enter_context(Master(address="127.0.0.1:0"))
            board.post("target", master.target)
        with Worker(board.read("target"), group, **options) as worker:
            yield worker
        board.post(f"left/{rank}")
        if rank == 0:
            for other in range(1, world_size):
                board.wait_for(f"left/{other}", _LEAVE_LIMIT)
