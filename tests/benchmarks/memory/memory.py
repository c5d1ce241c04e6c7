"""Resident memory of a master and of its workers; `tools/benchmark memory` runs it."""

import argparse
import os
import pathlib
import subprocess
import sys
from typing import Dict, List, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

_HERE = pathlib.Path(__file__).resolve().parent


def status(pid: int) -> Dict[str, float]:
    """MiB of VmRSS and VmHWM, of a process."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def start(command: List[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with code {process.wait()}")
    return line


def group(commands: List[List[str]], master: int) -> Tuple[List[float], Dict[str, float]]:
    """Runs the workers. MiB that each process has more at the end, and the master while all are still there."""
    processes = [start(command) for command in commands]
    try:
        pairs = [[int(text) for text in read_line(process).split()] for process in processes]
        return [(after - before) / 1024 for before, after in pairs], status(master)
    finally:
        for process in processes:
            process.communicate()  # Closes its input, at which it leaves.


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark memory", description=__doc__)
    parser.add_argument("--workers", type=int, default=64, help="workers of the large group, in 4 processes")
    parser.add_argument("--layers", type=int, default=53)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=150, help="forward and backward rounds of every layer")
    parser.add_argument("--without-python", action="store_true", help="where the package is not on the path")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    provenance = report.provenance("tools/benchmark memory")
    shape = [str(options.layers), str(options.channels), str(options.rounds)]
    master = start([os.environ["SYNCBN_MASTER"], "--address", "127.0.0.1:0"])
    try:
        target = read_line(master).split()[-1]
        idle = status(master.pid)["VmRSS"]

        def workers(name: str, first: int, count: int, world_size: int) -> List[str]:
            return [os.environ["SYNCBN_MEMORY_WORKERS"], target, name, str(first), str(count), str(world_size), *shape]

        python = [sys.executable, str(_HERE / "python_worker.py"), target]
        # First: an ended group's memory is kept for its workers' return.
        share = options.workers // 4
        _, large = group([workers("large", i * share, share, 4 * share) for i in range(4)], master.pid)
        small, _ = group([workers("small", rank, 1, 2) for rank in range(2)], master.pid)
        ranks = [] if options.without_python else range(2)
        pythons, _ = group([[*python, str(rank), "2", *shape] for rank in ranks], master.pid)
    finally:
        master.terminate()
        master.wait()
    rows = [
        ["master, idle", f"{idle:.0f}"],
        [f"master, {4 * share} workers, after the last round", f"{large['VmRSS']:.0f}"],
        [f"master, {4 * share} workers, at most", f"{large['VmHWM']:.0f}"],
        ["C++ worker, beyond its process before the join", f"{max(small):.0f}"],
        *[["Python worker, beyond a process with NumPy", f"{size:.0f}"] for size in pythons[:1]],
    ]
    report.publish("memory", [provenance, "", *report.table(["process", "MiB"], rows)], options.output)


if __name__ == "__main__":
    main()
