"""A system that grants a worker no further thread: errors of syncbn's, or a worker that does without."""

import subprocess
import sys

import pytest

import syncbn

# A process of its own, in which no worker has been: _signals has no thread yet.
SCRIPT = """
import sys, threading
import syncbn
start = threading.Thread.start
def refuse(thread):
    if thread.name == sys.argv[2]:
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
def work():
    with syncbn.Worker(target=sys.argv[1], job=sys.argv[2], group="g", rank=0, world_size=1) as worker:
        return worker.synchronize("bn", 2, [1.0, 2.0], [0.0, 0.0])
try:
    print(work().count)
except syncbn.ResourceExhausted as error:
    assert "no thread can be had" in str(error) and "ulimit -u" in str(error), error
    print("refused")
threading.Thread.start = start
print(work().count)
assert [thread.name for thread in threading.enumerate()].count("syncbn-signals") == 1
"""


@pytest.mark.parametrize("name, printed", [("syncbn-join", ["refused", "2"]), ("syncbn-signals", ["2", "2"])])
def test_a_thread_that_is_refused(name: str, printed: list) -> None:
    with syncbn.Master() as master:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, master.target, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == printed
