"""A process that has no file descriptors left."""

import subprocess
import sys

_PROGRAM = """
import os, resource, sys, syncbn
target = sys.argv[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    os.close(held.pop())
try:
    syncbn.Worker(target, "descriptors", 0, 1)
except syncbn.ResourceExhausted as error:
    print(error.message)
for descriptor in held:
    os.close(descriptor)
with syncbn.Worker(target, "descriptors", 0, 1) as worker:
    print(worker.all_reduce("sum", [1.0]))
"""


def test_a_worker_without_descriptors_is_refused_and_the_process_lives(master):
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, master.target], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    refusal, total = result.stdout.splitlines()
    assert "file descriptors" in refusal and "limit 64" in refusal
    assert total == "[1.]"
