"""Floods of small HTTP/2 frames: what they cost the master, and that rounds go on."""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import Any, Callable, List

import pytest
import syncbn
from processes import PATIENCE, Master, WorkerProcess, inspect

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "hostile"))

import wire  # noqa: E402

MIB = 1 << 20
BLOCK = wire.header_block(wire.SYNCHRONIZE)


def memory(master: Master, what: str) -> float:
    """Returns a figure of the master's /proc/PID/status in MiB."""
    status = pathlib.Path(f"/proc/{master.process.pid}/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def peak(master: Master) -> float:
    return memory(master, "VmHWM")


def resident(master: Master) -> float:
    return memory(master, "VmRSS")


def reset(stream: int) -> bytes:
    """Returns a call that is reset at once."""
    return wire.frame(wire.HEADERS, wire.END_HEADERS, stream, BLOCK) + wire.frame(
        wire.RST_STREAM, 0, stream, wire.CANCELLED
    )


def ping(_: int) -> bytes:
    return wire.frame(wire.PING, 0, 0, bytes(8))


def priority(_: int) -> bytes:
    return wire.frame(wire.PRIORITY, 0, 1, bytes([0, 0, 0, 0, 1]))


@pytest.mark.parametrize("make", [reset, ping])
def test_a_flood_is_ended_whenever_it_begins(master: Master, make: Callable[[int], bytes]) -> None:
    flood = [b"".join(make(stream) for stream in range(begin, begin + 200, 2)) for begin in range(1, 400_000, 200)]
    host, port = master.target.rsplit(":", 1)
    with syncbn.Worker(master.target, "honest", 0, 1) as worker:
        sent = 0
        for _ in range(6):
            connection = wire.Connection(wire.Target(host, int(port)))
            for part in flood:
                if not connection.send(part):
                    break
            sent += connection.sent
            connection.close()
            assert worker.all_reduce("rounds go on", [1.0]) == [1.0]
        size = sum(map(len, flood))
        assert make is ping or sent < 6 * min(size, 16 * MIB), "nobody has ended it"
    assert peak(master) < 200


def test_a_flood_that_leaves_no_connection_keeps_nobody_out(master: Master) -> None:
    host, port = master.target.rsplit(":", 1)
    flood = b"".join(reset(stream) for stream in range(1, 20_000, 2))
    for group in range(3):
        connection = wire.Connection(wire.Target(host, int(port)))
        while connection.send(flood):
            pass
        connection.close()
        with syncbn.Worker(master.target, f"honest {group}", 0, 1) as worker:
            assert worker.all_reduce("rounds go on", [1.0]) == [1.0]


class Burner:
    """A process that keeps a core busy."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])


class LoggedMaster(Master):
    """A master that shares no memory, and whose log is kept."""

    def __init__(self, log: pathlib.Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            super().__init__("--shared-memory", "off", stderr=stderr)

    def log(self) -> str:
        return self._log.read_text()


# The connection of a worker is ended late: others are served by another thread.
@pytest.mark.parametrize("make", [reset, ping, priority])
def test_rounds_go_on_beside_a_worker_that_floods(
    start: Callable[..., Any], tmp_path: pathlib.Path, make: Callable[[int], bytes]
) -> None:
    master = start(LoggedMaster, tmp_path / "log")
    host, port = master.target.rsplit(":", 1)
    parts = [b"".join(make(stream) for stream in range(begin, begin + 4000, 2)) for begin in range(3, 400_003, 4000)]
    ended = threading.Event()
    sent = []

    def flood() -> None:
        while not ended.is_set():
            connection = wire.Connection(wire.Target(host, int(port)))
            connection.call(1, wire.SYNCHRONIZE, wire.join("flooding", 1))
            while all(not ended.is_set() and connection.send(part) for part in parts):
                pass
            sent.append(connection.sent)
            connection.close()

    thread = threading.Thread(target=flood)
    with syncbn.Worker(master.target, "honest", 0, 1, timeout=PATIENCE) as worker:
        assert worker.all_reduce("before", [1.0]) == [1.0]
        thread.start()
        try:
            for _ in range(300):
                assert worker.all_reduce("rounds go on", [1.0]) == [1.0]
        finally:
            ended.set()
            thread.join()
    # Otherwise each round waits until the flood pauses: 1 to 5 GiB of PING or PRIORITY frames, or of resets a few
    # hundred MiB of calls that nobody takes.
    assert sum(sent) < 1024 * MIB
    assert peak(master) < 200


def test_long_vectors_under_load_are_no_flood(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(LoggedMaster, tmp_path / "log")
    for _ in range(os.cpu_count() or 1):
        start(Burner)

    def begin(name: str) -> List[WorkerProcess]:
        return [start(WorkerProcess, master.target, rank, 2, group=name) for rank in range(2)]

    def ask(workers: List[WorkerProcess], times: int) -> None:
        for worker in workers:
            assert worker.answer()["transport"] == "gRPC"
        for worker in workers:
            worker.ask(sum_long="long", length=1 << 20, times=times)

    first = begin("first")
    ask(first, 8)
    later = [worker for name in ("second", "third", "fourth") for worker in begin(name)]  # They join meanwhile.
    ask(later, 2)
    for worker in later:
        assert worker.answer()["result"] == [2, 2.0, 2.0]
    for worker in first:
        assert worker.answer()["result"] == [8, 2.0, 2.0]
    assert "closed a connection" not in master.log()


def test_many_calls_at_once_are_no_flood(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    master = start(LoggedMaster, tmp_path / "log")
    calls = 200
    host, port = master.target.rsplit(":", 1)
    connection = wire.Connection(wire.Target(host, int(port)))
    try:
        connection.send(
            b"".join(
                wire.frame(wire.HEADERS, wire.END_HEADERS, 2 * rank + 1, BLOCK)
                + wire.frame(wire.DATA, 0, 2 * rank + 1, wire.message(wire.join("many", calls, rank=rank)))
                for rank in range(calls)
            )
        )
        end = time.monotonic() + PATIENCE
        while [group.get("present") for group in inspect(master.target, "ListGroups").get("groups", [])] != [calls]:
            assert time.monotonic() < end and "closed a connection" not in master.log(), master.log()
    finally:
        connection.close()


def test_memory_goes_back_to_the_system_after_the_last_stream(master: Master) -> None:
    host, port = master.target.rsplit(":", 1)
    before = resident(master)
    cut_short = wire.message(wire.join("held", 1))[:-1]  # Each call waits for the rest.
    connections = [wire.Connection(wire.Target(host, int(port))) for _ in range(100)]
    for connection in connections:
        for stream in range(1, 61, 2):
            call = wire.frame(wire.HEADERS, wire.END_HEADERS, stream, BLOCK)
            connection.send(call + wire.frame(wire.DATA, 0, stream, cut_short))
    end = time.monotonic() + PATIENCE
    while resident(master) < before + 20:
        assert time.monotonic() < end, f"{resident(master)} MiB, and {before} at first"
    grown = resident(master)
    for connection in connections:
        connection.close()
    while resident(master) > before + (grown - before) / 2:
        assert time.monotonic() < end, f"{resident(master)} MiB of {grown}, and {before} at first"


def send_beside_rounds(master: Master, connections: int, data: bytes) -> int:
    """Sends the data by each of so many connections, with a round after each. Returns how many bytes were sent."""
    host, port = master.target.rsplit(":", 1)
    opened = []
    with syncbn.Worker(master.target, "honest", 0, 1) as worker:
        for _ in range(connections):
            opened.append(wire.Connection(wire.Target(host, int(port))))
            opened[-1].send(data)
            assert worker.all_reduce("rounds go on", [1.0]) == [1.0]
        for connection in opened:
            connection.close()
    return sum(connection.sent for connection in opened)


def test_headers_without_an_end_take_little_memory(master: Master) -> None:
    header = b"".join(b"\x00\x05key%02d\x64" % number + b"v" * 100 for number in range(100))
    begin, more = wire.frame(wire.HEADERS, 0, 1, BLOCK), wire.frame(wire.CONTINUATION, 0, 1, header)
    assert send_beside_rounds(master, 100, begin + more * 200) > 64 * MIB
    assert peak(master) < 200


def test_calls_with_long_headers_take_little_memory(master: Master) -> None:
    long_header = b"\x00" + wire.text("x") + b"\x7f" + wire.varint(6600 - 127) + bytes(6600)
    calls = b"".join(wire.frame(wire.HEADERS, wire.END_HEADERS, stream, BLOCK + long_header) for stream in range(1, 181, 2))
    assert send_beside_rounds(master, 112, calls) > 48 * MIB  # Each begins 90 calls, and ends none.
    assert peak(master) < 200
