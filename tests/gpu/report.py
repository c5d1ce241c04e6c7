#!/usr/bin/env python3
"""Holds what tools/gpu_check measured against its targets, writes the full tables, prints the short one.

    report.py RESULTS [--rehearsal]       a folder: reads its stages.tsv and *.json, writes report.md and results.json

Needs no torch and no GPU. What was not measured is said to be so.
"""

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

Row = Dict[str, Any]  # As bench.py writes them.

# Tensors that each operation has to read or write.
FLOOR = {"stats": 1, "elemt": 2, "backward_reduce": 2, "backward_elemt": 3, "forward": 3, "backward": 5,
         "elemt, residual": 3, "backward_reduce, mask": 2, "backward_elemt, residual": 4}
PREDICTIONS = pathlib.Path(__file__).with_name("predictions.json")
LARGE = 50e6  # Bytes of a tensor.
MEDIUM = 12.5e6  # "13 MB" rounded: 32x2048x7x7 in float32 is 12.8.


class Target(NamedTuple):
    """One cell of the table of targets: `value` of each row that it is about is at least (at most) `bound`."""

    operation: str
    name: str
    bound: float
    value: Callable[[Row], Optional[float]]  # None: the row is not about this.
    unit: str = "x"  # "%": a share; "us": microseconds, and the bound is an upper one.

    def meets(self, value: float) -> bool:
        return value <= self.bound if self.unit == "us" else value >= self.bound

    def worst(self, values: List[float]) -> float:
        return max(values) if self.unit == "us" else min(values)

    def show(self, value: float) -> str:
        return {"%": f"{value:.1%}", "us": f"{value:.2f} us"}.get(self.unit, f"{value:.2f}x")


class Cell(NamedTuple):
    """A target with what was measured for it."""

    target: Target
    values: List[float]
    worst: Optional[Row]

    @property
    def verdict(self) -> str:
        if not self.values:
            return "not measured"
        met = sum(map(self.target.meets, self.values))
        return "met" if met == len(self.values) else f"MISSED by {len(self.values) - met} of {len(self.values)}"


def of_copy(row: Row) -> float:
    """The operation's least traffic over its time, relative to a copy's traffic over its time."""
    return (FLOOR[row["operation"]] / row["us"]) / (2 / row["copy_us"])


def _copy_target(operation: str, bound: float, least: float, below: float, name: str) -> Target:
    def value(row: Row) -> Optional[float]:
        return of_copy(row) if least <= row["bytes"] < below and row["cache"] == "cold" else None

    return Target(operation, f"{name} of copy bandwidth", bound, value, "%")


def _versus(operation: str, rival: str, bound: float, **fields: Any) -> Target:
    """At least `bound` times as fast as a rival, for tensors of 13 MB and more whose row has these fields."""

    def value(row: Row) -> Optional[float]:
        for key, wanted in fields.items():
            if key == "most_channels":
                if row["channels"] > wanted:
                    return None
            elif row[key] != wanted:
                return None
        theirs = row["rivals"].get(rival) if row["cache"] == "cold" else None
        return theirs / row["us"] if theirs and row["bytes"] >= MEDIUM else None

    words = [str(fields[k]) for k in ("layout", "type") if k in fields]
    words += [f"C={fields['channels']}"] if "channels" in fields else []
    words += [f"C<={fields['most_channels']}"] if "most_channels" in fields else []
    return Target(operation, f"{rival}, {' '.join(words)}", bound, value)


def _targets() -> List[Target]:
    targets = []
    for operation, large, medium in (
        ("stats", 0.92, 0.75), ("elemt", 0.93, 0.85), ("backward_reduce", 0.90, 0.75), ("backward_elemt", 0.92, 0.85),
    ):
        targets.append(_copy_target(operation, large, LARGE, float("inf"), "X >= 50 MB:"))
        targets.append(_copy_target(operation, medium, MEDIUM, LARGE, "13 to 50 MB:"))
        first = {"layout": "NCHW", "type": "fp32"}
        if operation == "stats":
            targets.append(_versus(operation, "torch", 10, channels=64, **first))
            targets.append(_versus(operation, "torch", 4, channels=256, **first))
            targets.append(_versus(operation, "torch", 50, most_channels=4, **first))
        elif operation == "backward_reduce":
            targets.append(_versus(operation, "torch", 5, channels=64, **first))
            targets.append(_versus(operation, "torch", 1.5, channels=256, **first))
        else:
            targets.append(_versus(operation, "torch", 1.1, **first))
        fp32, bf16 = {"stats": (1.7, 2.5), "backward_reduce": (1.2, 1.8)}.get(operation, (1.05, 1.4))
        targets.append(_versus(operation, "torch", fp32, layout="NHWC", type="fp32"))
        targets.append(_versus(operation, "torch", bf16, layout="NHWC", type="bf16"))
    targets.append(_versus("forward", "cudnn", 1.7, layout="NCHW"))
    targets.append(_versus("forward", "cudnn", 1.0, layout="NHWC"))
    targets.append(Target("stats with flag", "8x64x7x7", 4.0, lambda row: row["us"], "us"))
    return targets


