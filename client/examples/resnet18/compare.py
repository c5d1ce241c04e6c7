"""ResNet-18 on CPU workers: the step time of synchronized batch normalization beside that of none, and of one process.

Every run trains ten steps on the same batch; with synchronization the loss is the whole batch's, step by step.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Dict, List

from rich.console import Console
from rich.table import Table

_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent / "quickstart"))
from quickstart import Failure, running_master, stop  # noqa: E402

TIME_LIMIT = 300.0


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
    parser.add_argument("--master", metavar="TARGET", help="use a running master")
    arguments = parser.parse_args()
    console = Console()
    if any(arguments.batch % workers for workers in arguments.workers):
        parser.error("the batch has to divide by each number of workers")
    options = ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
    table = Table(
        title=f"ResNet-18, 32 x 32, global batch {arguments.batch}, one thread a worker, {os.cpu_count()} cores"
    )
    for column in ("run", "step [ms]", "last loss", "loss difference"):
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
                median = statistics.median(s for result in results for s in result["seconds"][1:] or result["seconds"])
                losses = [statistics.fmean(step) for step in zip(*(result["losses"] for result in results))]
                expected = expected or losses
                difference = max(abs(a - b) for a, b in zip(losses, expected))
                table.add_row(label, f"{median * 1e3:.0f}", f"{losses[-1]:.6f}", f"{difference:.1e}")
    except Failure as failure:
        console.print(f"resnet18: {failure}")
        return 1
    console.print(table)
    console.print(
        "Median step time; the largest difference of a step's mean loss from that of one process. DDP over gloo."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
