"""Compares the rounds of this build with those of another, such as an older commit's checkout.

    bazel build //server:syncbn-master //tests/benchmarks/round:worker     # here and there
    python3 tests/benchmarks/round/against.py ../older

Masters and workers of both builds are alive together and take turns in random order. CPU time drifts less than latency
on a machine that does other work.
"""

import argparse
import contextlib
import pathlib
import random
import statistics
import sys
from typing import Dict, List, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import round as rounds  # noqa: E402
from round import report  # noqa: E402

_THIS = pathlib.Path(__file__).resolve().parents[3]

Ratios = List[Tuple[float, float]]  # Latency and CPU time, this build's over the other's, of each start.


def binaries(checkout: pathlib.Path) -> rounds.Binaries:
    built = checkout / "bazel-bin"
    return rounds.Binaries(str(built / "server/syncbn-master"), str(built / "tests/benchmarks/round/worker"), "")


def one_start(
    options: argparse.Namespace, world_size: int, names: List[str], result: Dict[Tuple[str, int], Ratios]
) -> None:
    """Starts both builds, and adds the ratios of the medians of their blocks."""
    runs: Dict[Tuple[bool, str, int], List[rounds.Block]] = {}
    with contextlib.ExitStack() as stack:
        builds = {
            this: stack.enter_context(rounds.teams(binaries(_THIS if this else options.other), world_size, names))
            for this in (True, False)
        }
        for _ in range(options.repeats):
            turns = [(this, name, c) for this in builds for name in names for c in options.channels]
            random.shuffle(turns)
            for this, name, c in turns:
                block = builds[this][name].run(rounds.Size(c), options.rounds)
                runs.setdefault((this, name, c), []).append(block)
    for name, c in result:
        here, there = runs[True, name, c], runs[False, name, c]
        latency = statistics.median(a.median for a in here) / statistics.median(b.median for b in there)
        cpu = statistics.median(a.cpu for a in here) / statistics.median(b.cpu for b in there)
        result[name, c].append((latency, cpu))


def spread(values: List[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    def numbers(text: str) -> List[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=pathlib.Path, help="a checkout in which both programs are built")
    parser.add_argument("--workers", type=numbers, default=[2, 4, 8], help="2,4,8")
    parser.add_argument("--channels", type=numbers, default=[256, 2048], help="256,2048")
    parser.add_argument("--transports", default=f"{rounds.TCP},{rounds.UNIX}", help="of TCP, unix and memory")
    parser.add_argument("--teams", type=int, default=5, help="how often all processes are started anew")
    parser.add_argument("--repeats", type=int, default=4, help="blocks of each build and size for each start")
    parser.add_argument("--rounds", type=int, default=200, help="rounds in a block")
    options = parser.parse_args()
    names = options.transports.split(",")
    if not set(names) <= {rounds.TCP, rounds.UNIX, rounds.MEMORY}:
        parser.error(f"--transports {options.transports} is not a list of TCP, unix and memory")
    provenance = report.provenance("tests/benchmarks/round/against.py")
    rows = []
    for world_size in options.workers:
        print(f"against: {world_size} workers", file=sys.stderr)
        result: Dict[Tuple[str, int], Ratios] = {(name, c): [] for name in names for c in options.channels}
        for _ in range(options.teams):
            one_start(options, world_size, names, result)
        for (name, c), ratios in result.items():
            latency, cpu = zip(*ratios)
            rows.append([str(world_size), str(c), name, spread(list(latency)), spread(list(cpu))])
    report.publish("against", [provenance, "", *report.table(["W", "C", "", "p50", "CPU"], rows)], None)


if __name__ == "__main__":
    main()
