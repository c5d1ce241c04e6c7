"""A training whose masters die at chosen system calls, or are refused them, gives the bits of an undisturbed one."""

import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks/failpoints"))
import failpoints
from failpoints import Failpoint

SEED = 20261127
# Each strikes at its first call, which every master makes soon. Of those that accept, the first counts from the start:
# on a busy machine, all workers may connect before strace attaches to a master that is ready.
EACH = [
    Failpoint("accept4", "KILL", True, (1, 1)),
    Failpoint("accept4", "EMFILE", True, (1, 1)),
    Failpoint("pwrite64", "ENOSPC", False, (1, 1)),
]
OF_ONE = {
    "shared memory": [
        Failpoint("futex", "KILL", False, (1, 0)),
        Failpoint("fallocate", "ENOSPC", False, (1, 0)),
        Failpoint("clone3", "EAGAIN", False, (1, 0)),  # The thread that reads shared memory: gRPC takes its place.
    ],
    "TCP": [Failpoint("sendmsg", "KILL", False, (0, 1)), Failpoint("sendmsg", "ECONNRESET", False, (0, 1))],
}


@pytest.fixture(scope="module", autouse=True)
def permission_to_attach() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed, with which failpoints are made")
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        command = ["strace", "-o", "/dev/null", "-p", str(sleeper.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            said = tracer.stderr.readline()
            sleeper.kill()
    if "attached" not in said:
        pytest.skip(f"processes may not be traced here: {said.strip()}")


@pytest.mark.parametrize("transport", failpoints.TRANSPORTS)
def test_masters_with_failpoints_lose_nothing(transport):
    # A master with a failpoint takes ten steps at most, and the last ten steps meet none.
    points = EACH + OF_ONE[transport]
    result = failpoints.compare(steps=60, transport=transport, seed=SEED, failpoints=points)
    assert result.numbers > 50_000
    assert result.differences == 0
    assert [point for point in points if point.fate != "KILL" and result.master.deaths[point] > 0] == []
    assert {point: result.master.strikes[point] > 0 for point in points} == dict.fromkeys(points, True)
