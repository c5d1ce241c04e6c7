"""Scenarios that processes of torch.distributed run in test_launchers.py, one after the other, in one run for all.

    python launch_scenarios.py RANK WORLD_SIZE FOLDER TARGET_OF_A_MASTER

Each scenario has a process group of its own, and prints "passed NAME". The last one ends processes by force.
"""

import contextlib
import logging
import os
import pathlib
import sys
import time
from typing import Any, Callable, Dict, Iterator, List

import torch
import torch.distributed as dist

import syncbn
import syncbn.torch

RANK, WORLD, FOLDER, TARGET = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)


def initialize(name: str, rank: int = RANK) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/{name}", rank=rank, world_size=WORLD)


@contextlib.contextmanager
def environment(**variables: Any) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def layer() -> torch.nn.Module:
    return syncbn.torch.convert_sync_batchnorm(torch.nn.BatchNorm1d(2, dtype=torch.float64))


def check(normalization: torch.nn.Module) -> None:
    """A forward pass over all processes' batches of three, in the order of their ranks."""
    own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    x = torch.arange(6.0 * WORLD, dtype=torch.float64).reshape(3 * WORLD, 2).exp() % 7
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(normalization(x[own]), expected[own])


def the_process_group_is_enough() -> None:
    """No address, no worker; where the environment places all processes alike, the process group counts."""
    with environment(RANK=0, WORLD_SIZE=1):
        check(layer())
        worker = syncbn.default_worker()
        assert (worker.rank, worker.world_size) == (RANK, WORLD), worker
        worker.leave()


def the_process_group_places_the_workers_of_a_master_that_is_named() -> None:
    with environment(SYNCBN_TARGET=TARGET, SYNCBN_JOB=FOLDER.name):
        check(layer())
        worker = syncbn.default_worker()
        assert worker.target == TARGET
        worker.leave()


def across_hosts_the_master_speaks_tls() -> None:
    """A second loopback address stands for another host's."""
    with environment(SYNCBN_ADDRESS="127.0.0.2:0"):
        check(layer())
    worker = syncbn.default_worker()
    assert worker.target.startswith("127.0.0.2:"), worker.target
    if RANK == 1:
        try:
            syncbn.Worker(worker.target, "strangers", 0, 1, join_timeout=1.0)
        except syncbn.Unavailable as error:
            assert "TLS" in error.message, error
        else:
            raise AssertionError("a stranger without the certificate has joined")
    worker.leave()


def rank_0_keeps_the_master_until_the_others_have_left() -> None:
    store = dist.distributed_c10d._get_default_store()
    with environment(SYNCBN_ADDRESS="127.0.0.1:0"), syncbn.torch.init_worker() as worker:
        worker.all_reduce("sum", [1.0])
        if RANK == 0:
            store.set("leaving", "")
        else:
            store.get("leaving")
        before = time.monotonic_ns()
    if RANK != 0:
        store.set(f"begun {RANK}", str(before))
    else:
        left = time.monotonic_ns()
        assert all(left > int(store.get(f"begun {rank}")) for rank in range(1, WORLD))


def a_rank_0_that_does_not_come_is_named() -> None:
    if RANK != 0:
        try:
            syncbn.torch.init_worker(timeout=0.5)
        except syncbn.Unavailable as error:
            assert "waited 0.5 seconds for rank 0" in error.message, error
        else:
            raise AssertionError("there is no master")
    dist.barrier()
    with syncbn.torch.init_worker(timeout=60) as worker:  # The failed call has not counted: they meet.
        assert worker.all_reduce("sum", [RANK + 1.0])[0] == WORLD * (WORLD + 1) / 2


def a_master_that_cannot_start_is_an_error_everywhere() -> None:
    with environment(SYNCBN_ADDRESS="203.0.113.9:0"):  # No address of this host.
        try:
            syncbn.torch.init_worker()
        except syncbn.Error as error:
            assert "203.0.113.9" in error.message, error
            assert RANK == 0 or "rank 0 could not start the master" in error.message, error
        else:
            raise AssertionError("there is no master")
    with syncbn.torch.init_worker() as worker:
        assert worker.all_reduce("sum", [RANK + 1.0])[0] == WORLD * (WORLD + 1) / 2


