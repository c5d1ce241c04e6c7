"""python -m syncbn doctor: checks an installation, as text that fits into a report of a problem."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, Optional

import numpy as np

import syncbn
from syncbn import _library, _program

_PACKAGES = ("numpy", "torch", "jax", "jaxlib", "flax", "keras", "tensorflow", "tensorflow-cpu", "lightning", "timm")
_ROUNDS = 50
_ROUND_SECONDS = 30.0
# Files of NVIDIA's driver, of which a host with it has one; the last is that of the Windows Subsystem for Linux.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")


def _version(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> str:
    """The installed packages that have to do with training, without importing them."""
    found = [(name, _version(name)) for name in _PACKAGES]
    return ", ".join(f"{name} {version}" for name, version in found if version is not None)


def _cuda() -> str:
    """Says which GPU support the library has, and whether this host has a GPU."""
    try:
        _library.call(_library.lib.syncbn_stream_order_check, 0)
    except syncbn.Error as error:
        if "cuda=no" not in syncbn.build_info() and not any(map(os.path.exists, _DRIVERS)):
            return "this host has no NVIDIA driver"  # CUDA calls a driver that is absent one of an insufficient version.
        return f"none that the library uses ({error.message})"
    return "device 0 answers, and its streams can wait for rounds"


def compiled_master() -> str:
    """The version of the program that SYNCBN_MASTER names."""
    program = str(_program.compiled())
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"{program} --version ended with code {done.returncode}: {done.stderr.strip()}")
    return f"{done.stdout.strip()} ({program})"


def _rounds(worker: syncbn.Worker) -> List[float]:
    """Checks the merged values of some rounds. Returns: the seconds that each took."""
    seconds = []
    ranks = np.arange(worker.world_size, dtype=np.float64)
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        merged = worker.synchronize("doctor", 1, [float(worker.rank)], [0.0])
        seconds.append(time.perf_counter() - start)
        if (merged.count, merged.mean[0], merged.var[0]) != (worker.world_size, ranks.mean(), ranks.var()):
            raise RuntimeError(f"a round of {worker.world_size} workers gave {merged}")
    return seconds


def _told(seconds: List[float]) -> str:
    return f"{len(seconds)} rounds, {np.median(seconds) * 1e3:.2f} ms at the median, {max(seconds) * 1e3:.2f} ms at most"


def round_with_itself() -> str:
    """Starts a master, and has two workers of this process meet there."""

    def run(rank: int) -> List[float]:
        with syncbn.Worker(master.target, "doctor", rank, 2, _ROUND_SECONDS, job="doctor") as worker:
            return _rounds(worker)

    with syncbn.Master() as master, ThreadPoolExecutor(2) as pool:
        return _told(list(pool.map(run, range(2)))[0])


def target_answers(target: str, join_timeout: float) -> str:
    """Joins the master that training would join, in a job of its own, and has a round there."""
    job = f"doctor-{socket.gethostname()[:64]}-{os.getpid()}"
    with syncbn.Worker(target, "doctor", 0, 1, _ROUND_SECONDS, job=job, join_timeout=join_timeout) as worker:
        return _told(_rounds(worker))


def _check(name: str, function: Callable[[], str]) -> bool:
    """Prints a line. Returns: whether the check has passed."""
    try:
        answer, passed = function(), True
    except Exception as error:  # Any fault of an installation is to be shown.
        answer, passed = f"{type(error).__name__}: {error}", False
    print(f"{'ok  ' if passed else 'FAIL'}  {name}: {answer}", flush=True)
    return passed


def main(arguments: List[str]) -> int:
    """Returns: 0 if all checks have passed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m syncbn doctor", description=__doc__)
    parser.add_argument("--target", default=os.environ.get("SYNCBN_TARGET"), help="a master; default: SYNCBN_TARGET")
    parser.add_argument("--join-timeout", type=float, default=10.0, help="seconds for which the target is tried")
    given = parser.parse_args(arguments)
    folder = pathlib.Path(__file__).resolve().parent
    print(f"      syncbn {syncbn.__version__} in {folder}, library {_library.PATH}")
    print(f"      {platform.python_implementation()} {platform.python_version()}; {versions()}")
    libc = " ".join(platform.libc_ver())
    print(f"      {platform.system()} {platform.release()} on {platform.machine()}, {libc}, {os.cpu_count()} CPUs")
    print(f"      library built with: {syncbn.build_info()}; CUDA: {_cuda()}", flush=True)
    passed = [_check("a round with itself", round_with_itself)]
    if _program.compiled() is not None:
        passed.append(_check("the program that SYNCBN_MASTER names", compiled_master))
    if given.target:
        passed.append(_check(f"the master at {given.target}", lambda: target_answers(given.target, given.join_timeout)))
    else:
        print("      no target: neither --target nor SYNCBN_TARGET names a master")
    print("All is well." if all(passed) else "Something is wrong: see the lines with FAIL.", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
