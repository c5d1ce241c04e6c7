"""Draws the benchmarks page's ratios as one picture; `tools/benchmark plot` runs it.

    python3 tests/benchmarks/plot/plot.py tests/benchmarks/README.md docs/benchmarks.svg

The page is the only source: what it does not say is not drawn.
"""

import argparse
import pathlib
import re
import sys
from typing import Callable, Dict, List, NamedTuple, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

Row = Dict[str, str]  # A row of a table, by the titles of its columns.


class Point(NamedTuple):
    label: str
    ratio: float  # This project's time over the other's.


class Comparison(NamedTuple):
    name: str
    points: List[Point]


def tables(text: str) -> List[List[Row]]:
    """The Markdown tables in a text."""

    def cells(line: str) -> List[str]:
        return [cell.strip() for cell in line.strip().strip("|").split("|")]

    result = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = block.splitlines()
        result.append([dict(zip(cells(head), cells(row))) for row in rows])
    return result


def points(rows: Sequence[Row], column: str, label: Callable[[Row], str]) -> List[Point]:
    """The ratios of a column, in the order of rows; a cell without a number has none."""
    found = [(label(row), re.match(r"\d+\.\d+", row[column])) for row in rows]
    return [Point(name, float(ratio.group())) for name, ratio in found if ratio is not None]


def comparisons(page: str) -> List[Comparison]:
    """What is drawn, from the top to the bottom.

    Raises: ValueError or KeyError if the page lacks a part or a column.
    """
    rounds = [row for row in tables(report.split(page, "round")[1])[0] if row["C"] == "256" and row["W"] != "1"]

    def of_rounds(column: str) -> List[Point]:
        return points(rounds, column, lambda row: f"{row['W']}: ")

    cells = tables(report.split(page, "kernels")[1])[0]

    def of_kernels(kind: str, order: str) -> List[Point]:
        chosen = [row for row in cells if row["type"] == kind and row["channels"] == order]
        return points(chosen, "ratio, both", lambda row: "")

    return [
        Comparison("round, shared memory\nbeside OpenMPI", of_rounds("memory / MPI")),
        Comparison("round, shared memory\nbeside raw unix sockets (the floor)", of_rounds("memory / raw unix")),
        Comparison("round, TCP\nbeside torch's gloo", of_rounds("TCP / gloo")),
        Comparison("round, TCP\nbeside raw TCP sockets (the floor)", of_rounds("TCP / raw TCP")),
        *(
            Comparison(f"CPU kernels beside torch's,\n{kind}, channels {order}", of_kernels(kind, order))
            for kind in ("float32", "bfloat16")
            for order in ("first", "last")
        ),
    ]


def told(comparison: Comparison) -> str:
    """The ratios as the picture's margin has them."""
    return "   ".join(f"{point.label}{point.ratio:.2f}" for point in comparison.points)


def draw(drawn: Sequence[Comparison], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, and the same page makes the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "syncbn", "font.size": 9})
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(drawn) + 1), layout="constrained")
    axes.set_xscale("log")
    axes.axvspan(1e-3, 1, color="#2a7f62", alpha=0.08, linewidth=0)
    axes.axvline(1, color="#444444", linewidth=1)
    ratios = [point.ratio for comparison in drawn for point in comparison.points]
    axes.set_xlim(min(ratios) / 1.5, max(ratios) * 1.5)
    for y, comparison in enumerate(drawn):
        for point in comparison.points:
            color = "#2a7f62" if point.ratio <= 1 else "#b5542c"
            axes.plot(point.ratio, y, "o", color=color, markersize=6)
    margin = axes.secondary_yaxis("right")
    for axis, texts in ((axes, [c.name for c in drawn]), (margin, [told(c) for c in drawn])):
        axis.set_yticks(range(len(drawn)), texts)
        axis.tick_params(axis="y", length=0)
    axes.set_ylim(len(drawn) - 0.5, -0.7)
    ticks = [tick for tick in (0.03, 0.1, 0.3, 1, 3, 10) if min(ratios) / 1.5 < tick < max(ratios) * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time over the other's time: left of 1, in green, syncbn is faster\nat the right: workers and ratio, or the ratios of three shapes")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
        margin.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path, help="an SVG file")
    options = parser.parse_args()
    draw(comparisons(options.page.read_text()), options.picture)
    print(f"{options.picture} shows the ratios of {options.page}")


if __name__ == "__main__":
    main()
