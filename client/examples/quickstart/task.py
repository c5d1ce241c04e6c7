"""The task that the launcher and the training processes agree on, whichever front they train with."""

import argparse
import pathlib
import sys
import time
from typing import Any, Callable, Dict

import numpy as np

import syncbn

# The folder of `digits`, which the training programs import.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))

GLOBAL_BATCH = 16
SIZES = (1, 2, 5, 8)  # Each worker's part of a batch.
GROUP = "quickstart"
LEARNING_RATE, MOMENTUM = 0.05, 0.9
LATENCY_ROUNDS = 200
LATENCY_CHANNELS = 32

Record = Dict[str, Any]


def measure_latency(worker: syncbn.Worker) -> np.ndarray:
    """Seconds of each of many rounds that all workers begin together."""
    mean, m2 = np.zeros(LATENCY_CHANNELS), np.ones(LATENCY_CHANNELS)
    seconds = np.zeros(LATENCY_ROUNDS)
    for index in range(LATENCY_ROUNDS):
        start = time.perf_counter()
        worker.synchronize("latency", 1, mean, m2)
        seconds[index] = time.perf_counter() - start
    return seconds


def run(
    description: str,
    run_whole: Callable[[argparse.Namespace], Dict[str, Record]],
    run_worker: Callable[[syncbn.Worker, argparse.Namespace], Dict[str, Record]],
) -> None:
    """A training process: reads its arguments, trains as a worker or on the whole batch, writes the records."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--target", help="the master; without it, this is the reference on the whole batch")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--group", default=GROUP)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--output", required=True, help="the .npz file to write")
    arguments = parser.parse_args()
    if arguments.target is None:
        records = run_whole(arguments)
    else:
        with syncbn.Worker(arguments.target, arguments.group, arguments.rank, len(SIZES), timeout=60.0) as worker:
            worker.wait_for_members(60.0)
            records = run_worker(worker, arguments)
            records["main"]["latency"] = measure_latency(worker)
    np.savez(arguments.output, **{f"{run}/{name}": v for run, record in records.items() for name, v in record.items()})
