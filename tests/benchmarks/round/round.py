"""Measures one synchronous round beside its floor and its peers; `tools/benchmark round` runs it.

Every worker is a process, and so is every server. All variants of a size are alive together and take turns in short
blocks, in random order, since the machine's speed drifts by more than the variants differ. A ratio is that of two
blocks' medians; of each start of the processes its median is taken, and the median, the least and the greatest of all
starts are told. Only ratios should be compared between runs.
"""

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple, Union

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

_HERE = pathlib.Path(__file__).resolve().parent
_WARM_UP = 10  # Rounds of each block that are not counted: the workers start one after the other.

_MOST_GLOO = 8  # Workers. Beyond, a round of gloo takes tens of milliseconds, and nothing new is learned.

TCP, UNIX, MEMORY, RAW_TCP, RAW_UNIX, GLOO, MPI = "TCP", "unix", "memory", "raw TCP", "raw unix", "gloo", "MPI"


_RATIOS = ((TCP, RAW_TCP), (UNIX, RAW_UNIX), (MEMORY, RAW_UNIX), (TCP, GLOO), (MEMORY, MPI))


class Binaries(NamedTuple):
    master: str
    worker: str
    raw_server: str


class Size(NamedTuple):
    channels: int
    layers: int = 1
    mode: str = "together"


class Block(NamedTuple):
    """The times of one block of rounds: microseconds of each worker's rounds, and CPU microseconds a worker-round."""

    latencies: List[float]
    cpu: float

    @property
    def median(self) -> float:
        return statistics.median(self.latencies)


def cpu_time(pid: int) -> float:
    """Microseconds that all threads of a process have run."""
    total = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # A thread may end at this moment.
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e3


def start(
    command: List[str], stack: contextlib.ExitStack, stderr: Any = None, memory: bool = False
) -> "subprocess.Popen[str]":
    """`memory`: whether a worker may share memory with its master."""
    environment = {**os.environ, "SYNCBN_SHARED_MEMORY": "same-user" if memory else "off"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )

    def stop() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        process.wait()

    stack.callback(stop)
    return process


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with code {process.wait()}")
    return line


class Team:
    """The workers of one variant, and their server, if it has one."""

    def __init__(self, workers: "List[subprocess.Popen[str]]", servers: "List[subprocess.Popen[str]]") -> None:
        self._workers = workers
        self._pids = [process.pid for process in [*workers, *servers]]

    def await_ready(self) -> None:
        for worker in self._workers:
            read_line(worker)

    def run(self, size: Size, rounds: int) -> Block:
        before = sum(map(cpu_time, self._pids))
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"run {size.channels} {size.layers} {size.mode} {_WARM_UP} {rounds}\n")
            worker.stdin.flush()
        latencies = [float(text) for worker in self._workers for text in read_line(worker).split()]
        cpu = sum(map(cpu_time, self._pids)) - before
        return Block(latencies, cpu / (len(self._workers) * (rounds + _WARM_UP)))


class MpiTeam:
    """OpenMPI's ranks. They are started for each block: they keep the cores busy while they wait, between blocks too."""

    def __init__(self, world_size: int) -> None:
        self._mpirun = ["mpirun", "--oversubscribe", "-n", str(world_size), sys.executable]

    def await_ready(self) -> None:
        pass

    def run(self, size: Size, rounds: int) -> Block:
        worker = [str(_HERE / "mpi_worker.py"), str(size.channels), str(_WARM_UP), str(rounds)]
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        settings = {"OMPI_MCA_btl": "self,vader"}  # Shared memory alone.
        output = subprocess.run(
            [*self._mpirun, *worker], env={**os.environ, **as_root, **settings}, check=True, stdout=subprocess.PIPE
        ).stdout
        cpu, *latencies = (float(text) for text in output.split())
        return Block(latencies, cpu)


Teams = Dict[str, Union[Team, MpiTeam]]


@contextlib.contextmanager
def teams(binaries: Binaries, world_size: int, names: List[str]) -> Iterator[Teams]:
    """Starts every variant's processes. One master serves TCP, unix sockets and shared memory alike."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        addresses = ["--address", "127.0.0.1:0", "--address", f"unix:{folder}/master"]
        master = start([binaries.master, *addresses], stack, memory=True)
        targets = dict(zip((TCP, UNIX), read_line(master).split()[-2:]))
        targets[MEMORY] = targets[UNIX]
        result: Teams = {}
        for name in names:
            if name == MPI:
                result[name] = MpiTeam(world_size)
                continue
            commands, servers = [], []
            if name in targets:
                commands, servers = [[binaries.worker, "syncbn", targets[name], name]] * world_size, [master]
            elif name == GLOO:
                commands = [[sys.executable, str(_HERE / "gloo_worker.py"), f"{folder}/store"]] * world_size
            else:
                address = "127.0.0.1:0" if name == RAW_TCP else f"unix:{folder}/raw"
                servers = [start([binaries.raw_server, address, str(world_size)], stack)]
                commands = [[binaries.worker, "raw", read_line(servers[0]).split()[-1], "-"]] * world_size
            workers = [
                start([*command, str(rank), str(world_size)], stack, memory=name == MEMORY)
                for rank, command in enumerate(commands)
            ]
            result[name] = Team(workers, servers)
        for team in result.values():
            team.await_ready()
        yield result


Runs = Dict[Tuple[str, Size], List[Block]]


def measure(
    binaries: Binaries, world_size: int, names: List[str], sizes: List[Size], options: argparse.Namespace
) -> Runs:
    """Starts all processes anew several times: where the scheduler places them changes a team's speed for its life."""
    runs: Runs = {(name, size): [] for name in names for size in sizes}
    for _ in range(options.teams):
        with teams(binaries, world_size, names) as members:
            for _ in range(options.repeats):
                take_turns(members, runs, options.rounds)
    return runs


