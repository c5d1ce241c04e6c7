"""What the launcher's and the user's environment variables say."""

import os
import re
import socket
import sys
from typing import Optional

from syncbn import _arguments

_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1|\[::1\]")


def text(name: str) -> Optional[str]:
    """None if it is not set, or empty."""
    return os.environ.get(name) or None


def integer(name: str, least: int, most: int) -> Optional[int]:
    value = text(name)
    if value is None:
        return None
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        raise _arguments.refused(f"{name} is {value!r} in the environment; it has to be an integer")
    return _arguments.integer(f"{name} in the environment", int(value), least, most)


def seconds(name: str, *, zero: bool = True) -> Optional[float]:
    value = text(name)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        raise _arguments.refused(f"{name} is {value!r} in the environment; it has to be a number of seconds") from None
    return _arguments.seconds(f"{name}={value} in the environment", number, zero=zero)


def flag(name: str) -> bool:
    value = (text(name) or "0").lower()
    if value not in ("0", "1", "false", "true"):
        raise _arguments.refused(f"{name} is {value!r} in the environment; it is 0, 1, false or true")
    return value in ("1", "true")


def job() -> str:
    """A name that every process of one launch finds, and no other launch."""
    run = text("TORCHELASTIC_RUN_ID")
    if run == "none":  # As torchrun calls every launch without --rdzv-id.
        run = None
    found = text("SYNCBN_JOB") or run or text("SLURM_JOB_ID") or text("RAY_JOB_ID")
    if found:
        return found
    address, port = text("MASTER_ADDR"), text("MASTER_PORT")
    if address is None or port is None:
        return "default"
    if _LOOPBACK.fullmatch(address):  # The same words on every host, whose processes then are all here.
        address = socket.gethostname()
    return f"{address}:{port}"


def generation() -> int:
    """Which restart of the whole launch this is: a later one has a greater number."""
    given = integer("SYNCBN_GENERATION", 0, 2**64 - 1)
    if given is not None:
        return given
    # A requeued job of Slurm's counts its launcher's restarts from 0 again.
    requeues = integer("SLURM_RESTART_COUNT", 0, 2**31 - 1) or 0
    return (requeues << 32) + (integer("TORCHELASTIC_RESTART_COUNT", 0, 2**32 - 1) or 0)


def other_processes() -> Optional[str]:
    """What says that this process is one of several, though WORLD_SIZE does not; None: nothing does.

    Frameworks are asked only if the program has imported them.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = text(name)
        if value is not None and value.strip().isdigit() and int(value) > 1:
            return f"{name} is {value.strip()}"
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            return f"torch.distributed has {size} processes"
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    size = getattr(state, "num_processes", None) or 1
    return f"jax.distributed has {size} processes" if size > 1 else None
