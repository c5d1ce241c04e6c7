"""The library's log, through Python's logging."""

import logging
import os
import subprocess
import sys
import threading

import pytest

import syncbn
from syncbn import _library


def say(level, text):
    _library.lib.syncbn_log_keep(level, text.encode(), None)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
def test_a_line_reaches_the_logger_with_its_level(master, caplog, level):
    caplog.set_level(logging.DEBUG, logger="syncbn")
    with syncbn.Worker(master.target, "log", 0, 1) as worker:
        say(level, "a line, 100% of it: \u00fc")
        worker.flush()  # Any call delivers.
    assert ("syncbn", level, "a line, 100% of it: \u00fc") in caplog.record_tuples


def test_lines_of_other_threads_are_delivered_while_a_worker_joins(caplog):
    """Joining is one long call, during which the waiting thread delivers the log."""
    seen = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: seen.set()
    logging.getLogger("syncbn").addHandler(handler)

    def join():
        with pytest.raises(syncbn.Unavailable):
            syncbn.Worker("127.0.0.1:1", "log", 0, 1, join_timeout=0.5)

    try:
        thread = threading.Thread(target=join)
        thread.start()
        say(logging.WARNING, "while it joins")
        thread.join()
        assert seen.is_set()
    finally:
        logging.getLogger("syncbn").removeHandler(handler)


_AT_EXIT = """
import logging, os, sys, syncbn
from syncbn import _library
logging.basicConfig(format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
_library.lib.syncbn_log_keep(30, b"of the parent", None)
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    _library.lib.syncbn_log_keep(30, b"of the child", None)
"""


def test_the_last_lines_are_delivered_at_exit_and_by_a_child_only_its_own():
    result = subprocess.run([sys.executable, "-c", _AT_EXIT], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert result.stdout == "syncbn WARNING of the child\nsyncbn WARNING of the parent\n"


def test_grpc_does_not_speak_to_the_terminal():
    """A port in use: gRPC says so in its own log, at error level."""
    code = (
        "import syncbn, logging; logging.basicConfig(level=logging.INFO)\n"
        "worker = None\n"
        "try: syncbn.Worker('127.0.0.1:1', 'log', 0, 1, join_timeout=0.2)\n"
        "except syncbn.Unavailable as error: print(error.reason)\n"
    )
    environment = dict(os.environ, GRPC_VERBOSITY="debug")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert (result.stdout, result.stderr) == ("UNREACHABLE\n", "")
