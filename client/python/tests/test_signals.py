"""Ctrl-C while the main thread waits in foreign code for a thread that waits for a round."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import processes

# The number of trials with a random order of signal and wait. The long form: SYNCBN_INTERRUPTS=1000, all cores busy.
TIMES = int(os.environ.get("SYNCBN_INTERRUPTS", "10"))

pytestmark = pytest.mark.skipif(not os.access("/proc/self/syscall", os.R_OK), reason="/proc does not tell system calls")

_PROGRAM = """
import ctypes, signal, sys, threading, syncbn
signal.signal(signal.SIGINT, signal.default_int_handler)  # Under nohup and the like it is ignored.
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
gated, times = sys.argv[1] == "gated", int(sys.argv[2])
print(hex(ctypes.addressof(mutex)), flush=True)
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=2, timeout=600) as worker:
    for i in range(times):
        seen = []
        def wait():
            try:
                if gated:
                    sys.stdin.readline()
                worker.all_reduce(f"sum{i}", [1.0])
            except BaseException as error:
                seen.append(type(error).__name__)
            libc.pthread_mutex_unlock(mutex)
        libc.pthread_mutex_lock(mutex)
        try:
            thread = threading.Thread(target=wait)
            thread.start()
            print("ready", flush=True)
            libc.pthread_mutex_lock(mutex)  # As autograd's engine or JAX's runtime: no signal ends this.
            print("not interrupted", flush=True)
        except KeyboardInterrupt:
            pass
        thread.join()
        libc.pthread_mutex_unlock(mutex)
        print(seen, flush=True)
    worker.close()
"""


@pytest.mark.parametrize("order, times", [("gated", 3), ("free", TIMES)])
def test_a_wait_hears_ctrl_c(order, times):
    """A gated wait begins after the signal has come, and before the main thread has answered it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, order, str(times)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip()
        for _ in range(times):
            assert process.stdout.readline() == "ready\n"
            # Wait until its main thread waits for the mutex: a futex call, whose first argument is the address.
            while address not in pathlib.Path(f"/proc/{process.pid}/syscall").read_text().split():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            if order == "gated":
                process.stdin.write("go\n")
                process.stdin.flush()
            assert process.stdout.readline() == "['KeyboardInterrupt']\n"
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()


_HEARD_BEFORE = """
import ctypes, os, signal, threading, time, syncbn
signal.signal(signal.SIGINT, signal.default_int_handler)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=2, timeout=600) as worker:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
    except KeyboardInterrupt:
        pass  # As a notebook does, whose next cell waits for long.
    end = time.monotonic() + 2
    while time.monotonic() < end:
        pass
    def wait():
        try:
            print(worker._handle is not None and worker.start_all_reduce("sum", [1.0]).wait(1.0))
        except BaseException as error:
            print(type(error).__name__)
        libc.pthread_mutex_unlock(mutex)
    libc.pthread_mutex_lock(mutex)
    thread = threading.Thread(target=wait)
    thread.start()
    libc.pthread_mutex_lock(mutex)
    thread.join()
    worker.close()
"""


def test_a_signal_that_the_main_thread_has_answered_is_over():
    process = subprocess.run(
        [sys.executable, "-c", _HEARD_BEFORE], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    assert process.stdout == "False\n"


# ---- Handlers of the program's own, on the main thread, within its wait ----

_WITHIN = processes.SIGNAL_IN_WAIT + """
import numpy as np
import syncbn, syncbn.numpy
waits, handler = {
    "sum": lambda: a.all_reduce("sum", [1.0]),
    "pass": lambda: syncbn.numpy.forward(a, "layer", np.ones((2, 1))),
    "members": lambda: a.wait_for_members(None),
}[sys.argv[1]], {
    "leave": lambda: a.leave(),
    "close": lambda: a.close(),
    "interrupt": lambda: a.interrupt(),
    "exit": lambda: sys.exit("exit"),
    "checkpoint": lambda: print(sorted(a.state_dict()), a.stats().rounds, a.interrupt()),
}[sys.argv[2]]

signal.signal(signal.SIGUSR1, lambda *_: handler())
with syncbn.Master() as master:
    a = syncbn.Worker(master.target, rank=0, world_size=2, timeout=600)
    threading.Thread(target=signal_in_wait, daemon=True).start()
    try:
        with a:
            waits()
    except (syncbn.Error, SystemExit) as error:
        print(type(error).__name__, getattr(error, "reason", ""), a.closed)
"""

_OUTCOMES = {
    "leave": "FailedPrecondition LEFT True\n",
    "close": "Cancelled CLOSED True\n",
    "interrupt": "Cancelled INTERRUPTED True\n",
    "exit": "SystemExit  True\n",
    "checkpoint": "['first', 'next'] 0 None\nCancelled INTERRUPTED True\n",
}


@pytest.mark.parametrize("handler", list(_OUTCOMES))
@pytest.mark.parametrize("waits", ["sum", "pass", "members"])
def test_what_a_handler_does_to_the_worker_that_its_thread_waits_for(waits, handler):
    """As programs do that are told to end. An interrupt between two looks at the library was lost, and a close waited for
    the wait that it was called in.
    """
    done = subprocess.run(
        [sys.executable, "-c", _WITHIN, waits, handler], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, _OUTCOMES[handler], "")


_WHILE_JOINING = """
import os, signal, socket, threading, syncbn
silent = socket.socket()  # Takes connections, and says nothing.
silent.bind(("127.0.0.1", 0))
silent.listen()
os.environ.update(SYNCBN_TARGET=f"127.0.0.1:{silent.getsockname()[1]}", RANK="0", WORLD_SIZE="2", SYNCBN_JOIN_TIMEOUT="200")
def handler(*_):
    try:
        syncbn.default_worker().leave()
    except syncbn.Error as error:
        print(error.reason, "making one" in str(error))
    raise SystemExit(5)
signal.signal(signal.SIGTERM, handler)
def end():
    silent.accept()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
try:
    syncbn.default_worker()
finally:  # A thread within the library would crash the process at its end, now and then.
    print([thread.name for thread in threading.enumerate() if thread.name == "syncbn-join"])
"""


def test_a_handler_that_asks_for_the_worker_that_its_thread_is_making_and_ends_the_program():
    done = subprocess.run([sys.executable, "-c", _WHILE_JOINING], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (5, "NO_WORKER True\n[]\n", "")


_DAEMON = """
import atexit, socket, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate() if thread.name == "syncbn-join"]))
import syncbn
silent = socket.socket()
silent.bind(("127.0.0.1", 0))
silent.listen()
def join():
    try:
        syncbn.Worker(f"127.0.0.1:{silent.getsockname()[1]}", rank=0, world_size=2, join_timeout=200)
    except syncbn.Cancelled:
        pass
threading.Thread(target=join, daemon=True).start()
silent.accept()
"""


def test_a_join_on_another_thread_ends_with_the_program():
    done = subprocess.run([sys.executable, "-c", _DAEMON], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