TARGETS = _targets()


def evaluate(rows: List[Row]) -> List[Cell]:
    """Every target with the values of the rows that it is about."""
    cells = []
    for target in TARGETS:
        found = [(target.value(row), row) for row in rows if row["operation"] == target.operation]
        known = [(value, row) for value, row in found if value is not None]
        pick = max if target.unit == "us" else min
        worst = pick(known, key=lambda pair: pair[0])[1] if known else None
        cells.append(Cell(target, [value for value, _ in known], worst))
    return cells


def describe(row: Optional[Row]) -> str:
    return "" if row is None else f"{row['shape']} {row['layout']} {row['type']}"


def table(head: List[str], lines: List[List[str]]) -> str:
    """A table in Markdown whose source lines up as well."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def row(line: List[str]) -> str:
        return "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |"

    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])


def target_table(cells: List[Cell]) -> str:
    lines = []
    for target, values, worst in cells:
        cell = Cell(target, values, worst)
        numbers = [target.show(f(values)) if values else "" for f in (target.worst, statistics.median)]
        sign = "<=" if target.unit == "us" else ">="
        lines.append([target.operation, target.name, f"{sign} {target.show(target.bound)}", *numbers, cell.verdict,
                      describe(worst)])
    return table(["operation", "against", "target", "worst", "median", "", "worst for"], lines)


class Prediction(NamedTuple):
    """A prediction: the figures that a row was expected to show before any GPU had run it."""

    low: float
    high: float
    unit: str  # "of copy": a share; "us".

    def show(self) -> str:
        form = "{:.0%}" if self.unit == "of copy" else "{:.1f} us"
        ends = dict.fromkeys(map(form.format, (self.low, self.high)))
        return "-".join(ends)

    def judge(self, row: Row) -> str:
        """The sign of a time that lies outside by more than a tenth, as the reader wants to know: worse, or better."""
        value = of_copy(row) if self.unit == "of copy" else row["us"]
        below, above = value < 0.9 * self.low, value > 1.1 * self.high
        worse, better = (below, above) if self.unit == "of copy" else (above, below)
        return "worse" if worse else "better" if better else "as predicted"


def _key(row: Row) -> Tuple[str, ...]:
    return row["shape"], row["layout"], row["type"], row["operation"]


def read_predictions() -> Dict[Tuple[str, ...], Prediction]:
    rows = json.loads(PREDICTIONS.read_text(encoding="utf-8"))["rows"]
    return {_key(row): Prediction(row["low"], row["high"], row["unit"]) for row in rows}


def prediction_table(rows: List[Row]) -> str:
    """The rows that have a prediction, each beside it."""
    predictions, lines = read_predictions(), []
    for row in rows:
        predicted = predictions.get(_key(row))
        if predicted is None or row["cache"] != ("hot" if row["operation"] == "stats with flag" else "cold"):
            continue
        share = f"{of_copy(row):.0%}" if row["operation"] in FLOOR else ""
        lines.append([*_key(row), f"{row['us']:.2f}", share, predicted.show(), predicted.judge(row)])
    return table(["shape", "layout", "type", "operation", "us", "of copy", "predicted", ""], lines)


def kernel_table(rows: List[Row]) -> str:
    rivals = sorted({rival for row in rows for rival in row["rivals"]}, reverse=True)
    lines = []
    for row in rows:
        floor = FLOOR.get(row["operation"])
        rate = f"{floor * row['bytes'] / row['us'] * 1e-3:.0f}" if floor else ""
        share = f"{of_copy(row):.0%}" if floor and row["cache"] == "cold" else ""
        ratios = [f"{row['rivals'][r] / row['us']:.2f}" if row["rivals"].get(r) else "" for r in rivals]
        lines.append([row["shape"], row["layout"], row["type"], row["operation"], row["cache"],
                      f"{row['us']:.2f}", rate, share, *ratios])
    head = ["shape", "layout", "type", "operation", "cache", "us", "GB/s", "of copy", *(f"x {r}" for r in rivals)]
    return table(head, lines)


def phase_table(phases: Dict[str, Any]) -> str:
    lines = [
        [row["phase"], row["how"], *(f"{row[k]:.2f}" for k in ("median_us", "p90_us")),
         f"{row['uncertainty_us']:.2f}" if row.get("uncertainty_us") else ""]
        for row in phases["rows"]
    ]
    return table(["phase", "how", "median us", "p90 us", "clocks agree to, us"], lines)


def step_table(worker: Dict[str, Any]) -> str:
    lines = []
    for row in worker["rows"]:
        theirs = row.get("torch_ms")
        lines.append([str(row["processes"]), row["shape"], f"{row['syncbn_ms']:.3f}",
                      f"{theirs:.3f}" if theirs else row.get("why", "not measured"),
                      f"{theirs / row['syncbn_ms']:.2f}" if theirs else ""])
    return table(["processes", "shape", "syncbn ms", "torch over gloo ms", "x torch"], lines)


def layer_table(layers: Dict[str, Any]) -> str:
    """A network's layers in each mode, beside torch's own layers that synchronize nothing."""
    lines = []
    for row in layers["rows"]:
        alone = next((r["ms"] for r in layers["rows"] if r["mode"] == "torch, alone"), None)
        each = (row["ms"] - alone) * 1e3 / row["layers"] if alone else None
        lines.append([row["mode"], row["peers"], str(row["layers"]), f"{row['ms']:.2f}",
                      f"{each:.0f}" if each is not None else ""])
    return table(["mode", "other workers", "layers", "ms a step", "us a layer beyond torch"], lines)


def variant_table(variants: Dict[str, Any]) -> str:
    """The time of each library relative to the one that has the choices that are made, by kernel and shape."""
    base = {_key(row): row["us"] for row in variants["default"]["rows"]}
    names = [name for name in variants if name != "default"]
    lines = []
    for key, us in base.items():
        ratios = []
        for name in names:
            theirs = next((row["us"] for row in variants[name]["rows"] if _key(row) == key), None)
            ratios.append(f"{theirs / us:.2f}" if theirs else "")
        lines.append([*key, f"{us:.2f}", *ratios])
    return table(["shape", "layout", "type", "operation", "us", *names], lines)


def training_lines(summary: Dict[str, Any]) -> List[str]:
    difference = summary["differences"]["synchronized"]["last"]["parameters"]
    single = summary["float32_first_step"]
    return [
        f"Training on {summary.get('devices', '?')}, {summary['steps']} steps in float64: parameters differ from one "
        f"process on the whole batch by {difference:.1e} (bound 1e-9).",
        f"One step in float32: outputs {single['outputs']:.1e}, gradients {single['gradients']:.1e} (bound "
        f"{single['bound']:.1e}).",
    ]


def stage_table(stages: List[List[str]]) -> str:
    return table(["stage", "outcome", "seconds", ""], stages)


def read_stages(folder: pathlib.Path) -> List[List[str]]:
    path = folder / "stages.tsv"
    if not path.exists():
        return []
    lines = [(line.split("\t") + [""] * 4)[:4] for line in path.read_text(encoding="utf-8").splitlines()]
    # A stage that ran again counts once, with its last outcome.
    return list({line[0]: line for line in lines}.values())


def read_json(folder: pathlib.Path) -> Dict[str, Any]:
    """Returns the output of each part, by the name of its file. A file that is cut off is named, not fatal."""
    found: Dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == "results.json":
            continue
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found.setdefault("unreadable", {})[path.name] = str(error)
    return found


def write(folder: pathlib.Path, rehearsal: bool = False) -> List[str]:
    """Writes report.md and results.json; returns the short text. In a rehearsal no target is met or missed."""
    stages, parts = read_stages(folder), read_json(folder)
    kernels = parts.get("kernels", {"rows": [], "notes": ["the kernels were not timed"]})
    cells = evaluate(kernels["rows"])
    verdicts = [cell.verdict for cell in cells]
    missing = verdicts.count("not measured")
    met = verdicts.count("met")

    short = [stage_table(stages)] if stages else []
    if kernels.get("machine"):
        short.append(kernels["machine"])
    if rehearsal:
        short.append("A rehearsal: the host played the GPU, and no time means anything.")
    else:
        if missing < len(cells):
            short.append(target_table(cells))
        short.append(f"{met} targets met, {len(cells) - met - missing} missed, {missing} not measured")
    sections = ["# GPU check", *short]
    for name, key, make in (
        ("Phases of a round", "phases", phase_table),
        ("A layer's forward and backward pass, by processes that take turns at one GPU", "worker", step_table),
        ("ResNet-50's layers, forward and backward", "layers", layer_table),
    ):
        if key in parts:
            short.append(make(parts[key]))
            sections += [f"## {name}", make(parts[key])]
    if "training" in parts:
        short += training_lines(parts["training"])
        sections += ["## Training", *training_lines(parts["training"])]
    if kernels["rows"]:
        sections += ["## Kernels", kernel_table(kernels["rows"])]
        if not rehearsal:
            sections += ["## Predicted and measured", prediction_table(kernels["rows"])]
    variants = read_json(folder / "variants")
    if "default" in variants:
        sections += ["## Other choices, as multiples of the time", variant_table(variants)]
    notes = [note for part in [*parts.values(), *variants.values()] for note in part.get("notes", [])]
    notes += [f"{name} cannot be read: {why}" for name, why in parts.get("unreadable", {}).items()]
    if notes:
        short += [f"note: {note}" for note in notes]
        sections += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    everything = {
        "stages": stages, **parts,
        "targets": [{"operation": c.target.operation, "against": c.target.name, "bound": c.target.bound,
                     "values": c.values, "verdict": c.verdict} for c in cells if not rehearsal],
    }
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--rehearsal", action="store_true", help="the host played the GPU")
    options = parser.parse_args()
    print("\n\n".join(write(options.results, options.rehearsal)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
