"""Kills the master, or workers, or both, again and again while four workers train on the digits of the quickstart, and
compares every bit of what they have at the end with a run that nobody disturbed.

`tools/benchmark deaths` runs it. The moment of each death is drawn: after a random step, and within the next one. A
worker that was killed goes on from its own last checkpoint but one: the master may have died as well, and then others
may still wait for the step before the last that this worker had finished.
"""

import argparse
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Dict, Iterable, List, Optional

import numpy as np

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_ROOT / "client/examples/quickstart")]

WORKERS = 4
# Bounds every wait. Nothing takes this long unless it hangs.
PATIENCE = 120.0

# Each worker is a process of its own, forked by one that has imported the frameworks and used nothing of them: the
# import takes more of a processor than the training.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "syncbn.torch"])


def work(
    target: str, rank: int, steps: int, output: pathlib.Path, told: multiprocessing.connection.Connection
) -> None:
    """A worker: trains for so many steps, from its checkpoint on if there is one, and writes what it has at the end.

    Sends the number of each step that is done to `told`.
    """
    import torch

    import syncbn
    import syncbn.torch
    import training

    torch.set_num_threads(1)
    newest, last_but_one = output.with_suffix(".newest"), output.with_suffix(".last-but-one")
    data = training.digits.load()
    images, labels = training.images_of(data.images, torch.float64), torch.from_numpy(data.labels)
    begin, end = sum(training.SIZES[:rank]), sum(training.SIZES[: rank + 1])
    with syncbn.Worker(target, "deaths", rank, WORKERS, timeout=PATIENCE, on_worker_lost="wait") as worker:
        model = training.make_model(torch.float64, torch.device("cpu"))
        model = syncbn.torch.convert_sync_batchnorm(model, worker)
        optimizer = torch.optim.SGD(model.parameters(), lr=training.LEARNING_RATE, momentum=training.MOMENTUM)
        losses: List[float] = []
        if last_but_one.exists():
            state = torch.load(last_but_one)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            worker.load_state_dict(state["worker"])
            losses = state["losses"]
        for batch in list(training.digits.batches(len(images), training.GLOBAL_BATCH, steps))[len(losses) :]:
            rows = torch.from_numpy(batch[begin:end])
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows], reduction="sum")
            loss.backward()
            syncbn.torch.all_reduce_gradients(model, worker, weight=len(rows))
            optimizer.step()
            losses.append(loss.item())
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "worker": worker.state_dict()}
            torch.save({**state, "losses": losses}, output.with_suffix(".new"))
            if newest.exists():
                os.replace(newest, last_but_one)
            os.replace(output.with_suffix(".new"), newest)
            told.send(len(losses))

    def join(tensors: Iterable[torch.Tensor]) -> np.ndarray:
        return np.concatenate([tensor.detach().reshape(-1).numpy() for tensor in tensors])

    statistics = join(buffer for name, buffer in model.named_buffers() if "running" in name)
    np.savez(output, losses=np.array(losses), parameters=join(model.parameters()), statistics=statistics)


class Master:
    """syncbn-master; another takes the place of one that was killed.

    address: that of the first; port 0 is any free one, and stays the same from then on. flags: further ones.
    """

    def __init__(self, address: str, *flags: str) -> None:
        self.target = address
        self.flags = flags
        self.start()
        self.await_ready()

    def start(self, *prefix: str) -> None:
        """Starts a master, as the argument of a command if there is one; does not wait for it."""
        flags = ["--address", self.target, "--max-lifetime", "3600", "--log-level", "error", *self.flags]
        self.process = subprocess.Popen([*prefix, os.environ["SYNCBN_MASTER"], *flags], stdout=subprocess.PIPE, text=True)

    def await_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("syncbn-master ready on "):
            raise SystemExit(f"the master ended with code {self.process.wait()} before it was ready")
        self.target = line.split()[-1]

    def restart(self, pause: float) -> None:
        self.stop()
        time.sleep(pause)  # As a supervisor takes its time.
        self.start()
        self.await_ready()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Worker:
    """A worker; another takes its place when it is killed."""

    def __init__(self, target: str, rank: int, steps: int, output: pathlib.Path) -> None:
        self.output = output
        self.arguments = (target, rank, steps, output)
        self.start()

    def start(self) -> None:
        self.done = 0  # Steps that this process has told of.
        self.told, told = _PROCESSES.Pipe(duplex=False)
        self.process = _PROCESSES.Process(target=work, args=(*self.arguments, told))
        self.process.start()
        told.close()

    def await_step(self, step: int) -> None:
        while self.done < step:
            try:
                self.done = self.told.recv()
            except EOFError:
                self.process.join(PATIENCE)
                raise SystemExit(f"a worker ended with code {self.process.exitcode}") from None

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.told.close()

    def finish(self) -> Dict[str, np.ndarray]:
        self.process.join(PATIENCE)
        if self.process.exitcode != 0:
            raise SystemExit(f"a worker ended with code {self.process.exitcode}")
        with np.load(self.output) as file:
            return dict(file)


