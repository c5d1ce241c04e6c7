"""How far SyncBatchNorm is from torch.nn.BatchNorm* on the whole batch in float64, for all that it takes.

    tools/python client/python/tests/parity.py            print the table
    tools/python client/python/tests/parity.py --write    put it into client/python/README.md

Each case is one training step of one to four workers: outputs, the input's gradient, the parameters' gradients (summed
over the workers) and the running statistics. Errors count in unit roundoffs of the type that holds the result, relative
to the channel's largest absolute value: 1 is what rounding the exact result alone can cost.
"""

import argparse
import itertools
import pathlib
import re
import sys
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch

import syncbn
import syncbn.torch as sync

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
SEED = 4021
CHANNELS = 5
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
# No cell may exceed these. In float64 the oracle rounds as much as what it judges.
BOUNDS = {torch.float64: 128.0, torch.float32: 1.5, torch.float16: 1.05, torch.bfloat16: 1.05}


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
    """What a case starts with; in float64, x and dy exact in the case's type, the rest in `parameter_type`."""

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
        "momentum": None if options.tracking == "cumulative" else 0.3,
        "affine": options.affine,
        "track_running_stats": options.tracking != "off",
    }


class Results(NamedTuple):
    y: torch.Tensor
    dx: torch.Tensor
    parameters: List[torch.Tensor]
    running: List[torch.Tensor]


class Clamped(torch.nn.modules.batchnorm._BatchNorm):
    """invstd = 1/sqrt(max(var, eps)), which torch does not have, by autograd."""

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
    return Results(
        y.detach(),
        x.grad,
        [parameter.grad for parameter in layer.parameters()],
        [buffer for name, buffer in layer.named_buffers() if name != "num_batches_tracked"],
    )


def oracle(case: Case, given: Problem) -> Results:
    kind = CLASSES[case.rank] if case.options.mode == "add" else Clamped
    layer = kind(CHANNELS, **arguments(case.options)).double()
    layer.load_state_dict(given.state)
    return step(layer, given.x.clone(), given.dy)


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


def units(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, size: Optional[torch.Tensor] = None
) -> float:
    """The largest error of [N, C, ...] or [C], in roundoffs of each channel's largest value (or of `size` [C])."""
    by_channel = lambda v: v.transpose(0, 1).flatten(1) if v.dim() > 1 else v[:, None]  # noqa: E731
    wanted = by_channel(expected.double())
    error = (by_channel(actual.double()) - wanted).abs().amax(1)
    scale = wanted.abs().amax(1) if size is None else size
    return float((error / (scale * ROUNDOFF[dtype])).max())


def errors(case: Case, given: Problem, expected: Results, results: List[Results]) -> Dict[str, float]:
    """By quantity; quantities that the case lacks are absent."""
    found = {
        "output": units(torch.cat([r.y for r in results]), expected.y, case.dtype),
        "input's gradient": units(torch.cat([r.dx for r in results]), expected.dx, case.dtype, _dx_size(case, given)),
    }
    narrow = parameter_type(case.dtype)
    if expected.parameters:
        # The sum over the batch may cancel; its terms do not.
        dims = [d for d in range(given.x.dim()) if d != 1]
        hat = (expected.y - expand(given.state["bias"], given.x)) / expand(given.state["weight"], given.x)
        sizes = [(given.dy * hat).abs().sum(dims), given.dy.abs().sum(dims)]
        totals = [torch.stack(parts).double().sum(0) for parts in zip(*(r.parameters for r in results))]
        found["parameters' gradients"] = max(
            units(total, wanted, narrow, size) for total, wanted, size in zip(totals, expected.parameters, sizes)
        )
    if expected.running:
        found["running statistics"] = max(
            units(value, wanted, narrow) for r in results for value, wanted in zip(r.running, expected.running)
        )
    return found


def expand(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def _dx_size(case: Case, given: Problem) -> torch.Tensor:
    """[C]: the largest term of dx = weight * invstd * (dy - ...), whose sum may cancel."""
    dims = [d for d in range(given.x.dim()) if d != 1]
    var, eps = given.x.var(dims, unbiased=False), case.options.eps
    invstd = (var + eps if case.options.mode == "add" else var.clamp(min=eps)).rsqrt()
    return given.dy.abs().amax(dims) * invstd * given.state.get("weight", torch.ones(()))


def measure(target: str, chosen: List[Case]) -> Dict[Case, Dict[str, float]]:
    """Runs the cases, those of one row of workers together."""
    found: Dict[Case, Dict[str, float]] = {}
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
            found[case] = errors(case, start, oracle(case, start), [own[index] for own in results])
    return found


class Row(NamedTuple):
    label: str
    cases: int
    cells: Tuple[Optional[float], ...]  # By TYPES.


def name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


def labels(case: Case) -> List[str]:
    """The rows that a case counts in, one of each section."""
    tracking = {"momentum": "momentum=0.3", "cumulative": "momentum=None", "off": "track_running_stats=False"}
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


def rows(found: Dict[Case, Dict[str, float]]) -> List[Row]:
    """Each cell is the largest error of the row's cases in one type."""
    table = []
    for section in sections():
        for label in section:
            counts, largest = 0, {}  # type: int, Dict[torch.dtype, float]
            for case, of_case in found.items():
                values = [of_case[label]] if label in of_case else of_case.values() if label in labels(case) else ()
                counts += bool(values)
                for value in values:
                    largest[case.dtype] = max(value, largest.get(case.dtype, 0.0))
            table.append(Row(label, counts, tuple(largest.get(dtype) for dtype in ROUNDOFF)))
    return table


def render(table: List[Row]) -> str:
    lines = ["| | cases | " + " | ".join(map(name, ROUNDOFF)) + " |", "|---|--:|" + "--:|" * len(ROUNDOFF)]
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
        f"{row.label}, {name(dtype)}: {cell:.1f} roundoffs, not {bound:g}"
        for row in table
        for (dtype, bound), cell in zip(BOUNDS.items(), row.cells)
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
