"""Daemon threads that use a worker while the program ends: they end as other daemon threads do, without a word."""

import subprocess
import sys

import pytest

_PROGRAM = """
import logging, threading
import numpy as np
import syncbn, syncbn.numpy
logging.getLogger("syncbn").setLevel("ERROR")  # Rounds that are late on a busy machine are warnings.
master = syncbn.Master()
began = threading.Event()

def worker(rank=0, world_size=2):
    return syncbn.Worker(master.target, rank=rank, world_size=world_size, timeout=600)

def waits(step):
    def body():
        began.set()
        step()
        print("not ended", flush=True)
    return body

def repeats(step):
    def body():
        while True:
            step()
            began.set()
    return body

def within(member, step):
    def body():
        with member:
            step()
    return body
"""

_THREADS = {
    "a sum": "a = worker(); bodies = [waits(lambda: a.all_reduce('sum', [1.0]))]",
    "a pass": "a = worker(); bodies = [waits(lambda: syncbn.numpy.forward(a, 'layer', np.ones((2, 1))))]",
    "members": "a = worker(); bodies = [waits(lambda: a.wait_for_members(None))]",
    "a with block": "a = worker(); bodies = [waits(within(a, lambda: a.all_reduce('sum', [1.0])))]",
    "one round after the other": "a = worker(0, 1); bodies = [repeats(lambda: a.all_reduce('sum', [1.0]))]",
    # The first that is closed is lost to the others.
    "several workers": (
        "a, b, c = (worker(rank, 4) for rank in range(3))\n"
        "bodies = [waits(lambda w=w: w.all_reduce('sum', [1.0])) for w in (a, b, c)]"
    ),
}

_END = """
for body in bodies:
    threading.Thread(target=body, daemon=True).start()
began.wait()
"""
# Until a thread is within a call.
_HELD = """
while not a._users:
    pass
"""


def _run(program):
    """Returns the code, stdout, and stderr without what the master says there, which outlives the workers for a moment."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if not line.startswith("syncbn: ")]
    return done.returncode, done.stdout, said


@pytest.mark.parametrize("what", list(_THREADS))
def test_a_daemon_thread_ends_with_the_program_without_a_word(what):
    held = "" if what.startswith("one") else _HELD
    assert _run(_PROGRAM + _THREADS[what] + _END + held) == (0, "", [])


def test_a_daemon_thread_whose_worker_is_closed_before_the_end_is_told():
    hook = "threading.excepthook = lambda given: print(given.exc_type.__name__, flush=True)\n"
    ended = "\nthread = threading.Thread(target=bodies[0], daemon=True)\nthread.start()\n" + _HELD
    code, told, said = _run(_PROGRAM + hook + _THREADS["a sum"] + ended + "a.close()\nthread.join()\n")
    # Closing cancels a round that waits; a thread that has yet to give its values finds the worker closed.
    assert (code, told in ("Cancelled\n", "FailedPrecondition\n"), said) == (0, True, []), told
