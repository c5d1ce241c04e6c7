"""Runs one Python source as several processes, as the launchers of training programs do."""

import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, List

import syncbn

# A launch's variables, which the tests' own environment must not have.
LAUNCHERS = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SYNCBN_TARGET SYNCBN_ADDRESS
""".split()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**variables: Any) -> Any:
    """This process's environment without a launch's variables, and with those given."""
    found = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    package = str(pathlib.Path(syncbn.__file__).parents[1])
    found["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [found.get("PYTHONPATH")])])
    found.update({name: str(value) for name, value in variables.items()}, OMP_NUM_THREADS="1")
    return found


def run(
    source: str, world_size: int, *arguments: Any, codes: Any = None, interpreter: str = sys.executable, **variables: Any
) -> List[str]:
    """Runs `source` with the arguments (rank, world size, *arguments) for each rank. Returns their outputs.

    Each has to end with the code 0, or that of `codes`; whatever happens, none is left running.
    """
    processes = [
        subprocess.Popen(
            [interpreter, "-c", source, str(rank), str(world_size), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**variables),
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
        shown = "\n".join(f"rank {rank}, code {p.returncode}:\n{o}" for rank, (p, o) in enumerate(zip(processes, outputs)))
        assert [process.returncode for process in processes] == (codes or [0] * world_size), shown
        return outputs
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
