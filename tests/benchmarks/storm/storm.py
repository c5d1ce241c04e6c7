"""Kills the master, workers, or both, thousands of times, while workers synchronize one step after the other.

`tools/benchmark storm` runs it. The workers are storm/worker_main.cc, which compares every bit of every result with
what the contributions say. A worker that is killed goes on from its last step but one, as a training does from its
checkpoint; the policy is WAIT, so no step may be lost. The first error, wrong bit or hang ends the storm with code 1,
and with the seed and the number of the kill.
"""

import argparse
import os
import pathlib
import random
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Optional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

WORLD = 3
# The time after which a wait is a hang. Recovery takes well under a second on an idle machine.
PATIENCE = 300.0
TRANSPORTS = {"shared memory": "", "gRPC": "off"}
VICTIMS = ("masters", "workers", "both")


class Broken(Exception):
    """A process has ended that nobody killed, or hangs, or is not what the storm is about."""


class Process:
    """A process that is told nothing and says something on its standard output."""

    def __init__(self, command: List[str], shared_memory: str) -> None:
        environment = {**os.environ, "SYNCBN_SHARED_MEMORY": shared_memory}
        self.command = command
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment)
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def read(self) -> bytes:
        """Returns what it has said by now, at least a byte."""
        said = os.read(self.output.fileno(), 1 << 16)
        if not said:
            raise Broken(f"{self.command} ended with code {self.process.wait()}")
        return said

    def kill(self) -> bytes:
        """Returns what it had said and nobody has read."""
        self.process.kill()
        said = self.output.read()
        self.process.wait()
        self.output.close()
        return said


class Storm:
    """A master and workers of one transport, who die on demand."""

    def __init__(self, directory: pathlib.Path, transport: str, seed: int) -> None:
        self.seed = seed
        self.shared_memory = TRANSPORTS[transport]
        self.address = f"unix:{directory / 'master'}" if self.shared_memory == "" else "127.0.0.1:0"
        self.selector = selectors.DefaultSelector()
        self.start_master()
        # Later masters take the port of the first.
        self.address = self.master.read().decode().split()[-1]
        self.done = [0] * WORLD  # Steps, by rank.
        self.workers: List[Process] = [None] * WORLD  # type: ignore[list-item]
        for rank in range(WORLD):
            self.start_worker(rank)

    def start_master(self) -> None:
        command = [os.environ["SYNCBN_MASTER"], "--address", self.address, "--max-lifetime", "3600"]
        self.master = Process([*command, "--log-level", "error"], self.shared_memory)
        self.selector.register(self.master.output, selectors.EVENT_READ, None)

    def start_worker(self, rank: int) -> None:
        # The newest step but one: the master may die before the others have read of the end of the newest.
        first = max(0, self.done[rank] - 1)
        arguments = [self.address, *(str(number) for number in (rank, WORLD, self.seed, first))]
        self.workers[rank] = Process([os.environ["SYNCBN_STORM_WORKER"], *arguments], self.shared_memory)
        self.selector.register(self.workers[rank].output, selectors.EVENT_READ, rank)

    def replace_master(self) -> None:
        self.selector.unregister(self.master.output)
        self.master.kill()
        self.start_master()

    def replace_worker(self, rank: int) -> None:
        worker = self.workers[rank]
        self.selector.unregister(worker.output)
        self.note(rank, worker.kill())
        self.start_worker(rank)

    def note(self, rank: int, said: bytes) -> None:
        for (step,) in struct.iter_unpack("=Q", said):
            self.done[rank] = step

    def read(self, timeout: float) -> None:
        """Takes in what the processes have said, or what they say first within so many seconds."""
        for key, _ in self.selector.select(timeout):
            if key.data is None:
                self.master.read()
            else:
                self.note(key.data, self.workers[key.data].read())

    def await_steps(self, more: int) -> float:
        """Waits until each worker has done so many steps more than any has by now; returns the seconds."""
        begin = time.monotonic()
        self.read(0)
        aim = max(self.done) + more
        while min(self.done) < aim:
            if time.monotonic() - begin > PATIENCE:
                raise Broken(f"no step within {PATIENCE:.0f} s: the workers have done {self.done}, and were to do {aim}")
            self.read(1.0)
        return time.monotonic() - begin

    def check_transport(self, transport: str) -> None:
        """Raises Broken unless each worker maps the memory that it shares with the master, or none does."""
        maps = [pathlib.Path(f"/proc/{worker.process.pid}/maps").read_text() for worker in self.workers]
        if any(("/syncbn-" in text) != (transport == "shared memory") for text in maps):
            raise Broken(f"the workers do not speak to the master by {transport}")

    def stop(self) -> None:
        for process in [self.master, *filter(None, self.workers)]:
            process.kill()
        self.selector.close()


def strike(storm: Storm, victims: str, randomly: random.Random) -> bool:
    """Kills and replaces the master, a worker or both; returns whether a worker was among them."""
    if victims != "masters":
        storm.replace_worker(randomly.randrange(WORLD))
    if victims != "workers":
        storm.replace_master()
    return victims != "masters"


def run(transport: str, victims: str, kills: int, seed: int) -> Dict[str, float]:
    """Kills so many times; returns the steps that were done meanwhile and the longest recovery, in seconds."""
    randomly = random.Random(f"{transport} {victims} {seed}")
    longest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        storm = Storm(pathlib.Path(directory), transport, seed)
        times = 0
        try:
            storm.await_steps(1)
            storm.check_transport(transport)
            for times in range(1, kills + 1):
                time.sleep(randomly.uniform(0.0, 0.01))  # To strike at any moment of a step.
                worker_died = strike(storm, victims, randomly)
                # Every fourth master or so dies while the workers come back to it. Of the workers one at a time may
                # be away: two that die with the master take their parts of a round along.
                if worker_died or randomly.random() < 0.75 or times == kills:
                    longest = max(longest, storm.await_steps(2))
        except Broken as error:
            raise SystemExit(f"storm: {transport}, {victims}, seed {seed}, kill {times}: {error}") from None
        finally:
            storm.stop()
        return {"steps": min(storm.done), "longest": longest}


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark storm", description=__doc__)
    for victims, kills in zip(VICTIMS, (8000, 1000, 1000)):
        parser.add_argument(f"--{victims}", type=int, default=kills, help="how often, half of it for each transport")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args(arguments)
    provenance = report.provenance("tools/benchmark storm")
    head = ["killed", "transport", "times", "steps", "hangs", "wrong results", "longest recovery, s"]
    rows = []
    for victims in VICTIMS:
        for transport in TRANSPORTS:
            kills = getattr(options, victims) // len(TRANSPORTS)
            result = run(transport, victims, kills, options.seed)
            # A hang or a wrong result ends the program.
            values = (victims, transport, kills, result["steps"], 0, 0, f"{result['longest']:.1f}")
            rows.append([str(value) for value in values])
            print(" ".join(rows[-1]), file=sys.stderr)
    report.publish("storm", [provenance, "", *report.table(head, rows)], options.output)


if __name__ == "__main__":
    main()
