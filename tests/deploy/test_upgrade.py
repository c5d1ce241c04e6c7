"""A master is replaced while two trainers run, as `systemctl restart` does it: no round is lost."""

import os
import pathlib
import signal
import subprocess
import sys
from typing import Iterator, List

import pytest

MASTER = os.environ["SYNCBN_MASTER"]
PATIENCE = 120.0
ROUNDS = 300
BATCHES = (3, 9)
RESTARTS_AFTER = (75, 150, 225)


class Service:
    """A master at one address, which can be replaced, and trainers; all end with the test."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.trainers: List["subprocess.Popen[str]"] = []
        self.start()

    def start(self) -> None:
        self.master = subprocess.Popen(
            [MASTER, "--address", self.address, "--max-lifetime", "600"], stdout=subprocess.PIPE, text=True
        )
        assert self.master.stdout is not None
        assert self.master.stdout.readline() == f"syncbn-master ready on {self.address}\n"

    def replace(self) -> None:
        self.master.send_signal(signal.SIGTERM)
        assert self.master.wait(PATIENCE) == 0
        self.start()

    def train(self) -> None:
        script = pathlib.Path(__file__).with_name("trainer.py")
        for rank in range(len(BATCHES)):
            command = [sys.executable, str(script), str(rank), str(ROUNDS), *map(str, BATCHES)]
            environment = {**os.environ, "SYNCBN_TARGET": self.address}
            self.trainers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))

    def end(self) -> None:
        for process in [*self.trainers, self.master]:
            process.kill()
            process.wait(PATIENCE)


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    running = Service(f"unix:{tmp_path}/master")
    yield running
    running.end()


def test_no_round_is_lost_where_the_master_is_replaced(service: Service) -> None:
    """Each trainer compares each result with NumPy's, over the whole batch in float64."""
    service.train()
    output = service.trainers[0].stdout
    assert output is not None
    for step in range(ROUNDS):
        assert output.readline() == f"{step}\n"
        if step in RESTARTS_AFTER:
            service.replace()
    assert output.readline() == ""
    assert [trainer.wait(PATIENCE) for trainer in service.trainers] == [0, 0]
    other = service.trainers[1].stdout
    assert other is not None
    assert other.read().split() == [str(step) for step in range(ROUNDS)]