def kill(victims: str, master: Master, workers: List[Worker], randomly: random.Random) -> None:
    """Has someone die and come back: the master, a worker, or by chance the one, the other or both."""
    time.sleep(randomly.uniform(0.0, 0.03))  # To strike at any moment of the next step.
    chosen = randomly.choice(("masters", "workers", "together")) if victims == "both" else victims
    if chosen != "masters":
        workers[randomly.randrange(WORKERS)].restart()
    if chosen != "workers":
        master.restart(pause=randomly.uniform(0.0, 0.2))


def train(
    directory: pathlib.Path, steps: int, deaths: List[int], victims: str, randomly: random.Random
) -> List[Dict[str, np.ndarray]]:
    """Runs a training in which someone dies after each of the steps of `deaths`; returns what the workers have."""
    master = Master(f"unix:{directory / 'master'}")
    workers: List[Worker] = []
    try:
        workers = [Worker(master.target, rank, steps, directory / f"{rank}.npz") for rank in range(WORKERS)]
        for step in range(1, steps + 1):
            for worker in workers:
                worker.await_step(step)
            if step in deaths:
                kill(victims, master, workers, randomly)
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
        master.stop()


@functools.lru_cache(maxsize=None)
def undisturbed(steps: int) -> List[Dict[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as directory:
        return train(pathlib.Path(directory), steps, [], "masters", random.Random())


def count_differences(a: List[Dict[str, np.ndarray]], b: List[Dict[str, np.ndarray]]) -> int:
    """The numbers that differ in any bit."""
    return sum(
        int((one[name].view(np.uint64) != other[name].view(np.uint64)).sum())
        for one, other in zip(a, b)
        for name in one
    )


def compare(steps: int, deaths: int, victims: str, seed: int) -> Dict[str, int]:
    """Trains beside the undisturbed training; returns how many numbers were compared, and how many differ.

    victims: "masters", "workers" or "both".
    """
    randomly = random.Random(seed)
    expected = undisturbed(steps)
    with tempfile.TemporaryDirectory() as directory:
        chosen = sorted(randomly.sample(range(1, steps), deaths))
        actual = train(pathlib.Path(directory), steps, chosen, victims, randomly)
    numbers = sum(values.size for record in expected for values in record.values())
    return {"numbers": numbers, "differences": count_differences(expected, actual)}


def main(arguments: Optional[List[str]] = None) -> None:
    import report

    parser = argparse.ArgumentParser(prog="tools/benchmark deaths", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--masters", type=int, default=100, help="how often the master is killed")
    parser.add_argument("--workers", type=int, default=50, help="how often a worker is, in a run of its own")
    parser.add_argument("--both", type=int, default=50, help="how often one of them or both are, in a third")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args(arguments)
    provenance = report.provenance("tools/benchmark deaths")
    head = ["killed", "times", "workers", "steps", "steps lost", "numbers compared", "that differ"]
    rows = []
    for victims in ("masters", "workers", "both"):
        deaths = getattr(options, victims)
        if deaths == 0:
            continue
        result = compare(options.steps, deaths, victims, options.seed)
        # A step that is lost ends its worker with an error, and with it this program.
        values = (victims, deaths, WORKERS, options.steps, 0, result["numbers"], result["differences"])
        rows.append([str(value) for value in values])
    lines = [provenance, "", *report.table(head, rows)]
    report.publish("deaths", lines, options.output)


if __name__ == "__main__":
    main()
