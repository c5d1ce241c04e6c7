"""Measures the error of SyncBatchNorm against torch.nn.BatchNorm* on the whole batch in float64, for every option.

    tools/python client/python/tests/parity.py            print the table
    tools/python client/python/tests/parity.py --write    put it into client/python/README.md

Each case is one training step of one to four workers: outputs, the input's gradient, the parameters' gradients (summed
over the workers) and the running statistics. Errors count in unit roundoffs of the type that holds the result, relative
to the channel's largest absolute value (for the input's gradient to its largest term, for the other sums to the sum of
their terms' absolute values, since they may cancel): 1 is what rounding the exact result alone can cost.

The oracle of the first four columns is torch in float64, whose own rounding counts as an error of ours in float64. So
the last two compare both, ours and torch's, to the same formulas in extended precision (NumPy's longdouble, 64 bits of
mantissa at least).
"""

import argparse
import itertools
import pathlib
import re
import sys
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

import syncbn
import syncbn.torch as sync

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
SEED = 4021
CHANNELS = 5
MOMENTUM = 0.3
STEPS_BEFORE = 3  # num_batches_tracked at the start, for the cumulative average.

# Half the distance from 1 to the next number of the type.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SPATIAL = {2: (), 3: (6,), 4: (4, 3), 5: (2, 3, 4)}
CLASSES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
LAYOUTS = ("contiguous", "channels last", "strided")
BATCHES = {
    "one worker": (6,),
    "even": (3, 3),
    "uneven": (1, 2, 5),
    "single values": (1, 1, 1),  # [1, C] or [1, C, 1, ...] at each worker.
    "some empty": (0, 4, 0, 1),
}
QUANTITIES = ("output", "input's gradient", "parameters' gradients", "running statistics")
# No cell may exceed these. In float64 the mean is rounded too, by one unit of |mean|, which is large where |x - mean| is
# small.
EXACT, TORCHS_OWN = "float64 against extended precision", "torch's float64 against it"
BOUNDS = {"float64": 64.0, "float32": 1.5, "float16": 1.05, "bfloat16": 1.05, EXACT: 16.0, TORCHS_OWN: 64.0}


class Options(NamedTuple):
    affine: bool
    tracking: str  # "momentum", "cumulative" or "off".
    mode: str
    eps: float


OPTIONS = [
    Options(affine, tracking, mode, eps)
    for affine in (True, False)
    for tracking in ("momentum", "cumulative", "off")
    # 0.5 is larger than some channels' variance, and smaller than others'.
    for mode, eps in (("add", 1e-5), ("add", 0.5), ("clamp", 1e-5), ("clamp", 0.5))
]


class Case(NamedTuple):
    options: Options
    rank: int
    dtype: torch.dtype
    layout: str
    batches: str


def cases() -> Iterator[Case]:
    for batches, rank, dtype, layout, options in itertools.product(BATCHES, SPATIAL, ROUNDOFF, LAYOUTS, OPTIONS):
        if rank > 2 or layout != "channels last":  # A matrix has one dense layout.
            yield Case(options, rank, dtype, layout, batches)


class Problem(NamedTuple):
    """The inputs of a case in float64; x and dy are exact in the case's type, the others in `parameter_type`."""

    x: torch.Tensor
    dy: torch.Tensor
    state: Dict[str, torch.Tensor]


def parameter_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(SEED + case.rank)
    spatial = tuple(1 for _ in SPATIAL[case.rank]) if case.batches == "single values" else SPATIAL[case.rank]
    shape = (sum(BATCHES[case.batches]), CHANNELS) + spatial
    channel = [1, CHANNELS] + [1] * len(spatial)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 8.0], dtype=torch.float64).view(channel)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, dy = normal(shape) * spread + normal(channel), normal(shape)
    vector = lambda: (normal(CHANNELS).abs() + 0.5).to(parameter_type(case.dtype)).double()  # noqa: E731
    state = {name: vector() for name in ("weight", "bias", "running_mean", "running_var")}
    if not case.options.affine:
        del state["weight"], state["bias"]
    if case.options.tracking == "off":
        del state["running_mean"], state["running_var"]
    else:
        state["num_batches_tracked"] = torch.tensor(STEPS_BEFORE)
    return Problem(x.to(case.dtype).double(), dy.to(case.dtype).double(), state)


def arguments(options: Options) -> Dict[str, Any]:
    return {
        "eps": options.eps,
        "momentum": None if options.tracking == "cumulative" else MOMENTUM,
        "affine": options.affine,
        "track_running_stats": options.tracking != "off",
    }


class Results(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    parameters: List[np.ndarray]
    running: List[np.ndarray]


class Clamped(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization by autograd with invstd = 1/sqrt(max(var, eps)), which torch's layer does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        if self.running_mean is not None:
            n = x.numel() / x.size(1)
            self.num_batches_tracked.add_(1)
            rate = self.momentum or 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), rate)
            self.running_var.lerp_(var.detach() * n / (n - 1), rate)
        y = (x - mean.view(shape)) / var.view(shape).clamp(min=self.eps).sqrt()
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


