"""--state-dir: what GetLayer shows after the master was killed, and files that it refuses.

The workers are written by hand, with grpcurl: they repeat to the next master what they choose.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from typing import Any, Callable, Dict, List, Optional

import pytest
import syncbn
from processes import GRPCURL, MASTER, PATIENCE, Master, inspect

LAYERS = {"bn1": 3, "bn2": 2}
# Rounds that a worker gives again to a master that it does not know.
KEPT = 16


class Worker:
    """The one worker of a group. It trains on numbers that its layer and sequence decide, for a while at a time."""

    def __init__(self) -> None:
        self.run_id: Optional[str] = None
        self.incarnation: Optional[str] = None
        self.done = 0  # Rounds.

    @staticmethod
    def contribution(layer: str, sequence: int) -> Dict[str, Any]:
        numbers = random.Random(f"{layer} {sequence}")
        mean = [numbers.gauss(0, 1) for _ in range(LAYERS[layer])]
        moments = {"count": "8", "mean": mean, "m2": [abs(m) + 1 for m in mean], "backward_role": "BACKWARD_ROLE_NONE"}
        key = {"layer": layer, "sequence": str(sequence), "phase": "PHASE_FORWARD"}
        return {"key": key, "moments": moments}

    def train(self, target: str, count: int, kept: int = KEPT) -> None:
        """Joins, gives the newest rounds again, and goes on with the next ones; returns when all are answered."""
        first = self.done
        sequences = list(range(max(0, first - kept), first + count))
        join: Dict[str, Any] = {"min_protocol_version": 1, "max_protocol_version": 1, "world_size": 1}
        if self.run_id is not None:
            join.update(run_id=self.run_id, incarnation=self.incarnation)
        layers = [{"name": name, "channels": channels, "kind": "LAYER_KIND_BATCH_NORM", "eps": 1e-5} for name, channels in
                  LAYERS.items()]
        layers[0]["momentum"] = 0.1  # The other one is a cumulative average.
        frame = {
            "join": join,
            "layers": layers,
            "contributions": [self.contribution(layer, s) for s in sequences for layer in LAYERS],
        }
        command = [GRPCURL, "-plaintext", "-emit-defaults", "-d", "@", target]
        command += ["syncbn.v1.StatisticsService/Synchronize"]
        done = subprocess.run(command, input=json.dumps(frame), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        frames = decode_all(done.stdout)
        joined = [frame["joined"] for frame in frames if frame.get("joined")]
        results = [result for frame in frames for result in frame.get("results", [])]
        assert len(results) == len(sequences) * len(LAYERS)
        assert all(result.get("moments") for result in results), results
        self.run_id, self.incarnation = joined[0]["run_id"], joined[0]["incarnation"]
        self.done += count


def decode_all(text: str) -> List[Dict[str, Any]]:
    decoder, frames = json.JSONDecoder(), []
    text = text.lstrip()
    while text:
        frame, end = decoder.raw_decode(text)
        frames.append(frame)
        text = text[end:].lstrip()
    return frames


def statistics(target: str) -> Dict[str, Any]:
    return {layer: inspect(target, "GetLayer", layer=layer)["running"] for layer in LAYERS}


def await_stored(target: str) -> None:
    """Waits until everything is stored."""
    end = time.monotonic() + PATIENCE
    while True:
        state = inspect(target, "ListGroups")["state"]
        if not state.get("pending"):
            assert "saved_at" in state and "error" not in state
            return
        assert time.monotonic() < end, state


def undisturbed(start: Callable[..., Any], count: int) -> Dict[str, Any]:
    master = start(Master)
    Worker().train(master.target, count)
    return statistics(master.target)


def test_a_training_whose_masters_are_killed(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """Killed at once after its answers, a master has stored nothing, some or all of the rounds."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    worker = Worker()
    unsaved = 0
    for _ in range(12):
        master = start(Master, "--state-dir", str(tmp_path / "state"))
        count = chance.randrange(1, 8)
        worker.train(master.target, count)
        unsaved += count
        # Rounds that were not stored must be among those that the worker can repeat.
        if unsaved + 7 > KEPT or chance.random() < 0.3:
            await_stored(master.target)
            unsaved = 0
        master.kill()
    master = start(Master, "--state-dir", str(tmp_path / "state"))
    worker.train(master.target, 1)
    expected = undisturbed(start, worker.done)
    assert statistics(master.target) == expected
    assert "missing" not in expected["bn1"]


