"""Measures what watching a master costs its rounds: everything on, beside everything off.

`tools/benchmark observability` runs it. Two masters of one program are alive together, each with workers of its own, and
take turns in blocks, in random order. One has neither HTTP nor inspection, and logs errors alone. The other logs everything
as JSON, and while its block runs, its metrics are scraped and its page is followed by a reader, each once in --period
seconds; the usual scrape is one in 15 seconds. A ratio is that of two neighbouring blocks; the table has the median of each start of
the processes, and of these the median, the least and the greatest.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from typing import Dict, Iterator, List, NamedTuple, Tuple

_BENCHMARKS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_BENCHMARKS), str(_BENCHMARKS / "round")]

import report  # noqa: E402
from round import Block, Size, Team, read_line, start  # noqa: E402

_GROUP = "watched"
ON, OFF = "on", "off"
_FLAGS = {
    ON: ["--http-address", "127.0.0.1:0", "--inspection", "on", "--log-level", "debug", "--log-format", "json"],
    OFF: ["--http-address", "off", "--inspection", "off", "--reflection", "off", "--log-level", "error"],
}


class Reader:
    """Asks a master's pages what Prometheus and an open page ask, once in so many seconds."""

    def __init__(self, address: str, period: float) -> None:
        self._address, self._period = address, period
        self.answers = 0

    def _get(self, path: str, **query: str) -> bytes:
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            body = answer.read()
        self.answers += 1
        return bytes(body)

    def _look(self) -> None:
        self._get("/metrics")
        self._get("/api/master")
        for group in json.loads(self._get("/api/groups"))["groups"]:
            name = {"job": group["job"], "group": group["group"]}
            self._get("/api/group", parts="members,pending", **name)
            self._get("/api/layers", **name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        ended = threading.Event()

        def read() -> None:
            self._look()
            while not ended.wait(self._period):
                self._look()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Pair(NamedTuple):
    teams: Dict[str, Team]
    reader: Reader


@contextlib.contextmanager
def pair(world_size: int, period: float) -> Iterator[Pair]:
    """Starts both masters, and the workers of each."""
    master, worker = os.environ["SYNCBN_MASTER"], os.environ["SYNCBN_ROUND_WORKER"]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        teams = {}
        for name, flags in _FLAGS.items():
            log = stack.enter_context((folder / name).open("w"))
            server = start([master, "--address", "127.0.0.1:0", *flags], stack, stderr=log)
            target = read_line(server).split()[-1]
            command = [worker, "syncbn", target, _GROUP]
            members = [start([*command, str(rank), str(world_size)], stack) for rank in range(world_size)]
            teams[name] = Team(members, [server])
        for team in teams.values():
            team.await_ready()
        [address] = [
            record["address"]
            for record in map(json.loads, (folder / ON).read_text().splitlines())
            if record.get("event") == "http"
        ]
        yield Pair(teams, Reader(address, period))


Runs = Dict[str, List[Block]]


def measure(world_size: int, options: argparse.Namespace) -> Tuple[Runs, int]:
    """Returns the blocks, and how many answers the reader has had."""
    runs: Runs = {ON: [], OFF: []}
    answers = 0
    size = Size(options.channels)
    for _ in range(options.teams):
        with pair(world_size, options.period) as (teams, reader):
            for _ in range(options.repeats):
                for name in random.sample([ON, OFF], 2):
                    with reader.reading() if name == ON else contextlib.nullcontext():
                        runs[name].append(teams[name].run(size, options.rounds))
            answers += reader.answers
    return runs, answers


def ratio(on: List[float], off: List[float], repeats: int) -> str:
    ratios = [a / b for a, b in zip(on, off)]
    each = [statistics.median(ratios[i : i + repeats]) for i in range(0, len(ratios), repeats)]
    return f"{statistics.median(each):.3f} ({min(each):.3f}–{max(each):.3f})"


def row(world_size: int, runs: Runs, repeats: int) -> List[str]:
    def values(name: str, figure: str) -> List[float]:
        if figure == "p50":
            return [block.median for block in runs[name]]
        return [statistics.fmean(block.latencies) if figure == "mean" else block.cpu for block in runs[name]]

    cells = [str(world_size)]
    for figure in ("p50", "mean", "cpu"):
        on, off = values(ON, figure), values(OFF, figure)
        cells += [f"{statistics.median(off):.0f}", f"{statistics.median(on):.0f}", ratio(on, off, repeats)]
    return cells


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/benchmark observability", description=__doc__)
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4], help="2,4")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--teams", type=int, default=5, help="how often all processes are started anew")
    parser.add_argument("--repeats", type=int, default=6, help="blocks of each master for each start")
    parser.add_argument("--rounds", type=int, default=5000, help="rounds in a block")
    parser.add_argument("--period", type=float, default=1.0, help="seconds between two looks at the master")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    return parser.parse_args()


def main() -> None:
    options = parse()
    provenance = report.provenance("tools/benchmark observability")
    rows, answers = [], 0
    for world_size in options.workers:
        print(f"observability: {world_size} workers", file=sys.stderr)
        runs, some = measure(world_size, options)
        rows.append(row(world_size, runs, options.repeats))
        answers += some
    head = ["W"]
    for figure in ("p50", "mean", "CPU"):
        head += [f"{figure}, off", f"{figure}, on", "on / off"]
    lines = [
        provenance,
        "",
        f"Microseconds of a round of {options.channels} channels, and CPU microseconds of all processes a worker and round; "
        f"{answers} answers over HTTP meanwhile. Ratios: median, least and greatest of {options.teams} starts.",
        "",
        *report.table(head, rows),
    ]
    report.publish("observability", lines, options.output)


if __name__ == "__main__":
    main()