def take_turns(members: Teams, runs: Runs, rounds: int) -> None:
    turns = list(runs)
    random.shuffle(turns)
    for name, size in turns:
        share = (10 if name == GLOO else 1) * (4 if size.mode == "apart" else 1)
        runs[name, size].append(members[name].run(size, max(rounds // share, 3)))


def ratio(runs: Runs, over: Tuple[str, Size], under: Tuple[str, Size], starts: int) -> str:
    """The median over the starts, and the range, since where the scheduler places processes is drawn at each start."""
    if over not in runs or under not in runs:
        return "–"
    ratios = [a.median / b.median for a, b in zip(runs[over], runs[under])]
    repeats = len(ratios) // starts
    each = [statistics.median(ratios[i : i + repeats]) for i in range(0, len(ratios), repeats)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"


def latency(blocks: List[Block]) -> str:
    if not blocks:
        return "–"
    values = sorted(value for block in blocks for value in block.latencies)
    return f"{statistics.median(values):.0f} / {values[int(0.99 * (len(values) - 1))]:.0f}"


def cpu(blocks: List[Block]) -> str:
    return "–" if not blocks else f"{statistics.median(block.cpu for block in blocks):.0f}"


def single_rounds(options: argparse.Namespace, binaries: Binaries, names: List[str]) -> List[str]:
    latencies, cpus = [], []
    for world_size in options.workers:
        print(f"round: {world_size} workers", file=sys.stderr)
        sizes = [Size(channels) for channels in options.channels]
        measured = [name for name in names if name != GLOO or world_size <= _MOST_GLOO]
        runs = measure(binaries, world_size, measured, sizes, options)
        for size in sizes:
            ratios = [ratio(runs, (a, size), (b, size), options.teams) for a, b in _RATIOS]
            head = [str(world_size), str(size.channels)]
            latencies.append([*head, *(latency(runs.get((name, size), [])) for name in names), *ratios])
            cpus.append([*head, *(cpu(runs.get((name, size), [])) for name in names)])
    return [
        "Microseconds of one round, p50 / p99, and ratios of p50: median, least and greatest of the starts.",
        "",
        *report.table(["W", "C", *names, *(f"{a} / {b}" for a, b in _RATIOS)], latencies),
        "",
        "CPU microseconds of all processes, a worker and round:",
        "",
        *report.table(["W", "C", *names], cpus),
    ]


def several_layers(options: argparse.Namespace, binaries: Binaries) -> List[str]:
    world_size, channels = max(w for w in options.workers if w <= 4), 256
    print(f"round: several layers, {world_size} workers", file=sys.stderr)
    rows = []
    sizes = [Size(channels, layers, mode) for layers in options.layers for mode in ("together", "apart")]
    runs = measure(binaries, world_size, [TCP, UNIX, RAW_TCP], sizes, options)
    for together, apart in zip(sizes[::2], sizes[1::2]):
        row = [str(together.layers)]
        for name in (TCP, UNIX):
            row += [latency(runs[name, together]), latency(runs[name, apart])]
            row.append(ratio(runs, (name, apart), (name, together), options.teams))
        row.append(ratio(runs, (TCP, together), (RAW_TCP, together), options.teams))
        rows.append(row)
    head = ["layers", "TCP, one frame", "TCP, one by one", "gain", "unix, one frame", "unix, one by one", "gain"]
    return [
        f"Microseconds of several layers of {channels} channels, {world_size} workers: all in one frame, and one round"
        " after the other (p50 / p99):",
        "",
        *report.table([*head, "one frame: TCP / raw TCP"], rows),
    ]


def parse() -> argparse.Namespace:
    def numbers(text: str) -> List[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="tools/benchmark round", description=__doc__)
    parser.add_argument("--workers", type=numbers, default=[1, 2, 4, 8, 16, 64], help="1,2,4,8,16,64")
    parser.add_argument("--channels", type=numbers, default=[64, 256, 2048], help="64,256,2048")
    parser.add_argument("--layers", type=numbers, default=[16, 53], help="16,53")
    parser.add_argument("--teams", type=int, default=5, help="how often all processes are started anew")
    parser.add_argument("--repeats", type=int, default=4, help="blocks of each variant and size for each start")
    parser.add_argument("--rounds", type=int, default=200, help="rounds in a block; gloo runs a tenth")
    parser.add_argument("--without-gloo", action="store_true", help="where torch is not installed")
    parser.add_argument("--without-mpi", action="store_true", help="as where there is no mpirun")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    return parser.parse_args()


def main() -> None:
    options = parse()
    binaries = Binaries(
        os.environ["SYNCBN_MASTER"], os.environ["SYNCBN_ROUND_WORKER"], os.environ["SYNCBN_RAW_SERVER"]
    )
    names = [TCP, UNIX, MEMORY, RAW_TCP, RAW_UNIX] + ([] if options.without_gloo else [GLOO])
    if shutil.which("mpirun") is not None and not options.without_mpi:
        names.append(MPI)
    provenance = report.provenance("tools/benchmark round")
    lines = [provenance, "", *single_rounds(options, binaries, names), "", *several_layers(options, binaries)]
    report.publish("round", lines, options.output)


if __name__ == "__main__":
    main()
