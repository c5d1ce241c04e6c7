"""Runs one Python source as several processes, as the launchers of training programs do."""

import contextlib
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, List

import syncbn

LIMIT_SECONDS = 1200.0
# A launch's variables, which the tests' own environment must not have.
LAUNCHERS = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SYNCBN_TARGET SYNCBN_ADDRESS
""".split()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline


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

    Each has to end with the code 0, or that of `codes`. Once one has not, the others, which may wait for it, are ended.
    """
    codes = codes or [0] * world_size
    files = [tempfile.TemporaryFile("w+") for _ in range(world_size)]
    processes = [
        subprocess.Popen(
            [interpreter, "-c", source, str(rank), str(world_size), *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        _wait(processes, codes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # With those that a launcher has started.
            process.wait()
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    shown = "\n".join(f"rank {rank}, code {p.returncode}:\n{o}" for rank, (p, o) in enumerate(zip(processes, outputs)))
    assert [process.returncode for process in processes] == codes, shown
    return outputs


def _wait(processes: List["subprocess.Popen[bytes]"], codes: List[int]) -> None:
    """Until all have ended, or one has with another code than its own, or the time is over."""
    running = {os.pidfd_open(process.pid): (process, code) for process, code in zip(processes, codes)}
    deadline = time.monotonic() + LIMIT_SECONDS
    while running:
        ready = multiprocessing.connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        ended = [running.pop(descriptor) for descriptor in ready if os.close(descriptor) is None]
        if not ready or any(process.wait() != code for process, code in ended):
            break
    for descriptor in running:
        os.close(descriptor)


# For programs: `signal_in_wait`, on another thread, sends SIGUSR1 once the main thread waits for a round.
SIGNAL_IN_WAIT = """
import os, signal, sys, threading, time
from syncbn import _rounds

def signal_in_wait():
    frame = None
    while frame is None:
        time.sleep(0.01)  # Nothing tells of a thread's first step into a function.
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None and frame.f_code is not _rounds.wait_in_slices.__code__:
            frame = frame.f_back
    os.kill(os.getpid(), signal.SIGUSR1)
"""