def a_process_group_is_initialized_anew() -> None:
    """The default worker goes over to the new group's processes; layers made before go on."""
    normalization = layer()
    check(normalization)
    first = syncbn.default_worker()
    dist.destroy_process_group()
    assert syncbn.default_worker() is first
    initialize("anew", WORLD - 1 - RANK)
    check(normalization)
    second = syncbn.default_worker()
    assert first.closed and (second.rank, second.world_size) == (WORLD - 1 - RANK, WORLD)
    second.leave()


def a_restart_of_the_launch_has_notes_of_its_own() -> None:
    """In the same store, as torchrun's is. A process has ended before it could meet the others."""
    with environment(TORCHELASTIC_RESTART_COUNT=0):
        worker = syncbn.torch.init_worker() if RANK != 2 else None
    dist.barrier()  # Until here: closing rank 0's worker ends the master that the others join.
    if worker is not None:
        worker.close()
    dist.barrier()
    with environment(TORCHELASTIC_RESTART_COUNT=1), syncbn.torch.init_worker(timeout=60) as worker:
        assert worker.all_reduce("sum", [1.0])[0] == WORLD


def process_groups_of_a_part_of_the_processes() -> None:
    """Each has a worker, whose layers synchronize among its members alone; beside them, one for all."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine, other = groups[RANK % 2], groups[1 - RANK % 2]
    with syncbn.torch.init_worker() as everybody, syncbn.torch.init_worker(process_group=mine) as part:
        assert (part.rank, part.world_size) == (RANK // 2, 2)
        assert part.all_reduce("sum", [RANK])[0] == (2.0 if RANK % 2 == 0 else 4.0)
        assert everybody.all_reduce("sum", [RANK])[0] == 6.0
        try:
            syncbn.torch.init_worker(process_group=other)
        except ValueError as error:
            assert "no member" in str(error)
        else:
            raise AssertionError("a worker of a foreign group")


class Told(logging.Handler):
    """Keeps the messages of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def two_pairs_lose_a_process() -> None:
    """Rank 0, with the master, dies beside rank 1; rank 3, without one, ends beside rank 2 and does not leave."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    worker = syncbn.torch.init_worker(process_group=groups[RANK // 2], join_timeout=5.0)
    worker.all_reduce("sum", [1.0])
    if RANK == 0:
        os.kill(os.getpid(), 9)
    if RANK == 1:
        try:
            for _ in range(1000):
                worker.all_reduce("sum", [1.0])
        except syncbn.Unavailable:
            print("passed a_rank_0_that_dies_ends_the_others", flush=True)
    if RANK == 3:
        os._exit(0)
    if RANK == 2:
        told = Told()
        logging.getLogger("syncbn").addHandler(told)
        logging.getLogger("syncbn").setLevel(logging.INFO)
        worker.leave()
        assert "rank 1 has ended without leaving its worker" in told.messages, told.messages  # Rank 1 of the two.
        print("passed rank_0_does_not_wait_for_a_worker_that_has_ended", flush=True)
    os._exit(0)


SCENARIOS: Dict[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        the_process_group_is_enough,
        the_process_group_places_the_workers_of_a_master_that_is_named,
        across_hosts_the_master_speaks_tls,
        rank_0_keeps_the_master_until_the_others_have_left,
        a_rank_0_that_does_not_come_is_named,
        a_master_that_cannot_start_is_an_error_everywhere,
        a_process_group_is_initialized_anew,
        a_restart_of_the_launch_has_notes_of_its_own,
        process_groups_of_a_part_of_the_processes,
    )
}

if __name__ == "__main__":
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # All on one host.
    for name, scenario in SCENARIOS.items():
        initialize(name)
        scenario()
        dist.barrier()
        print("passed", name, flush=True)
    initialize("the last")
    two_pairs_lose_a_process()
