"""Environment variables of the user's and of launchers."""

import os
import re
import socket
import sys
from typing import Any, List, Optional, Tuple

from syncbn import _arguments

TRUTHS = "1 or 0, true or false, on or off, yes or no"
_TRUTHS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1|\[::1\]")


def text(name: str) -> Optional[str]:
    """The variable's value; None if it is not set, or empty."""
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


def truth(value: str) -> Optional[bool]:
    """What a switch is set to by text, of a flag or of a variable, in any case of letters; None if that is no word for it."""
    return _TRUTHS.get(value.lower())


def flag(name: str) -> bool:
    """The switch that a variable sets; False if it is not set. Errors: INVALID_ARGUMENT for any other text."""
    value = text(name)
    found = False if value is None else truth(value)
    if found is None:
        raise _arguments.refused(f"{name} is {value!r} in the environment; it is {TRUTHS}")
    return found


def job() -> str:
    """The name of this launch: the same in all of its processes, and in no other launch."""
    run = text("TORCHELASTIC_RUN_ID")
    if run == "none":  # torchrun's word for every launch without --rdzv-id.
        run = None
    found = text("SYNCBN_JOB") or run or text("SLURM_JOB_ID") or ray_job()
    if found:
        return found
    address, port = text("MASTER_ADDR"), text("MASTER_PORT")
    if address is None or port is None:
        return "default"
    if is_loopback(address):  # All processes are on this host, and another host may have the same address.
        address = socket.gethostname()
    return f"{address}:{port}"


def ray_job() -> Optional[str]:
    """The id of the Ray job that this process works for; None if Ray does not run it.

    Ray is asked, if the program has imported it: its variable is missing in the driver, and is the id of no job in a
    process that Ray has started in advance.
    """
    ray: Any = sys.modules.get("ray")
    if callable(getattr(ray, "is_initialized", None)) and ray.is_initialized():
        return str(ray.get_runtime_context().get_job_id())
    found = text("RAY_JOB_ID")
    return None if found is None or set(found) == {"f"} else found


def generation() -> int:
    """The number of this restart of the whole launch, by this process's variables; a later restart has a greater number."""
    given = integer("SYNCBN_GENERATION", 0, 2**64 - 1)
    return given if given is not None else generation_of(integer("TORCHELASTIC_RESTART_COUNT", 0, 2**32 - 1) or 0)


def generation_of(restart: int) -> int:
    """The generation of a restart, of number 0 .. 2**32 - 1, by the launcher that Slurm has started."""
    # The launcher within a job that Slurm requeues counts its restarts from 0 again.
    return ((integer("SLURM_RESTART_COUNT", 0, 2**31 - 1) or 0) << 32) + restart


def is_elastic() -> bool:
    """True under torchrun, unless the user has numbered the generation."""
    return text("SYNCBN_GENERATION") is None and text("TORCHELASTIC_RESTART_COUNT") is not None


def agents_share_a_store() -> bool:
    """True where torchrun's several agents keep one store for all attempts, and count restarts each for itself.

    TORCHELASTIC_RESTART_COUNT of such a launch is not the same everywhere: an agent counts the failures of its own processes.
    """
    return _has_several_agents() and (text("TORCHELASTIC_USE_AGENT_STORE") or "").lower() == "true"


def attempt() -> Optional[str]:
    """A word that tells this attempt's notes from those of attempts before, in a store that may outlive them.

    None where it is not needed: the store of several agents' processes ends with them, unless the agents keep one.
    """
    if _has_several_agents() and not agents_share_a_store():
        return None
    return text("TORCHELASTIC_RESTART_COUNT")


def _has_several_agents() -> bool:
    return text("TORCHELASTIC_RESTART_COUNT") is not None and (integer("GROUP_WORLD_SIZE", 1, 2**32 - 1) or 1) > 1


# (rank, number of processes) as launchers set them, those of the innermost launcher first: torchrun may run under srun.
_LAUNCHERS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),  # LSF's jsrun.
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),  # PMIx itself has no variable for the size.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # SLURM_NTASKS is set outside of srun too.
    ("PET_NODE_RANK", "PET_NNODES"),  # Kubeflow's pods, where each is one process and torchrun is not used.
)

