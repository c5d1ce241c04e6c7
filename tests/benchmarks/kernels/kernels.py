"""CPU time of the kernels beside torch's own batch normalization; `tools/benchmark kernels` runs it."""

import argparse
import ctypes
import os
import pathlib
import random
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402
import torch  # noqa: E402

_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # As DataType numbers them.
_SHAPES = ["32x64x56x56", "8x256x14x14", "8x512x7x7"]


class Pass(ctypes.Structure):
    """As in operations.cc."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "channels", "spatial")],
        *[(name, ctypes.c_int32) for name in ("type", "layout", "num_threads")],
        *[(name, ctypes.c_void_p) for name in ("x", "dy", "out", "mean", "scale", "shift", "first", "second")],
    ]


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def operations(shape: List[int], kind: str, last: bool) -> Dict[str, Callable[[], Any]]:
    """The steps to be timed, over the same tensors."""
    dtype = getattr(torch, kind)
    layout: Any = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    out = torch.empty_like(x)
    channels = shape[1]
    vectors = [torch.randn(channels, dtype=torch.float64) for _ in range(5)]
    spatial = x.numel() // (shape[0] * channels)
    given = Pass(shape[0], channels, spatial, _TYPES[kind], last, 1, *map(address, (x, dy, out, *vectors)))
    library = ctypes.CDLL(os.environ["SYNCBN_CPU_OPERATIONS"])

    wide = dtype if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (torch.ones(channels, dtype=wide) for _ in range(4))
    _, saved_mean, saved_invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    backward = torch.ops.aten.native_batch_norm_backward
    kept = (x, dy, out, vectors, given)  # The library has their addresses.
    return {
        "forward": lambda: kept and library.forward_operations(ctypes.byref(given)),
        "backward": lambda: library.backward_operations(ctypes.byref(given)),
        "torch forward": lambda: torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5),
        "torch backward": lambda: backward(
            dy, x, weight, mean, var, saved_mean, saved_invstd, True, 1e-5, [True, True, True]
        ),
    }


def measure(steps: Dict[str, Callable[[], Any]], repetitions: int, generator: random.Random) -> Dict[str, List[float]]:
    """Microseconds of CPU time of each step; they take turns in random order."""
    found: Dict[str, List[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name in generator.sample(list(steps), len(steps)):
            begun = time.thread_time_ns()
            steps[name]()
            if repetition > 0:
                found[name].append((time.thread_time_ns() - begun) / 1e3)
    return found


def row(case: Tuple[str, str, bool], repetitions: int, generator: random.Random) -> List[str]:
    text, kind, last = case
    shape = [int(size) for size in text.split("x")]
    found = measure(operations(shape, kind, last), repetitions, generator)
    middle = {name: statistics.median(times) for name, times in found.items()}
    ours, torchs = (middle[f"{who}forward"] + middle[f"{who}backward"] for who in ("", "torch "))
    return [
        text,
        kind,
        "last" if last else "first",
        *[f"{middle[name]:.0f}" for name in found],
        f"{middle['forward'] / middle['torch forward']:.2f}",
        f"{ours / torchs:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark kernels", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=_SHAPES, help="NxCxHxW")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=_TYPES)
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    provenance = report.provenance("tools/benchmark kernels")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = random.Random(options.seed)
    cases = [(shape, kind, last) for kind in options.types for shape in options.shapes for last in (False, True)]
    rows = [row(case, options.repetitions, generator) for case in cases]
    head = ["shape", "type", "channels", "forward", "backward", "torch forward", "torch backward"]
    lines = [
        provenance + f" torch {torch.__version__}, one thread.",
        "",
        "Microseconds of CPU time, medians; and ours over torch's, forward alone and with backward.",
        "",
        *report.table([*head, "ratio, forward", "ratio, both"], rows),
    ]
    report.publish("kernels", lines, options.output)


if __name__ == "__main__":
    main()
