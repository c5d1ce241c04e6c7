"""ResNet-18 on CPU workers: the step time of synchronized batch normalization beside that of none, and of one process.

Every run trains ten steps on the same batch; with synchronization the loss is the whole batch's, step by step. With
--write the table goes into client/examples/README.md.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
from typing import Dict, List, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent / "quickstart"))
from quickstart import Failure, running_master, stop  # noqa: E402

TIME_LIMIT = 300.0
README = _HERE.parent / "README.md"
BEGIN, END = "<!-- resnet18: begin -->", "<!-- resnet18: end -->"


class Row(NamedTuple):
    run: str
    step: str  # [ms]
    range: str  # [ms]
    last_loss: str
    difference: str


HEADER = Row("run", "step [ms]", "steps from - to [ms]", "last loss", "loss difference")
NOTE = (
    "Median step time without the first step, and the fastest and the slowest step; the largest difference of a step's "
    "mean loss from that of one process. DDP over gloo."
)


def where(load: float) -> str:
    """Machine, its load before, and commit, for people."""
    cpu = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    describe = ["git", "-C", str(_HERE), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return f"{cpu}, {os.cpu_count()} cores, load {load:.1f} before; torch {torch.__version__}; commit {commit}"


def markdown(title: str, load: float, rows: List[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, *rows)]
    head, note = (textwrap.fill(text, 120, break_on_hyphens=False) for text in (f"{title}. {where(load)}.", NOTE))
    return "\n".join([head, "", lines[0], "|---|--:|--:|--:|--:|", *lines[1:], "", note])


def run(mode: str, workers: int, options: List[str], target: str) -> List[Dict[str, List[float]]]:
    """The printed numbers of each process of one run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = []
        for rank in range(workers):
            command = [sys.executable, str(_HERE / "train.py"), "--mode", mode, "--rank", str(rank)]
            command += ["--world-size", str(workers), "--rendezvous", f"{folder}/rendezvous", "--target", target]
            command += ["--group", f"resnet18-{os.getpid()}-{workers}", *options]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(stop, processes[-1])
        results = []
        for process in processes:
            try:
                output, _ = process.communicate(timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                raise Failure(f"a {mode} worker took more than {TIME_LIMIT:.0f} s") from None
            if process.returncode != 0:
                raise Failure(f"a {mode} worker ended with code {process.returncode}; its message is above")
            results.append(json.loads(output.splitlines()[-1]))
        return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--double", action="store_true", help="in float64, where rounding hides nothing")
    parser.add_argument("--master", metavar="TARGET", help="use a running master")
    parser.add_argument("--write", action="store_true", help="put the table into client/examples/README.md")
    arguments = parser.parse_args()
    console = Console()
    if any(arguments.batch % workers for workers in arguments.workers):
        parser.error("the batch has to divide by each number of workers")
    options = ["--batch", str(arguments.batch), "--steps", str(arguments.steps), *["--double"] * arguments.double]
    load = os.getloadavg()[0]
    title = f"ResNet-18, 32 x 32, global batch {arguments.batch}, {'float64, ' * arguments.double}one thread a worker"
    table, done = Table(title=f"{title}, {os.cpu_count()} cores"), []
    for column in HEADER:
        table.add_column(column)
    try:
        with contextlib.nullcontext(arguments.master) if arguments.master else running_master(900) as target:
            rows = [("one process", "whole", 1)]
            for workers in arguments.workers:
                rows.append((f"{workers} workers, DDP", "ddp", workers))
                rows.append((f"{workers} workers, DDP, syncbn", "syncbn", workers))
            expected: List[float] = []
            for label, mode, workers in rows:
                results = run(mode, workers, options, target)
                # The first step also allocates and connects.
                times = [1e3 * s for result in results for s in result["seconds"][1:] or result["seconds"]]
                losses = [statistics.fmean(step) for step in zip(*(result["losses"] for result in results))]
                expected = expected or losses
                difference = max(abs(a - b) for a, b in zip(losses, expected))
                spread = f"{min(times):.0f} - {max(times):.0f}"
                done.append(
                    Row(label, f"{statistics.median(times):.0f}", spread, f"{losses[-1]:.6f}", f"{difference:.1e}")
                )
                table.add_row(*done[-1])
    except Failure as failure:
        console.print(f"resnet18: {failure}")
        return 1
    console.print(table)
    console.print(NOTE)
    if arguments.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{markdown(title, load, done)}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