# Ranks of launchers that set no size.
_RANKS_ALONE = ("PALS_RANKID", "ALPS_APP_PE")
# The number of processes on this host.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def place() -> Optional[Tuple[Optional[int], Optional[int]]]:
    """(rank, number of processes) of this process as its launcher has set them; None where no launcher has.

    Either may be None where RANK or WORLD_SIZE alone is set and no launcher's variables go with it. Errors:
    INVALID_ARGUMENT for a variable that is no integer.
    """
    most = 2**32 - 1
    rank, size = integer("RANK", 0, most), integer("WORLD_SIZE", 1, most)
    if rank is not None and size is not None:
        return rank, size
    launched = _launched(most)
    if rank is None and size is None:
        return launched
    if launched is not None and (rank, size) in ((None, launched[1]), (launched[0], None)):
        return launched
    return rank, size


def _launched(most: int) -> Optional[Tuple[Optional[int], Optional[int]]]:
    """(rank, number of processes) by the variables of other launchers than torchrun."""
    names = _launchers_here()
    return (integer(names[0][0], 0, most), integer(names[0][1], 1, most)) if names else None


def _launchers_here() -> List[Tuple[str, str]]:
    """The names of both variables of each launcher that has set both, the innermost launcher's first."""
    found = [pair for pair in _LAUNCHERS if all((text(name) or "").strip().isdigit() for name in pair)]
    several = (text("PET_NPROC_PER_NODE") or "1") != "1"
    return [pair for pair in found if not (several and pair[0] == "PET_NODE_RANK")]


def launchers_around(rank: int, world_size: int) -> Optional[str]:
    """The variables of the launcher that has given this place, within another one's of several processes, for the text of an
    error; None if there are none.

    Nothing tells whether the inner one spans the tasks of the outer one, as mpirun does that starts its daemons by srun, or
    each task of the outer one has started an inner one, whose ranks begin at 0 in each.
    """
    if text("RANK") is not None and text("WORLD_SIZE") is not None:
        return None
    places = {names: tuple(int(text(name) or "0") for name in names) for names in _launchers_here()}
    inner = next(iter(places), None)
    if inner is None or places[inner] != (rank, world_size):
        return None
    outer = next((names for names, place in places.items() if place[1] > 1 and place != (rank, world_size)), None)
    return None if outer is None else ", ".join(f"{name} is {text(name)}" for name in (*inner, *outer))


def is_loopback(host: str) -> bool:
    return _LOOPBACK.fullmatch(host) is not None


def is_one_host(world_size: int) -> bool:
    """True if the launcher says that all processes are on this host."""
    address = text("MASTER_ADDR")
    if address is not None and is_loopback(address):
        return True
    local = [value.strip() for value in map(text, _LOCAL_SIZES) if value is not None]
    if local:  # Where they differ, some are those of a launcher around this one: Slurm's, too, of a shell on one host.
        return all(value == str(world_size) for value in local)
    return (text("SLURM_STEP_NUM_NODES") or "").strip() == "1"


def alone() -> Optional[str]:
    """The variable that says that this process is all of its launch, for the text of an error; None if there is none, or
    torchrun has started one process.
    """
    if text("TORCHELASTIC_RUN_ID") is not None:
        return None
    sizes = ("WORLD_SIZE", *(size for _, size in _LAUNCHERS))
    return next((f"{name} is 1" for name in sizes if (text(name) or "").strip() == "1"), None)


def other_processes() -> Optional[str]:
    """The variable that says that this process is one of several, for the text of an error; None if there is none."""
    most = {name: 1 for _, name in _LAUNCHERS}
    most.update({name: 0 for name, _ in _LAUNCHERS}, **dict.fromkeys(_RANKS_ALONE, 0))
    for name, few in most.items():
        value = (text(name) or "").strip()
        if value.isdigit() and int(value) > few:
            return f"{name} is {value}"
    return None
