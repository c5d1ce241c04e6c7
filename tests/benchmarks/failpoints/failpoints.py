"""Has the master die at, or be refused, each kind of system call by which it has effects, while four workers train on
the digits of the quickstart; compares every bit of what they have at the end with a run that nobody disturbed.

`tools/benchmark failpoints` runs it, with strace. One training meets many masters, each with a failpoint: at its n-th
such call the kernel kills it before the call has any effect, or the call fails. The number n is counted from the
master's first instruction, or from when it is ready; strace counts each thread for itself. A master that has lived for
ten steps is killed, and so is one that leaves the workers without a step for ten seconds. After a master without a
step comes one without a failpoint.
"""

import argparse
import collections
import dataclasses
import multiprocessing.connection
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Counter, Dict, List, Optional, Sequence, Tuple

import numpy as np

_HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent), str(_HERE.parent / "deaths")]

import deaths  # noqa: E402

STEPS_OF_A_MASTER = 10
# The most time without a step that a master with a failpoint has.
IMPATIENCE = 10.0
TRANSPORTS = ("shared memory", "TCP")


@dataclasses.dataclass(frozen=True)
class Failpoint:
    """A system call, by strace's name, and its fate: "KILL", or the error that it fails with.

    most: the greatest n, for each of TRANSPORTS; 0 if masters do not make the call. A little less than the number of
    calls that one thread makes within ten steps.
    """

    call: str
    fate: str
    starting: bool  # Counts from the master's first instruction, not from when it is ready.
    most: Tuple[int, int]

    def strace(self, n: int, log: pathlib.Path) -> List[str]:
        """Returns the command that traces and strikes, without whom."""
        fate = "signal=KILL" if self.fate == "KILL" else f"error={self.fate}"
        inject = f"inject={self.call}:{fate}:when={n}"
        return ["strace", "-f", "-o", str(log), "-e", f"trace={self.call}", "-e", "signal=none", "-e", inject]


FAILPOINTS = [
    Failpoint("sendmsg", "KILL", False, (10, 300)),  # An answer by gRPC.
    Failpoint("recvmsg", "KILL", False, (20, 400)),
    Failpoint("futex", "KILL", False, (300, 16)),  # Wakes those who wait in shared memory, and other threads.
    Failpoint("epoll_wait", "KILL", False, (8, 250)),
    Failpoint("accept4", "KILL", False, (4, 5)),
    Failpoint("mmap", "KILL", False, (6, 1)),  # A segment, or memory for a thread.
    Failpoint("munmap", "KILL", False, (1, 1)),
    Failpoint("openat", "KILL", False, (8, 1)),
    Failpoint("close", "KILL", False, (8, 1)),
    Failpoint("unlink", "KILL", False, (4, 0)),  # A segment's name, once both have it.
    Failpoint("fallocate", "KILL", False, (4, 0)),
    Failpoint("setsockopt", "KILL", False, (8, 10)),
    Failpoint("clone3", "KILL", False, (1, 1)),
    Failpoint("pwrite64", "KILL", False, (6, 6)),  # The state file.
    Failpoint("mmap", "KILL", True, (105, 105)),
    Failpoint("openat", "KILL", True, (30, 30)),
    Failpoint("close", "KILL", True, (30, 30)),
    Failpoint("bind", "KILL", True, (2, 2)),
    Failpoint("listen", "KILL", True, (1, 1)),
    Failpoint("fallocate", "KILL", True, (4, 0)),
    Failpoint("clone3", "KILL", True, (10, 10)),
    Failpoint("pwrite64", "KILL", True, (6, 6)),
    Failpoint("write", "KILL", True, (1, 1)),  # The line that says that it is ready.
    Failpoint("sendmsg", "ECONNRESET", False, (10, 300)),
    Failpoint("sendmsg", "EPIPE", False, (10, 300)),
    Failpoint("recvmsg", "ECONNRESET", False, (20, 400)),
    Failpoint("accept4", "EMFILE", False, (4, 5)),
    Failpoint("accept4", "ECONNABORTED", False, (4, 5)),
    Failpoint("mmap", "ENOMEM", False, (6, 1)),
    Failpoint("openat", "EMFILE", False, (8, 1)),
    Failpoint("fallocate", "ENOSPC", False, (4, 0)),
    Failpoint("clone3", "EAGAIN", False, (1, 1)),
    Failpoint("clone3", "EAGAIN", True, (10, 10)),
    Failpoint("pwrite64", "ENOSPC", False, (6, 6)),
    Failpoint("pwrite64", "EIO", False, (6, 6)),
    Failpoint("pwrite64", "ENOSPC", True, (6, 6)),
]


