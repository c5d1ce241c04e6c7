"""Workers and masters that die or stall, as processes: the others get an error, and nobody hangs."""

import os
import random
import signal
import time
from typing import Any, Callable, List

import pytest
from processes import Master, WorkerProcess, await_arrival, await_present

WORLD = 3


def stop(child: int) -> None:
    """Returns once all of its threads have stopped, which takes a while on a busy machine."""
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED)


@pytest.fixture(params=["shared memory", "gRPC"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which the workers of a test speak to its master."""
    monkeypatch.setenv("SYNCBN_SHARED_MEMORY", "" if request.param == "shared memory" else "off")
    return request.param


@pytest.fixture
def group(start: Callable[..., Any], master: Master, transport: str) -> Callable[..., List[WorkerProcess]]:
    def make(**options: Any) -> List[WorkerProcess]:
        workers = [start(WorkerProcess, master.target, rank, WORLD, **options) for rank in range(WORLD)]
        for rank, worker in enumerate(workers):
            joined = worker.answer()
            assert (joined["joined"], joined["transport"]) == (rank, transport)
        for worker in workers:
            worker.ask(sum="warm", value=[1.0])
        for worker in workers:
            assert worker.answer()["result"] == [WORLD]
        return workers

    return make


def test_killed_worker_is_named_before_the_deadline(
    master: Master, group: Callable[..., List[WorkerProcess]], record_property: Callable[[str, object], None]
) -> None:
    deadline = 120.0  # Longer than the test may take: what ends the round is the closed stream.
    workers = group(timeout=deadline)
    for rank in (0, 2):
        workers[rank].ask(sum="loss", value=[1.0])
    await_arrival(master.target, "loss", [0, 2])
    killed_at = time.monotonic()
    os.kill(workers[1].pid, signal.SIGKILL)
    for rank in (0, 2):
        answer = workers[rank].answer()
        assert (answer["error"], answer["code"]) == ("WORKER_LOST", "UNAVAILABLE")
        assert (answer["layer"], answer["ranks"]) == ("loss", [1])
        assert "rank 1" in answer["message"] and "loss" in answer["message"]
        took = answer["at"] - killed_at
        record_property(f"rank {rank} told after, in ms", round(1000 * took, 1))
        print(f"rank {rank} was told {1000 * took:.1f} ms after the kill")
        assert 0 < took < deadline / 2


def test_kills_in_the_midst_of_rounds_split_no_result(
    start: Callable[..., Any], group: Callable[..., List[WorkerProcess]], master: Master
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    randomly = random.Random(seed)
    workers = group(timeout=60.0)
    sequence = 0
    for _ in range(20):
        for worker in workers:
            worker.ask(resume_at=sequence)
            worker.ask(sums_until_error="v")
        for worker in workers:
            assert worker.answer()["resumed"] and worker.answer()["began"]
        time.sleep(randomly.uniform(0.0, 0.02))  # Anywhere in a round.
        victim = randomly.randrange(WORLD)
        workers[victim].process.kill()
        survivors = [worker for rank, worker in enumerate(workers) if rank != victim]
        sums = [worker.answer()["sums"] for worker in survivors]
        assert sums[0] == sums[1]
        assert sums[0] == [[6.0, 3.0 * i] for i in range(len(sums[0]))]
        for worker in survivors:
            answer = worker.answer()
            assert (answer["error"], answer["ranks"]) == ("WORKER_LOST", [victim]), answer
        sequence += len(sums[0]) + 1
        workers[victim].process.wait()
        workers[victim] = start(WorkerProcess, master.target, victim, WORLD, timeout=60.0)
        assert workers[victim].answer()["joined"] == victim


def test_masters_that_are_told_to_end_lose_no_round(
    start: Callable[..., Any], group: Callable[..., List[WorkerProcess]], master: Master
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    randomly = random.Random(seed)
    workers = group(timeout=60.0)
    for worker in workers:
        worker.ask(sums_until_error="v")
    for worker in workers:
        assert worker.answer()["began"]
    # More of them, and how to set their number: tests/README.md, "Deaths".
    for times in range(int(os.environ.get("SYNCBN_TEST_SIGTERMS", "10"))):
        # Every second master lives until all are there: without that, workers on a busy machine might never be, and
        # give up after 30 s.
        if times % 2 == 1:
            await_present(master.target, WORLD)
        time.sleep(randomly.uniform(0.0, 0.1))  # Anywhere: while workers come back, and in a round.
        assert master.terminate() == 0
        assert master.process.stdout.read() == "syncbn-master stopped\n"
        master = start(Master, address=master.target)
    await_present(master.target, WORLD)
    workers[2].process.kill()
    sums = [worker.answer()["sums"] for worker in workers[:2]]
    print(f"{len(sums[0])} rounds")
    assert sums[0] == sums[1] == [[6.0, 3.0 * i] for i in range(len(sums[0]))]
    for worker in workers[:2]:
        assert worker.answer()["error"] == "WORKER_LOST"


def test_a_killed_worker_may_be_replaced(
    master: Master, start: Callable[..., Any], group: Callable[..., List[WorkerProcess]]
) -> None:
    workers = group()
    workers[1].process.kill()
    workers[1].process.wait()
    workers[1] = start(WorkerProcess, master.target, 1, WORLD)
    assert workers[1].answer()["incarnation"] == 2
    for worker in workers:
        worker.ask(sum="after", value=[2.0])
    for worker in workers:
        assert worker.answer()["result"] == [2.0 * WORLD]


def test_a_stopped_worker_is_named_at_the_deadline(
    master: Master, group: Callable[..., List[WorkerProcess]]
) -> None:
    # The last rounds have to succeed within it, on a busy machine too.
    workers = group(timeout=5.0)
    stop(workers[1].pid)
    try:
        for rank in (0, 2):
            workers[rank].ask(sum="loss", value=[1.0])
        for rank in (0, 2):
            answer = workers[rank].answer()
            assert (answer["error"], answer["code"]) == ("ROUND_TIMEOUT", "DEADLINE_EXCEEDED")
            assert (answer["layer"], answer["ranks"]) == ("loss", [1])
    finally:
        os.kill(workers[1].pid, signal.SIGCONT)
    for worker in workers:
        worker.ask(sum="awake", value=[1.0])
    for worker in workers:
        assert worker.answer()["result"] == [WORLD]


def test_a_stopped_master_ends_every_wait(master: Master, start: Callable[..., Any]) -> None:
    # The first round has to succeed within it, on a busy machine too.
    workers = [start(WorkerProcess, master.target, rank, 2, timeout=5.0) for rank in range(2)]
    for worker in workers:
        worker.answer()
    for worker in workers:
        worker.ask(sum="v", value=[1.0])
    for worker in workers:
        assert worker.answer()["result"] == [2.0]
    stop(master.process.pid)
    try:
        for worker in workers:
            worker.ask(sum="loss", value=[1.0])
        for worker in workers:
            answer = worker.answer()
            assert (answer["error"], answer["code"], answer["layer"]) == ("UNREACHABLE", "UNAVAILABLE", "loss")
    finally:
        os.kill(master.process.pid, signal.SIGCONT)
    # A master that was stopped and continued goes on serving.
    again = start(WorkerProcess, master.target, 0, 1, group="again")
    again.answer()
    again.ask(sum="v", value=[1.0])
    assert again.answer()["result"] == [1.0]


def test_workers_that_disagree_learn_at_once(master: Master, start: Callable[..., Any]) -> None:
    workers = [start(WorkerProcess, master.target, rank, 2, timeout=120.0) for rank in range(2)]
    for worker in workers:
        worker.answer()
    began = time.monotonic()
    for worker, channels in zip(workers, (8, 16)):
        worker.ask(forward="bn1", channels=channels)
    for worker in workers:
        answer = worker.answer()
        assert (answer["error"], answer["layer"]) == ("LAYER_SPEC_MISMATCH", "bn1")
        assert "8" in answer["message"] and "16" in answer["message"]
        assert answer["at"] - began < 60.0  # Not the deadline's doing.


def test_workers_go_on_after_the_master_was_killed(start: Callable[..., Any]) -> None:
    master = start(Master)
    workers = [start(WorkerProcess, master.target, rank, 2, timeout=60.0) for rank in range(2)]
    run_ids = {worker.answer()["run_id"] for worker in workers}
    assert len(run_ids) == 1
    for restart in range(3):
        workers[0].ask(sum="v", value=[1.0])
        await_arrival(master.target, "v", [0])
        master.kill()
        master = start(Master, address=master.target)
        workers[1].ask(sum="v", value=[10.0 + restart])
        for worker in workers:
            assert worker.answer()["result"] == [11.0 + restart]


def test_sigterm_under_load_ends_cleanly(start: Callable[..., Any]) -> None:
    master = start(Master)
    workers = [start(WorkerProcess, master.target, rank, 4) for rank in range(4)]
    for worker in workers:
        worker.answer()
        worker.ask(sum_for_ever="v")
    for worker in workers:
        assert worker.answer()["began"]
    assert master.terminate() == 0
    assert master.process.stdout.read() == "syncbn-master stopped\n"
    # Their rounds form again at the master that comes next.
    again = start(Master, address=master.target)
    assert again.terminate() == 0
