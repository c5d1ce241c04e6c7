"""This process's place in its launch: its rank, the number of processes, and the board that they share."""

import hashlib
import sys
from typing import Any, Callable, NamedTuple, Optional

from syncbn import _boards, _environment
from syncbn._boards import Board

_TOPIC = "syncbn"
_MOST_NAME = 100


def _no_board() -> Optional[Board]:
    return None


class Place(NamedTuple):
    """A rank among `world_size` processes; either is None where the environment has only the other."""

    rank: Optional[int]
    world_size: Optional[int]
    find_board: Callable[[], Optional[Board]] = _no_board
    identity: Any = None
    """The store of the process group that the place was found in; None where it was found in the environment."""
    group: Optional[str] = None
    """A name for these processes, where they are not the whole launch."""


def find() -> Optional[Place]:
    """torch.distributed's place, where it is initialized; else jax.distributed's; else the environment's; else None.

    The frameworks come first: where a program starts processes of its own, the environment may be that of all of them.
    """
    distributed = _boards.torch_distributed()
    if distributed is not None:
        store = _boards.default_store(distributed)
        return Place(
            distributed.get_rank(), distributed.get_world_size(), lambda: _boards.TorchBoard(store, _TOPIC), store
        )
    state = _boards.jax_state()
    if state is not None:
        return Place(
            int(state.process_id), int(state.num_processes), lambda: _boards.JaxBoard(state.client, _TOPIC), state.client
        )
    place = _environment.place()
    if place is None:
        return None
    # Only torch has a client of the store that torchrun runs.
    find_board = (lambda: _boards.launchers_board(_TOPIC)) if "torch.distributed" in sys.modules else _no_board
    return Place(*place, find_board)


def in_process_group(group: Any) -> Place:
    """The place of this process in a process group of torch.distributed's.

    Errors: ValueError where this process is none of its members.
    """
    distributed = _boards.torch_distributed()
    if distributed is None:
        raise ValueError("process_group is given, and torch.distributed is not initialized: call init_process_group first")
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("this process is no member of process_group: make a worker only where it is one")
    module = distributed.distributed_c10d
    known = module._world.pg_group_ranks if hasattr(module, "_world") else module._pg_group_ranks
    members = "ranks " + ",".join(str(member) for member in sorted(known[group]))
    if len(members) > _MOST_NAME:
        members = f"{len(known[group])} ranks {hashlib.sha256(members.encode()).hexdigest()[:32]}"
    store = _boards.default_store(distributed)
    return Place(
        rank, distributed.get_world_size(group), lambda: _boards.TorchBoard(store, f"{_TOPIC}/{members}"), store, members
    )


def is_outdated(identity: Any) -> bool:
    """Returns whether the process group of a place has given way to another. One that has only ended may still be used."""
    if identity is None:
        return False
    distributed = _boards.torch_distributed()
    return distributed is not None and _boards.default_store(distributed) is not identity
