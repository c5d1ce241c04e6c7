"""Kills workers during rounds, and measures how soon the others receive the error, and whether all receive the same.

`tools/benchmark kills` runs it.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from typing import Any, Dict, List

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

ROUND_TIMEOUT = 20.0  # Long: the loss must end a round, not the deadline.


def work() -> None:
    """A worker: joins on command, sums until a round fails, reports the outcome, and starts over."""
    import syncbn

    def hear() -> Dict[str, Any]:
        line = sys.stdin.readline()
        return json.loads(line) if line else sys.exit(0)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    worker = syncbn.Worker(**hear())
    say(joined=True)
    while True:
        worker.resume_at(hear()["resume_at"])
        digest, completed = hashlib.sha256(), 0
        say(begun=True)
        try:
            while True:
                sum_ = worker.all_reduce("v", [1.0 + worker.rank, float(completed)])
                digest.update(sum_.tobytes())
                completed += 1
        except syncbn.Error as error:
            at = time.monotonic()
            say(at=at, completed=completed, digest=digest.hexdigest(), reason=error.reason, ranks=list(error.ranks))


class Process:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)

    def answer(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)


def percentile(values: List[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    provenance = report.provenance("tools/benchmark kills")
    randomly = random.Random(options.seed)
    master = subprocess.Popen(
        [os.environ["SYNCBN_MASTER"], "--address", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    )
    workers: List[Process] = []
    spare = Process()
    told: List[float] = []
    rounds = splits = late = 0
    try:
        assert master.stdout is not None
        target = master.stdout.readline().split()[-1]

        def join(process: Process, rank: int) -> Process:
            process.tell(target=target, rank=rank, world_size=options.workers, timeout=ROUND_TIMEOUT)
            assert process.answer()["joined"]
            return process

        workers = [join(Process(), rank) for rank in range(options.workers)]
        sequence = 0
        for _ in range(options.kills):
            for worker in workers:
                worker.tell(resume_at=sequence)
            for worker in workers:
                assert worker.answer()["begun"]
            time.sleep(randomly.uniform(0.0, 0.03))
            victim = randomly.randrange(options.workers)
            killed_at = time.monotonic()
            workers[victim].process.kill()
            survivors = [worker for rank, worker in enumerate(workers) if rank != victim]
            answers = [worker.answer() for worker in survivors]
            told += [1000 * (answer["at"] - killed_at) for answer in answers]
            splits += len({(answer["completed"], answer["digest"]) for answer in answers}) - 1
            late += sum((answer["reason"], answer["ranks"]) != ("WORKER_LOST", [victim]) for answer in answers)
            rounds += answers[0]["completed"]
            sequence += answers[0]["completed"] + 1
            workers[victim].process.wait()
            workers[victim], spare = join(spare, victim), Process()
    finally:
        for process in [master, spare.process, *(worker.process for worker in workers)]:
            process.kill()
            process.wait()
    head = ["kills", "workers", "rounds completed", "results that differ", "not told WORKER_LOST", "p50", "p99", "most"]
    times = [f"{percentile(told, part):.0f}" for part in (0.5, 0.99, 1.0)]
    row = [str(value) for value in (options.kills, options.workers, rounds, splits, late)] + times
    lines = [provenance, "", *report.table(head, [row])]
    report.publish("kills", lines, options.output)


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
