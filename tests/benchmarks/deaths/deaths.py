"""Kills the master again and again while four workers train on the digits of the quickstart, and compares every bit of
what they have at the end with a run that nobody disturbed.

`tools/benchmark deaths` runs it. The moment of each death is drawn: after a random step, and within the next one.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Optional

import numpy as np

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]
sys.path[:0] = [str(_HERE.parent), str(_ROOT / "client/examples/quickstart")]

WORKERS = 4
# Bounds every wait. Nothing takes this long unless it hangs.
PATIENCE = 120.0


def work(target: str, rank: int, steps: int, output: str) -> None:
    """A worker: trains for so many steps, and writes its parameters, running statistics and losses."""
    import torch

    import syncbn
    import syncbn.torch
    import training

    torch.set_num_threads(1)
    with syncbn.Worker(target, "deaths", rank, WORKERS, timeout=60.0) as worker:
        worker.wait_for_members(PATIENCE)
        model = training.make_model(torch.float64, torch.device("cpu"))
        model = syncbn.torch.convert_sync_batchnorm(model, worker)
        record = training.train(model, training.digits.load(), steps, rank, worker)
    np.savez(output, **{name: record[name] for name in ("losses", "last/parameters", "last/statistics")})


class Master:
    """syncbn-master on a socket of its own; another takes the place of one that was killed."""

    def __init__(self, socket: pathlib.Path) -> None:
        self.target = f"unix:{socket}"
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [os.environ["SYNCBN_MASTER"], "--address", self.target, "--max-lifetime", "3600", "--log-level", "error"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("syncbn-master ready"):
            raise SystemExit(f"the master ended with code {self.process.wait()} before it was ready")

    def die(self, pause: float) -> None:
        self.stop()
        time.sleep(pause)  # As a supervisor takes its time.
        self._start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Worker:
    def __init__(self, target: str, rank: int, steps: int, output: pathlib.Path) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", target, str(rank), str(steps), str(output)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def await_step(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "step\n":
            raise SystemExit(f"a worker ended with code {self.process.wait()}")

    def finish(self) -> Dict[str, np.ndarray]:
        self.process.communicate(timeout=PATIENCE)
        if self.process.returncode != 0:
            raise SystemExit(f"a worker ended with code {self.process.returncode}")
        with np.load(self.output) as file:
            return dict(file)


def train(directory: pathlib.Path, steps: int, deaths: List[int], randomly: random.Random) -> List[Dict[str, np.ndarray]]:
    """Runs a training in which the master dies after each of the steps of `deaths`; returns what the workers have."""
    master = Master(directory / "master")
    workers: List[Worker] = []
    try:
        workers = [Worker(master.target, rank, steps, directory / f"{rank}.npz") for rank in range(WORKERS)]
        for step in range(1, steps + 1):
            for worker in workers:
                worker.await_step()
            if step in deaths:
                time.sleep(randomly.uniform(0.0, 0.02))
                master.die(pause=randomly.uniform(0.0, 0.2))
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
        master.stop()


def count_differences(a: List[Dict[str, np.ndarray]], b: List[Dict[str, np.ndarray]]) -> int:
    """The numbers that differ in any bit."""
    return sum(
        int((one[name].view(np.uint64) != other[name].view(np.uint64)).sum())
        for one, other in zip(a, b)
        for name in one
    )


def compare(steps: int, deaths: int, seed: int) -> Dict[str, int]:
    """Trains twice, once undisturbed; returns how many numbers were compared, and how many differ."""
    randomly = random.Random(seed)
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as stormy:
        expected = train(pathlib.Path(calm), steps, [], randomly)
        chosen = sorted(randomly.sample(range(1, steps), deaths))
        actual = train(pathlib.Path(stormy), steps, chosen, randomly)
    numbers = sum(values.size for record in expected for values in record.values())
    return {"numbers": numbers, "differences": count_differences(expected, actual)}


def main(arguments: Optional[List[str]] = None) -> None:
    import report

    parser = argparse.ArgumentParser(prog="tools/benchmark deaths", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args(arguments)
    provenance = report.provenance("tools/benchmark deaths")
    result = compare(options.steps, options.deaths, options.seed)
    head = ["masters killed", "workers", "steps", "steps lost", "numbers compared", "that differ"]
    # A step that is lost ends its worker, and with it this program.
    values = (options.deaths, WORKERS, options.steps, 0, result["numbers"], result["differences"])
    lines = [provenance, "", *report.table(head, [[str(value) for value in values]])]
    report.publish("deaths", lines, options.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