def test_the_next_master_shows_them_before_anyone_comes_back(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(Master, "--state-dir", str(tmp_path))
    worker = Worker()
    worker.train(master.target, 5)
    before = statistics(master.target)
    assert master.terminate() == 0  # Stores what is not stored yet.
    master = start(Master, "--state-dir", str(tmp_path))
    assert statistics(master.target) == before
    [group] = inspect(master.target, "ListGroups")["groups"]
    assert group["run_id"] == worker.run_id and "present" not in group


def test_rounds_that_nobody_gives_again_are_missing(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(Master, "--state-dir", str(tmp_path))
    worker = Worker()
    worker.train(master.target, 3)
    assert master.terminate() == 0
    worker.done = 10  # Seven more, of which it remembers nothing.
    master = start(Master, "--state-dir", str(tmp_path))
    worker.train(master.target, 1, kept=0)
    for running in statistics(master.target).values():
        assert running["missing"] == {"after": "2", "before": "10"}
        assert running["updates"] == "4"


def refused(directory: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    command = [MASTER, "--address", "127.0.0.1:0", "--max-lifetime", "0.01", "--state-dir", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_second_master_is_refused(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(Master, "--state-dir", str(tmp_path))
    done = refused(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert f'another master uses the state file "{tmp_path}/state.db"' in done.stderr
    os.kill(master.process.pid, signal.SIGKILL)
    master.process.wait(PATIENCE)
    assert refused(tmp_path).returncode == 0


def test_a_damaged_file_is_refused_and_kept(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(Master, "--state-dir", str(tmp_path))
    Worker().train(master.target, 1)
    assert master.terminate() == 0
    file = tmp_path / "state.db"
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2 :] = bytes(len(bytes_) - len(bytes_) // 2)
    file.write_bytes(bytes_)
    done = refused(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "is damaged and stays as it is" in done.stderr
    assert file.read_bytes() == bytes_


def test_a_disk_that_fills_up_stops_no_round(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """The limit of a file's size stands for a full disk."""
    limit = ["bash", "-c", 'ulimit -f 48; trap "" XFSZ; exec "$@"', "bash"]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        master = start(LimitedMaster, limit, "--state-dir", str(tmp_path / "state"), stderr=stderr)
    worker = Worker()
    for _ in range(12):
        worker.train(master.target, 8)
    end = time.monotonic() + PATIENCE
    while "cannot be stored" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        worker.train(master.target, 8)
    assert inspect(master.target, "ListGroups")["state"]["error"]
    assert statistics(master.target) == undisturbed(start, worker.done)
    master.kill()
    # The statistics that had been stored before are whole.
    master = start(Master, "--state-dir", str(tmp_path / "state"))
    assert int(statistics(master.target)["bn1"]["updates"]) > 0


def test_a_directory_that_is_removed_is_told_and_stops_no_round(
    start: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    log, state = tmp_path / "log", tmp_path / "state"
    with log.open("w") as stderr:
        master = start(Master, "--state-dir", str(state), stderr=stderr)
    worker = Worker()
    worker.train(master.target, 3)
    await_stored(master.target)
    shutil.rmtree(state)
    end = time.monotonic() + PATIENCE
    while "was moved or removed" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        worker.train(master.target, 8)
    assert "was moved or removed" in inspect(master.target, "ListGroups")["state"]["error"]
    worker.train(master.target, 2 * KEPT)
    master.kill()
    # The next master begins anew, and shows that rounds are missing which nobody gives again.
    master = start(Master, "--state-dir", str(state))
    worker.train(master.target, 1)
    assert statistics(master.target)["bn1"]["missing"]


class LimitedMaster(Master):
    """A master that is started by another command."""

    def __init__(self, before: List[str], *flags: str, stderr: Any) -> None:
        command = [*before, MASTER, "--max-lifetime", "300", "--address", "127.0.0.1:0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        self.target = self.process.stdout.readline().split()[3]


def test_python_passes_it_on(tmp_path: pathlib.Path) -> None:
    with syncbn.Master(state_dir=tmp_path) as master:
        with syncbn.Worker(master.target, rank=0, world_size=1) as worker:
            worker.declare_layer("bn1", 1)
            worker.synchronize("bn1", 4, [1.0], [2.0])
        before = inspect(master.target, "GetLayer", layer="bn1")["running"]
        assert before["updates"] == "1"
    with syncbn.Master(state_dir=tmp_path) as master:
        assert inspect(master.target, "GetLayer", layer="bn1")["running"] == before
        with pytest.raises(syncbn.Unavailable, match="another master uses the state file"):
            syncbn.Master(state_dir=tmp_path)
