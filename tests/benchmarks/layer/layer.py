"""Measures the time of a PyTorch layer beyond torch's own with two rounds; `tools/benchmark layer` runs it."""

import argparse
import ctypes
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402
import torch  # noqa: E402

import syncbn  # noqa: E402
import syncbn.torch  # noqa: E402
from syncbn import _library  # noqa: E402

_API = ("round_start_forward", "round_start_backward", "round_wait", "round_sequence", "round_destroy")


class Time(NamedTuple):
    """Microseconds of one step."""

    wall: float
    cpu: float  # The calling thread's, the operating system's share included.


class RawRounds:
    """The rounds of a declared layer, in C++."""

    def __init__(self, worker: syncbn.Worker, layer: str, channels: int) -> None:
        functions = ctypes.CDLL(os.environ["SYNCBN_RAW_ROUNDS"])
        self._forward, self._backward = functions.raw_forward, functions.raw_backward
        given = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        self._forward.argtypes = [*given, ctypes.c_void_p]
        self._backward.argtypes = [*given, ctypes.c_uint64]
        addresses = [ctypes.cast(getattr(_library.lib, f"syncbn_{name}"), ctypes.c_void_p) for name in _API]
        self._api = (ctypes.c_void_p * len(_API))(*addresses)
        self._worker, self._layer, self._channels = worker, layer.encode(), channels
        self._sequence = ctypes.c_uint64()

    def forward(self) -> None:
        self._run(self._forward, ctypes.byref(self._sequence))

    def backward(self) -> None:
        """The backward round of the newest forward round."""
        self._run(self._backward, self._sequence)

    def _run(self, function: Any, last: Any) -> None:
        with self._worker.handle() as handle:
            code = function(ctypes.byref(self._api), handle, self._layer, self._channels, last)
        if code != 0:
            raise SystemExit(f"a raw round has failed with code {code}")


def step_of(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer(x).backward(dy)
        x.grad = None

    return run


def floor_of(layer: torch.nn.Module, rounds: RawRounds, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """A step of torch's layer with the rounds where a synchronized layer has its own."""

    def run() -> None:
        y = layer(x)
        rounds.forward()
        y.backward(dy)
        rounds.backward()
        x.grad = None

    return run


def measure(steps: Dict[str, Callable[[], None]], blocks: int, length: int, generator: random.Random) -> Dict[str, List[Time]]:
    """Every step's times, in blocks of `length` steps that take turns in random order."""
    found: Dict[str, List[Time]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name in generator.sample(list(steps), len(steps)):
            step = steps[name]
            step()
            for _ in range(length):
                wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
                step()
                cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
                found[name].append(Time(wall / 1e3, cpu / 1e3))
    return found


def quartiles(values: List[float]) -> List[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def shown(values: List[float]) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.0f} ({low:.0f}–{high:.0f})"


def rows(worker: syncbn.Worker, shape: List[int], options: Any, generator: random.Random) -> List[str]:
    channels = shape[1]
    name = "x".join(str(size) for size in shape)
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(shape)
    synchronized = syncbn.torch.SyncBatchNorm(channels, worker=worker, layer=name)
    worker.declare_layer(f"{name}/raw", channels)
    rounds = RawRounds(worker, f"{name}/raw", channels)
    steps = {
        "layer": step_of(synchronized, x, dy),
        "torch": step_of(torch.nn.BatchNorm2d(channels), x, dy),
        "floor": floor_of(torch.nn.BatchNorm2d(channels), rounds, x, dy),
    }
    measure(steps, 3, options.length, generator)
    found = measure(steps, options.blocks, options.length, generator)
    cells = [name]
    for kind in Time._fields:
        values = {step: [getattr(t, kind) for t in times] for step, times in found.items()}
        cells += [shown(values[step]) for step in steps]
        middle = {step: statistics.median(v) for step, v in values.items()}
        cells.append(f"{middle['layer'] - middle['floor']:.0f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark layer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["8x64x7x7", "32x256x14x14"], help="NxCxHxW")
    parser.add_argument("--blocks", type=int, default=100, help="of steps; the three kinds of step take turns")
    parser.add_argument("--length", type=int, default=10, help="steps of one kind in a block")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    provenance = report.provenance("tools/benchmark layer")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = random.Random(options.seed)
    command = [os.environ["SYNCBN_MASTER"], "--address", "127.0.0.1:0"]
    master = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert master.stdout is not None
        target = master.stdout.readline().split()[-1]
        with syncbn.Worker(target, rank=0, world_size=1) as worker:
            table = [
                rows(worker, [int(size) for size in shape.split("x")], options, generator) for shape in options.shapes
            ]
    finally:
        master.terminate()
        master.wait()
    head = ["shape"] + [
        f"{name}, {kind}" for kind in Time._fields for name in ("layer", "torch", "torch, 2 rounds", "beyond")
    ]
    lines = [
        provenance + f" torch {torch.__version__}, one thread; one worker, its master in another process.",
        "",
        "Microseconds of a step, forward and backward: median (quartiles).",
        "",
        *report.table(head, table),
    ]
    report.publish("layer", lines, options.output)


if __name__ == "__main__":
    main()