class Master(deaths.Master):
    """A master with a failpoint, or none; then another one."""

    def __init__(
        self, directory: pathlib.Path, transport: str, failpoints: Sequence[Failpoint], randomly: random.Random
    ) -> None:
        self.transport = TRANSPORTS.index(transport)
        self.failpoints = [point for point in failpoints if point.most[self.transport] > 0]
        self.randomly = randomly
        self.log = directory / "strace"
        self.left: List[Failpoint] = []  # Those not had since all were shuffled.
        self.failpoint: Optional[Failpoint] = None
        self.tracer: Optional[subprocess.Popen] = None
        self.lives: Counter[Failpoint] = collections.Counter()
        self.strikes: Counter[Failpoint] = collections.Counter()
        self.deaths: Counter[Failpoint] = collections.Counter()  # Masters that died of what struck them.
        self.stalls: Counter[Failpoint] = collections.Counter()  # Masters that were killed for want of a step.
        (directory / "state").mkdir()
        shared = transport == "shared memory"
        flags = ["--state-dir", str(directory / "state"), "--shared-memory", "same-user" if shared else "off"]
        super().__init__(f"unix:{directory / 'master'}" if shared else "127.0.0.1:0", *flags)

    def begin(self, with_failpoint: bool) -> None:
        """Starts the next master in the place of one that has been buried."""
        self.failpoint = None
        if not with_failpoint:
            self.start()
            return
        self.left = self.left or self.randomly.sample(self.failpoints, len(self.failpoints))
        self.failpoint = self.left.pop()
        # Small ones most: what happens once in a life is among the first calls.
        n = round(self.failpoint.most[self.transport] ** self.randomly.random())
        self.log.unlink(missing_ok=True)
        self.strace = self.failpoint.strace(n, self.log)
        # With -D the process that is started becomes the master, and strace its grandchild.
        self.start(*([*self.strace, "-D"] if self.failpoint.starting else []))

    def hear(self) -> bool:
        """Takes in what the master says, and strikes from then on. Returns false if that is its end."""
        assert self.process.stdout is not None
        said = os.read(self.process.stdout.fileno(), 4096)
        if said and self.failpoint and not self.failpoint.starting and self.tracer is None:
            self.attach()
        if not said:
            self.process.wait()  # A process that ends closes its output first.
        return bool(said)

    def attach(self) -> None:
        """Has strace trace the master, which stands still until then."""
        self.process.send_signal(signal.SIGSTOP)
        command = [*self.strace, "-p", str(self.process.pid)]
        self.tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.tracer.stderr is not None
        if "attached" not in (said := self.tracer.stderr.readline()):
            raise SystemExit(said)
        self.process.send_signal(signal.SIGCONT)

    def bury(self, stalled: bool = False) -> None:
        """Ends the master if it lives, and counts what its failpoint has done."""
        died = self.process.poll() is not None
        self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.tracer is not None:
            self.tracer.communicate()
            self.tracer = None
        if self.failpoint is not None:
            self.lives[self.failpoint] += 1
            self.stalls[self.failpoint] += stalled
            self.deaths[self.failpoint] += died
            # An injected error is in the log; a master that died did so by an injected signal, or for such an error.
            struck = died or (self.log.exists() and "(INJECTED)" in self.log.read_text())
            self.strikes[self.failpoint] += struck

    def tell(self, point: Failpoint) -> str:
        """Returns how often it struck, and how many masters died of an error or left the workers without a step."""
        told = f"{self.strikes[point]} of {self.lives[point]}"
        if point.fate != "KILL" and self.deaths[point] > 0:
            told += f", {self.deaths[point]} died"
        return told + (f", {self.stalls[point]} without a step" if self.stalls[point] > 0 else "")


