"""A worker that is killed restarts from its own checkpoint, and its peers wait: on_worker_lost="wait"."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import syncbn

STEPS = 6
VICTIM_STEP = 3
PLACES = ("before its first round", "between its rounds", "before its checkpoint")


def train(target, rank, checkpoint, place):
    """A worker: a few steps of two rounds each, with a checkpoint after each. Its first life ends at the place, if any."""

    def die_at(here):
        if here == place and step == VICTIM_STEP and not state["lives"]:
            checkpoint.write_text(json.dumps({**saved, "lives": 1}))
            os.kill(os.getpid(), signal.SIGKILL)

    state = {"value": 0.25 * (rank + 1), "step": 0, "lives": 0, "worker": None}
    if checkpoint.exists():
        state = json.loads(checkpoint.read_text())
    with syncbn.Worker(target, "lost", rank, 2, timeout=60.0, on_worker_lost="wait") as worker:
        if state["worker"] is not None:
            worker.load_state_dict(state["worker"])
        worker.declare_layer("layer", 1)
        for step in range(state["step"], STEPS):
            saved = dict(state)
            die_at(PLACES[0])
            merged = worker.synchronize("layer", 3, [state["value"]], [0.5])
            die_at(PLACES[1])
            total = worker.all_reduce("sum", [state["value"] / 3])
            die_at(PLACES[2])
            value = state["value"] * 0.7 + float(merged.var[0]) - float(total[0]) / 7
            state.update(value=value, step=step + 1, worker=worker.state_dict())
            checkpoint.write_text(json.dumps(state))
        newest = worker.newest_rounds()
    print(json.dumps({"value": state["value"].hex(), "lives": state["lives"], "newest": newest}))


def start(target, rank, checkpoint, place=""):
    command = [sys.executable, __file__, target, str(rank), str(checkpoint), place]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calm")
    with syncbn.Master(address="127.0.0.1:0") as own:
        processes = [start(own.target, rank, directory / f"{rank}.json") for rank in range(2)]
        return [finish(process)["value"] for process in processes]


@pytest.mark.parametrize("place", PLACES)
def test_a_worker_that_is_killed_goes_on_from_its_checkpoint_and_nothing_differs(undisturbed, tmp_path, place):
    with syncbn.Master(address="127.0.0.1:0") as own:
        peer = start(own.target, 0, tmp_path / "0.json")
        victim = start(own.target, 1, tmp_path / "1.json", place)
        assert victim.wait(timeout=120) == -signal.SIGKILL
        victim.stdout.close()
        successor = start(own.target, 1, tmp_path / "1.json", place)
        results = [finish(peer), finish(successor)]
    assert [result["value"] for result in results] == undisturbed
    assert results[1]["lives"] == 1
    reached = {"before its first round": 2, "between its rounds": 3, "before its checkpoint": 3}[place]
    assert results[0]["newest"] == {}
    assert results[1]["newest"]["layer"]["forward"] == reached


def test_without_a_successor_rounds_end_as_they_do_without_a_wait(master):
    options = dict(on_worker_lost="wait", rejoin_grace=0.2, timeout=60.0)
    here = syncbn.Worker(master.target, "gone", 0, 2, **options)
    there = syncbn.Worker(master.target, "gone", 1, 2, **options)
    with here:
        there.close()
        with pytest.raises(syncbn.WorkerLost) as raised:
            here.all_reduce("sum", [1.0])
        assert raised.value.ranks == (1,)


def test_a_successor_with_other_numbers_is_told_so(master):
    options = dict(on_worker_lost="wait", timeout=60.0)
    with syncbn.Worker(master.target, "other", 0, 2, **options) as here:
        there = syncbn.Worker(master.target, "other", 1, 2, **options)
        begun = there.start_all_reduce("sum", [2.0])
        there.flush()
        np.testing.assert_array_equal(here.all_reduce("sum", [1.0]), [3.0])
        np.testing.assert_array_equal(begun.result(), [3.0])
        there.close()
        with syncbn.Worker(master.target, "other", 1, 2, **options) as successor:
            with pytest.raises(syncbn.AlreadyExists) as raised:
                successor.all_reduce("sum", [2.5])
            assert raised.value.reason == "PAYLOAD_CHANGED"


def test_the_state_has_the_next_sequences(master):
    with syncbn.Worker(master.target, "state", 0, 1) as worker:
        assert worker.newest_rounds() == {}
        worker.resume_at(4)
        worker.all_reduce("sum", [1.0])
        worker.all_reduce("sum", [1.0])
        state = worker.state_dict()
        assert state == {"first": 4, "next": {"sum": {"forward": 4, "backward": 4, "sum": 6}}}
    with syncbn.Worker(master.target, "state-again", 0, 1) as worker:
        worker.load_state_dict(json.loads(json.dumps(state)))
        assert worker.state_dict() == state


@pytest.mark.parametrize(
    "state, named",
    [
        (None, "None"),
        ({"first": 0}, "next"),
        ({"first": -1, "next": {}}, "-1"),
        ({"first": 0, "next": {"a": {"sideways": 1}}}, "sideways"),
        ({"first": 0, "next": {"a": {"sum": 2**64 - 1}}}, str(2**64 - 1)),
        ({"first": 0, "next": {"x" * 256: {"sum": 1}}}, "256"),
    ],
)
def test_what_is_not_a_state_is_refused(master, state, named):
    with syncbn.Worker(master.target, "bad-state", 0, 1) as worker:
        worker.resume_at(9)
        with pytest.raises(syncbn.InvalidArgument, match=named):
            worker.load_state_dict(state)
        assert worker.state_dict() == {"first": 9, "next": {}}


def test_the_policy_comes_from_the_environment(master, monkeypatch):
    monkeypatch.setenv("SYNCBN_ON_WORKER_LOST", "wait")
    with syncbn.Worker(master.target, "from-environment", 0, 2) as worker:
        assert worker.on_worker_lost == "wait"
        with pytest.raises(syncbn.FailedPrecondition, match="WAIT"):
            syncbn.Worker(master.target, "from-environment", 1, 2, on_worker_lost="fail")


@pytest.mark.parametrize("options", [{"on_worker_lost": "hope"}, {"on_worker_lost": "wait", "min_workers": 1}])
def test_policies_that_cannot_be_are_refused(master, options):
    with pytest.raises(syncbn.InvalidArgument, match=options["on_worker_lost"]):
        syncbn.Worker(master.target, "refused", 0, 2, **options)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