def step(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> Results:
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    exact = lambda v: v.detach().double().contiguous().numpy()  # noqa: E731
    return Results(
        exact(y),
        exact(x.grad),
        [exact(parameter.grad) for parameter in layer.parameters()],
        [exact(buffer).copy() for name, buffer in layer.named_buffers() if name != "num_batches_tracked"],
    )


def oracle(case: Case, given: Problem) -> Results:
    kind = CLASSES[case.rank] if case.options.mode == "add" else Clamped
    layer = kind(CHANNELS, **arguments(case.options)).double()
    layer.load_state_dict(given.state)
    return step(layer, given.x.clone(), given.dy)


class Extended(NamedTuple):
    results: Results
    sizes: Results
    """Returns the scales [C] to which errors are relative."""


def extended(case: Case, given: Problem) -> Extended:
    """The case in extended precision."""
    options, wide = case.options, lambda v: v.numpy().astype(np.longdouble)
    x, dy = wide(given.x), wide(given.dy)
    state = {name: wide(vector) for name, vector in given.state.items()}
    dims = tuple(d for d in range(x.ndim) if d != 1)
    spread = lambda v: v.reshape([1, -1] + [1] * (x.ndim - 2))  # noqa: E731
    n, eps = np.longdouble(x.size // CHANNELS), np.longdouble(options.eps)
    mean = x.sum(dims) / n
    xmu = x - spread(mean)
    var = np.square(xmu).sum(dims) / n
    invstd = 1 / np.sqrt(var + eps if options.mode == "add" else np.maximum(var, eps))
    depends = np.ones_like(var) if options.mode == "add" else (var >= eps).astype(np.longdouble)
    hat = xmu * spread(invstd)
    scale = invstd * state.get("weight", np.ones_like(var))
    y = hat * spread(state.get("weight", np.ones_like(var))) + spread(state.get("bias", np.zeros_like(var)))
    centred = dy - spread(dy.sum(dims) / n) - hat * spread(depends * (dy * hat).sum(dims) / n)
    largest = lambda v: np.abs(v).max(dims)  # noqa: E731
    results, sizes = Results(y, spread(scale) * centred, [], []), Results(largest(y), largest(dy) * scale, [], [])
    if options.affine:
        results.parameters.extend([(dy * hat).sum(dims), dy.sum(dims)])
        sizes.parameters.extend([np.abs(dy * hat).sum(dims), np.abs(dy).sum(dims)])
    if options.tracking != "off":
        rate = np.longdouble(1) / (STEPS_BEFORE + 1) if options.tracking == "cumulative" else np.longdouble(MOMENTUM)
        for name, new in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            old = state[name]
            results.running.append((1 - rate) * old + rate * new)
            sizes.running.append(np.abs((1 - rate) * old) + np.abs(rate * new))
    return Extended(results, sizes)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with the same values in other memory."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.zeros(x.shape[:-1] + (2 * x.shape[-1],), dtype=x.dtype)  # Every second element.
    wide[..., ::2] = x
    return wide[..., ::2]


def work(worker: syncbn.Worker, case: Case, given: Problem) -> Results:
    """One worker's part."""
    parts = [
        lay_out(v.split(list(BATCHES[case.batches]))[worker.rank].to(case.dtype), case.layout)
        for v in (given.x, given.dy)
    ]
    options = case.options
    layer = sync.SyncBatchNorm(
        CHANNELS,
        **arguments(options),
        dtype=parameter_type(case.dtype),
        worker=worker,
        eps_mode=options.mode,
        layer=f"{options.mode} {options.eps} {options.tracking == 'cumulative'}",
    )
    layer.load_state_dict(given.state)
    return step(layer, *parts)


def units(actual: np.ndarray, expected: np.ndarray, size: np.ndarray, roundoff: float) -> float:
    """The largest error of [N, C, ...] or [C], in roundoffs of `size` [C]."""
    error = np.abs(actual.astype(np.longdouble) - expected)
    by_channel = np.moveaxis(error, 1, 0).reshape(CHANNELS, -1) if error.ndim > 1 else error[:, None]
    return float((by_channel.max(1) / (size * np.longdouble(roundoff))).max())


def errors(dtype: torch.dtype, actual: List[Results], expected: Results, sizes: Results) -> Dict[str, float]:
    """Returns the errors of the workers' results, by quantity; quantities that the case lacks are absent."""
    tensors, vectors = ROUNDOFF[dtype], ROUNDOFF[parameter_type(dtype)]
    whole = lambda parts: np.concatenate([part for part in parts if part.size])  # noqa: E731
    found = {
        "output": units(whole([r.y for r in actual]), expected.y, sizes.y, tensors),
        "input's gradient": units(whole([r.dx for r in actual]), expected.dx, sizes.dx, tensors),
    }
    if expected.parameters:
        totals = [np.sum(parts, 0, np.longdouble) for parts in zip(*(r.parameters for r in actual))]
        found["parameters' gradients"] = max(
            units(*values, vectors) for values in zip(totals, expected.parameters, sizes.parameters)
        )
    if expected.running:
        found["running statistics"] = max(
            units(*values, vectors) for r in actual for values in zip(r.running, expected.running, sizes.running)
        )
    return found


def compare(case: Case, given: Problem, actual: List[Results]) -> Dict[str, Dict[str, float]]:
    """Returns the errors by column and quantity."""
    exact, torchs = extended(case, given), oracle(case, given)
    found = {name(case.dtype): errors(case.dtype, actual, torchs, exact.sizes)}
    if case.dtype == torch.float64:
        found[EXACT] = errors(case.dtype, actual, *exact)
        found[TORCHS_OWN] = errors(case.dtype, [torchs], *exact)
    return found


Found = Dict[Case, Dict[str, Dict[str, float]]]  # As `compare` returns it.


def measure(target: str, chosen: List[Case]) -> Found:
    """Runs the cases, those of one row of workers together."""
    found: Found = {}
    for batches, sizes in BATCHES.items():
        mine = [case for case in chosen if case.batches == batches]
        if not mine:
            continue
        given = [problem(case) for case in mine]
        results: List[List[Any]] = [[] for _ in sizes]

        def run(rank: int) -> None:
            with syncbn.Worker(target, f"parity {batches}", rank, len(sizes)) as worker:
                for case, start in zip(mine, given):
                    results[rank].append(work(worker, case, start))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, (case, start) in enumerate(zip(mine, given)):
            found[case] = compare(case, start, [own[index] for own in results])
    return found


class Row(NamedTuple):
    label: str
    cases: int
    cells: Tuple[Optional[float], ...]  # By BOUNDS.


def name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


def labels(case: Case) -> List[str]:
    """The rows that a case counts in, one of each section."""
    tracking = {"momentum": f"momentum={MOMENTUM}", "cumulative": "momentum=None", "off": "track_running_stats=False"}
    epsilon = {"add": "eps_mode=add", "clamp": "eps_mode=clamp"}[case.options.mode]
    return [
        f"{case.rank}-D, {CLASSES[case.rank].__name__}",
        case.layout,
        f"batches {case.batches}: {'+'.join(map(str, BATCHES[case.batches]))}",
        f"affine={case.options.affine}",
        tracking[case.options.tracking],
        f"{epsilon}, eps={case.options.eps:g}",
    ]


def sections() -> List[List[str]]:
    """The tables' row labels."""
    return [list(QUANTITIES), *(list(dict.fromkeys(section)) for section in zip(*map(labels, cases())))]


def rows(found: Found) -> List[Row]:
    """Each cell is the largest error of the row's cases in one column."""
    table = []
    for section in sections():
        for label in section:
            counts = 0
            largest: Dict[str, float] = {}
            for case, columns in found.items():
                counted = False
                for column, of_case in columns.items():
                    values = [of_case[label]] if label in of_case else of_case.values() if label in labels(case) else ()
                    for value in values:
                        largest[column], counted = max(value, largest.get(column, 0.0)), True
                counts += counted
            table.append(Row(label, counts, tuple(largest.get(column) for column in BOUNDS)))
    return table


def render(table: List[Row]) -> str:
    lines = ["| | cases | " + " | ".join(BOUNDS) + " |", "|---|--:|" + "--:|" * len(BOUNDS)]
    for row in table:
        cells = ["" if cell is None else f"{cell:.1f}" for cell in row.cells]
        lines.append(" | ".join([f"| {row.label}", f"{row.cases:,}", *cells]) + " |")
    return "\n".join(lines)


def committed() -> List[Row]:
    """The README's table."""
    table = []
    text = README.read_text().split(BEGIN)[1].split(END)[0]
    for line in re.findall(r"^\| (?!\|)(.*) \|$", text, re.MULTILINE):
        label, count, *cells = (cell.strip() for cell in line.split("|"))
        table.append(Row(label, int(count.replace(",", "")), tuple(float(c) if c else None for c in cells)))
    return table


def beyond_bounds(table: List[Row]) -> List[str]:
    return [
        f"{row.label}, {column}: {cell:.1f} roundoffs, not {bound:g}"
        for row in table
        for (column, bound), cell in zip(BOUNDS.items(), row.cells)
        if cell is not None and not cell <= bound
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the README's table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with syncbn.Master() as master:
        table = render(rows(measure(master.target, list(cases()))))
    if not options.write:
        print(table)
        return
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