class Training:
    """Four workers, and the masters that serve them one after the other."""

    def __init__(self, directory: pathlib.Path, steps: int, master: Master) -> None:
        self.steps = steps
        self.master = master
        self.workers = [
            deaths.Worker(master.target, rank, steps, directory / f"{rank}.npz") for rank in range(deaths.WORKERS)
        ]
        self.training = {worker.told: worker for worker in self.workers}  # Those that have not ended.
        self.stepped = time.monotonic()  # When the newest step was done, or its master started.
        self.begin_life()

    @property
    def done(self) -> int:
        return min(worker.done for worker in self.workers)

    def begin_life(self) -> None:
        """Takes note of where the workers are when a master starts."""
        self.done_before, self.stepped = self.done, time.monotonic()

    def succeed(self, stalled: bool = False) -> None:
        """Has another master take the place of this one."""
        self.master.bury(stalled)
        # The last steps are the workers' to leave in: one that has left repeats nothing to a master that comes later.
        last = self.steps - STEPS_OF_A_MASTER
        self.master.begin(with_failpoint=self.done_before < self.done < last)
        self.begin_life()

    def hear(self, told: multiprocessing.connection.Connection) -> None:
        """Takes in what a worker says."""
        before = self.done
        try:
            self.training[told].done = told.recv()
        except EOFError:
            self.training.pop(told).finish()  # Or it ends the program.
        if self.done > before:
            self.stepped = time.monotonic()

    def run(self) -> List[Dict[str, np.ndarray]]:
        """Returns what the workers have at the end."""
        while self.training:
            output = self.master.process.stdout
            for ready in multiprocessing.connection.wait([*self.training, output], IMPATIENCE):
                if ready is not output:
                    self.hear(ready)
                elif not self.master.hear():
                    if self.master.failpoint is None:
                        raise SystemExit(f"a master without a failpoint has died after step {self.done}")
                    self.succeed()
            self.judge()
        return [worker.finish() for worker in self.workers]

    def judge(self) -> None:
        """Replaces the master if it has lived long enough, or leaves the workers without a step."""
        waited = time.monotonic() - self.stepped
        if self.master.failpoint is None:
            if waited > deaths.PATIENCE:
                raise SystemExit(f"no step within {waited:.0f} s after step {self.done}")
            if self.done_before < self.done < self.steps - STEPS_OF_A_MASTER:
                self.succeed()
        elif self.done >= self.done_before + STEPS_OF_A_MASTER:
            self.succeed()
        elif waited > IMPATIENCE:
            self.succeed(stalled=True)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.master.bury()


@dataclasses.dataclass
class Result:
    """What a training had to bear, by failpoint, and what became of its numbers."""

    master: Master
    numbers: int
    differences: int


def compare(steps: int, transport: str, seed: int, failpoints: Sequence[Failpoint] = FAILPOINTS) -> Result:
    """Trains beside the undisturbed training. A step that is lost ends the program."""
    expected = deaths.undisturbed(steps)
    with tempfile.TemporaryDirectory() as directory:
        master = Master(pathlib.Path(directory), transport, failpoints, random.Random(seed))
        training = Training(pathlib.Path(directory), steps, master)
        try:
            actual = training.run()
        finally:
            training.stop()
    numbers = sum(values.size for record in expected for values in record.values())
    return Result(master, numbers, deaths.count_differences(expected, actual))


def main(arguments: Optional[List[str]] = None) -> None:
    import report

    parser = argparse.ArgumentParser(prog="tools/benchmark failpoints", description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of the training, for each transport")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args(arguments)
    if shutil.which("strace") is None:
        raise SystemExit("this needs strace: apt-get install strace")
    provenance = report.provenance("tools/benchmark failpoints")
    results = [compare(options.steps, transport, options.seed) for transport in TRANSPORTS]
    head = ["transport", "masters", "struck", "without a step", "steps", "steps lost", "numbers compared", "that differ"]
    rows = [
        [transport, *(str(sum(counts.values())) for counts in (got.master.lives, got.master.strikes, got.master.stalls))]
        + [str(value) for value in (options.steps, 0, got.numbers, got.differences)]
        for transport, got in zip(TRANSPORTS, results)
    ]
    each = ["call", "fate", "counted from"] + [f"struck: {transport}" for transport in TRANSPORTS]
    rows_of_each = [
        [point.call, point.fate, "the start" if point.starting else "ready"]
        + [got.master.tell(point) for got in results]
        for point in FAILPOINTS
    ]
    lines = [provenance, "", *report.table(head, rows), "", *report.table(each, rows_of_each)]
    report.publish("failpoints", lines, options.output)


if __name__ == "__main__":
    main()
