"""Workers on hosts of their own, whose cables lose what goes one way: nobody hangs, and no sum is wrong."""

import os
import pathlib
import random
import re
import shutil
import time
from typing import Any, Callable, Iterator, List

import pytest
from network import PROGRAMS, Network
from processes import PATIENCE, Master, WorkerProcess

WORLD = 3
DIRECTIONS = ("to master", "to worker")
# How many short cuts there are; 0 is a few, without the tests whose connections take 50 s to break. See tests/README.md,
# "Cuts".
CUTS = int(os.environ.get("SYNCBN_TEST_CUTS", "0"))


@pytest.fixture
def network() -> Iterator[Network]:
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} is not installed (Debian: util-linux, iproute2, nftables)")
    try:
        network = Network(WORLD)
    except OSError as error:
        pytest.skip(f"hosts cannot be made of network namespaces here: {error}")
    yield network
    network.close()


class Site:
    """A master whose log can be read, and the means to start workers on the other hosts."""

    def __init__(self, start: Callable[..., Any], network: Network, log: pathlib.Path) -> None:
        self._start = start
        self._network = network
        self._log = log
        with log.open("w") as stderr:
            inside = network.master.inside
            master = start(Master, "--insecure", address="0.0.0.0:0", inside=inside, stderr=stderr)
        self._port = master.target.rsplit(":", 1)[1]

    def workers(self, **options: Any) -> List[WorkerProcess]:
        """Returns: a worker on each host, after their first round."""
        workers = [
            self._start(
                WorkerProcess,
                f"10.77.{rank}.1:{self._port}",
                rank,
                WORLD,
                inside=self._network.ranks[rank].inside,
                **options,
            )
            for rank in range(WORLD)
        ]
        for rank, worker in enumerate(workers):
            joined = worker.answer()
            assert (joined["joined"], joined["transport"]) == (rank, "gRPC")
        self.check_sum(workers, "warm")
        return workers

    @staticmethod
    def check_sum(workers: List[WorkerProcess], layer: str) -> None:
        for worker in workers:
            worker.ask(sum=layer, value=[2.0])
        for worker in workers:
            answer = worker.answer()
            assert answer.get("result") == [2.0 * WORLD], answer

    def await_line(self, pattern: str) -> "re.Match[str]":
        end = time.monotonic() + PATIENCE
        while True:
            found = re.search(pattern, self._log.read_text())
            if found is not None:
                return found
            assert time.monotonic() < end, f"no line {pattern!r} in:\n{self._log.read_text()}"
            time.sleep(0.1)  # Between two looks, for a log tells nobody that it has grown.


@pytest.fixture
def site(start: Callable[..., Any], network: Network, tmp_path: pathlib.Path) -> Site:
    return Site(start, network, tmp_path / "log")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_round_waits_for_what_is_lost_on_its_way(site: Site, network: Network, direction: str) -> None:
    workers = site.workers()
    cut = network.cut(1, direction)
    for worker in workers:
        worker.ask(sum="v", value=[1.0])
    cut.await_dropped()
    cut.heal()
    for worker in workers:
        answer = worker.answer()
        assert answer.get("result") == [WORLD], answer


def test_short_cuts_at_any_moment_lose_no_round(site: Site, network: Network) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    randomly = random.Random(seed)
    workers = site.workers()
    for _ in range(CUTS or 4):
        for worker in workers:
            worker.ask(sum_long="v", length=3, times=20)
        # Anywhere in these rounds, and for longer or shorter than a packet takes to be sent again.
        time.sleep(randomly.uniform(0.0, 0.05))
        cuts = [network.cut(randomly.randrange(WORLD), randomly.choice(DIRECTIONS)) for _ in range(2)]
        time.sleep(randomly.uniform(0.0, 0.5))
        for cut in cuts:
            cut.heal()
        for worker in workers:
            answer = worker.answer()
            assert answer.get("result") == [20, WORLD, WORLD], answer


@pytest.mark.skipif(not CUTS, reason="takes 50 s; SYNCBN_TEST_CUTS=1 runs it")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_connection_that_breaks_is_told_of_or_waited_for(site: Site, network: Network, direction: str) -> None:
    told = site.workers(job="told", join_timeout=200.0)
    waiting = site.workers(job="waiting", join_timeout=200.0, on_worker_lost="wait")
    cut = network.cut(1, direction)
    began = time.monotonic()
    for worker in told + waiting:
        worker.ask(sum="v", value=[1.0])
    for job in ("told", "waiting"):
        site.await_line(f'rank 1 of job "{job}".* is lost')
    print(f"the master knew after {time.monotonic() - began:.1f} s")
    if direction == "to master":  # Else the round is complete, and only its answer to rank 1 is late.
        for rank in (0, 2):
            answer = told[rank].answer()
            assert (answer["error"], answer["ranks"]) == ("WORKER_LOST", [1]), answer
            assert "rank 1" in answer["message"]
    cut.heal()
    for rank, worker in enumerate(told):
        if direction == "to master" and rank != 1:
            continue
        answer = worker.answer()
        if direction == "to master":
            assert (answer["error"], answer["ranks"]) == ("WORKER_LOST", [1]), "the same for all"
        else:
            assert answer.get("result") == [WORLD], answer
    for worker in waiting:
        answer = worker.answer()
        assert answer.get("result") == [WORLD], answer
    for workers in (told, waiting):
        site.check_sum(workers, "after")


def test_a_connection_that_a_box_between_has_forgotten_is_replaced(site: Site, network: Network) -> None:
    workers = site.workers(on_worker_lost="wait")
    port = site.await_line(r"rank 1 of .* has joined from 10\.77\.1\.2:(\d+)")[1]
    network.master.lose("rank1", f"tcp sport {port}")
    network.ranks[1].lose("master", f"tcp dport {port}")
    site.check_sum(workers, "v")
    site.await_line(f"rank 1 of .* is back from (?!10.77.1.2:{port})")
