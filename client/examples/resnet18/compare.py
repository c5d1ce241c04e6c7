"""ResNet-18 on CPU workers: the step time of synchronized batch normalization beside that of none, and of one process.

Every run trains ten steps on the same batch; with synchronization the loss is the whole batch's, step by step. The
lockstep runs synchronize nothing, but wait where synchronized layers do. Runs take turns, --repeats times. With --write
the table goes into client/examples/README.md.
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
    ratio: str  # Of the step to that of DDP with as many workers: median, least and greatest of the starts.
    cpu: str  # [ms]
    difference: str


HEADER = Row("workers", "step [ms]", "from - to", "step / DDP's", "CPU [ms]", "difference")
NOTE = (
    "Median step time without the first step, and the fastest and the slowest step; the median step over that of DDP "
    "with as many workers (median, least and greatest of the starts); a worker's median CPU time of a step; the largest "
    "difference of a step's mean loss from that of one process. All but one process train by DDP over gloo; lockstep "
    "workers synchronize nothing, and wait for each other where synchronized layers do."
)


class Run(NamedTuple):
    """What is run. Its steps stand beside those of DDP with as many workers."""

    mode: str
    workers: int

    @property
    def label(self) -> str:
        return "1" if self.mode == "whole" else f"{self.workers}, {self.mode.replace('ddp', 'DDP')}"


Result = Dict[str, List[float]]  # What one process prints.


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
    return "\n".join([head, "", lines[0], "|---|--:|--:|--:|--:|--:|", *lines[1:], "", note])


def train(mode: str, workers: int, options: List[str], target: str) -> List[Result]:
    """Starts one run's processes, and returns what each has printed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = []
        barrier = pathlib.Path(folder, "barrier")
        barrier.write_bytes(bytes(64 * workers))
        for rank in range(workers):
            command = [sys.executable, str(_HERE / "train.py"), "--mode", mode, "--rank", str(rank)]
            command += ["--world-size", str(workers), "--rendezvous", f"{folder}/rendezvous", "--target", target]
            command += ["--barrier", str(barrier)]
            command += ["--group", f"resnet18-{pathlib.Path(folder).name}", *options]
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


def steady(results: List[Result], key: str) -> List[float]:
    """Milliseconds of each step of each process but the first, which also allocates and connects."""
    return [1e3 * value for result in results for value in result[key][1:] or result[key]]


def losses_of(results: List[Result]) -> List[float]:
    """The mean loss of each step."""
    return [statistics.fmean(step) for step in zip(*(result["losses"] for result in results))]


def summarize(run: Run, starts: Dict[Run, List[List[Result]]]) -> Row:
    """One line of the table, from every start of every run."""
    mine = starts[run]
    times, cpu = ([value for results in mine for value in steady(results, key)] for key in ("seconds", "cpu_seconds"))
    ratio = ""
    if run.mode not in ("whole", "ddp"):
        pairs = zip(mine, starts[Run("ddp", run.workers)])
        ratios = [
            statistics.median(steady(results, "seconds")) / statistics.median(steady(beside, "seconds"))
            for results, beside in pairs
        ]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    expected = losses_of(starts[Run("whole", 1)][0])
    difference = max(abs(a - b) for results in mine for a, b in zip(losses_of(results), expected))
    return Row(
        run.label,
        f"{statistics.median(times):.0f}",
        f"{min(times):.0f}-{max(times):.0f}",
        ratio,
        f"{statistics.median(cpu):.0f}",
        f"{difference:.1e}",
    )


def measure(runs: List[Run], repeats: int, options: List[str], target: str) -> List[Row]:
    """Trains all runs in turns, in both directions, since the load of a machine drifts."""
    starts: Dict[Run, List[List[Result]]] = {run: [] for run in runs}
    for repeat in range(repeats):
        for run in runs[:: -1 if repeat % 2 else 1]:
            starts[run].append(train(run.mode, run.workers, options, target))
    return [summarize(run, starts) for run in runs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1, help="starts of each run")
    parser.add_argument("--double", action="store_true", help="in float64, where rounding hides nothing")
    parser.add_argument("--master", metavar="TARGET", help="use a running master")
    parser.add_argument("--write", action="store_true", help="put the table into client/examples/README.md")
    arguments = parser.parse_args()
    console = Console()
    if any(arguments.batch % workers for workers in arguments.workers):
        parser.error("the batch has to divide by each number of workers")
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: at least 1")
    options = ["--batch", str(arguments.batch), "--steps", str(arguments.steps), *["--double"] * arguments.double]
    load = os.getloadavg()[0]
    title = f"ResNet-18, 32 x 32, global batch {arguments.batch}, {'float64, ' * arguments.double}one thread a worker"
    if arguments.repeats > 1:
        title += f", {arguments.repeats} starts"
    runs = [Run("whole", 1)]
    runs += [Run(mode, workers) for workers in arguments.workers for mode in ("ddp", "lockstep", "syncbn")]
    try:
        with contextlib.nullcontext(arguments.master) if arguments.master else running_master(900) as target:
            rows = measure(runs, arguments.repeats, options, target)
    except Failure as failure:
        console.print(f"resnet18: {failure}")
        return 1
    table = Table(title=f"{title}, {os.cpu_count()} cores")
    for column in HEADER:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(NOTE)
    if arguments.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{markdown(title, load, rows)}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
