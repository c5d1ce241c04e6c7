"""PyTorch, JAX, NumPy and C++ workers train one network together, and end where one process on the whole batch does."""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import List, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import common
import torch_worker

_HERE = pathlib.Path(__file__).resolve().parent
_REPOSITORY = _HERE.parents[2]
sys.path[:0] = [str(_HERE.parent / "data"), str(_HERE.parent / "quickstart")]
import digits  # noqa: E402
from quickstart import Failure, running_master, stop  # noqa: E402

SIZES = {"torch": 1, "jax": 2, "numpy": 5, "cpp": 8}  # Each worker's part of a batch.
TOLERANCE = 1e-9
TIME_LIMIT = 100.0
LEARNING_RATE = 0.2


class Kind(NamedTuple):
    label: str
    command: List[str]


def command_of(kind: str) -> Kind:
    """Returns the command that starts a worker of a kind; NumPy replaces a kind that is not installed."""
    script = lambda name, python=sys.executable: [python, str(_HERE / f"{name}_worker.py")]  # noqa: E731
    if kind == "jax":
        python = os.environ.get("SYNCBN_JAX_PYTHON")
        if python and not pathlib.Path(python).exists():
            python = None
        if python or importlib.util.find_spec("jax"):
            return Kind("JAX", script("jax", python or sys.executable))
        return Kind("NumPy (no JAX here)", script("numpy"))
    if kind == "cpp":
        built = _REPOSITORY / "bazel-bin/client/examples/heterogeneous/cpp_worker"
        binary = pathlib.Path(os.environ.get("SYNCBN_CPP_WORKER") or built)
        return Kind("C++", [str(binary)]) if binary.exists() else Kind("NumPy (no C++ worker built)", script("numpy"))
    return Kind({"torch": "PyTorch", "numpy": "NumPy"}[kind], script(kind))


def run(target: str, steps: int) -> List[np.ndarray]:
    """Trains; returns what each worker ended with, then the reference's."""
    batch = sum(SIZES.values())
    data = digits.load()
    problem = common.Problem(
        data.images, data.labels, digits.batches(len(data.images), batch, steps), common.initial_parameters()
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        problem.write(pathlib.Path(folder))
        outputs, processes, begin = [], [], 0
        for rank, (kind, size) in enumerate(SIZES.items()):
            output = pathlib.Path(folder) / f"output-{rank}"
            options = {
                "target": target,
                "group": f"heterogeneous-{os.getpid()}",
                "rank": rank,
                "world-size": len(SIZES),
                "begin": begin,
                "end": begin + size,
                "steps": steps,
                "learning-rate": LEARNING_RATE,
                "global-batch": batch,
                "folder": folder,
                "output": output,
            }
            flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
            process = subprocess.Popen([*command_of(kind).command, *flags], text=True)
            stack.callback(stop, process)
            outputs.append(output)
            processes.append((kind, process))
            begin += size
        expected = torch_worker.reference(problem, LEARNING_RATE)
        for kind, process in processes:
            try:
                code = process.wait(TIME_LIMIT)
            except subprocess.TimeoutExpired:
                raise Failure(f"the {kind} worker took more than {TIME_LIMIT:.0f} s") from None
            if code != 0:
                raise Failure(f"the {kind} worker ended with code {code}; its message is above")
        return [*(np.fromfile(output) for output in outputs), expected]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--master", metavar="TARGET", help="use a running master")
    arguments = parser.parse_args()
    console = Console()
    try:
        with contextlib.nullcontext(arguments.master) if arguments.master else running_master() as target:
            *results, expected = run(target, arguments.steps)
    except Failure as failure:
        console.print(f"heterogeneous: {failure}")
        return 1
    table = Table(
        title=f"After {arguments.steps} steps: largest relative difference from one process on the whole batch"
    )
    for column in ("rank", "worker", "batch", "parameters", "running statistics"):
        table.add_column(column)
    worst = 0.0
    for rank, (result, (kind, size)) in enumerate(zip(results, SIZES.items())):
        differences = []
        for part in (slice(0, common.LENGTH), slice(common.LENGTH, None)):
            differences.append(float(np.abs(result[part] - expected[part]).max() / np.abs(expected[part]).max()))
        worst = max(worst, *differences)
        table.add_row(str(rank), command_of(kind).label, str(size), *(f"{value:.1e}" for value in differences))
    console.print(table)
    if worst > TOLERANCE:
        console.print(f"The difference {worst:.1e} is larger than {TOLERANCE:.0e}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
