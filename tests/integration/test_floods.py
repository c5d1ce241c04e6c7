"""Floods of small HTTP/2 frames: what they cost the master, and that rounds go on."""

import pathlib
import re
import sys
import time
from typing import Callable

import pytest
import syncbn
from processes import PATIENCE, Master

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


@pytest.mark.parametrize("make", [reset, ping])
def test_a_flood_is_ended_whenever_it_begins(master: Master, make: Callable[[int], bytes]) -> None:
    flood = [b"".join(make(stream) for stream in range(begin, begin + 200, 2)) for begin in range(1, 400_000, 200)]
    host, port = master.target.rsplit(":", 1)
    with syncbn.Worker(master.target, "honest", 0, 1) as worker:
        sent = 0
        for _ in range(6):
            connection = wire.Connection((host, int(port)))
            for part in flood:
                if not connection.send(part):
                    break
            sent += connection.sent
            connection.close()
            assert worker.all_reduce("rounds go on", [1.0]) == [1.0]
        size = sum(map(len, flood))
        assert make is ping or sent < 6 * min(size, 16 * MIB), "nobody has ended it"
    assert peak(master) < 200


def test_memory_goes_back_to_the_system_after_the_last_stream(master: Master) -> None:
    host, port = master.target.rsplit(":", 1)
    before = resident(master)
    cut_short = wire.message(wire.join("held", 1))[:-1]  # Each call waits for the rest.
    connections = [wire.Connection((host, int(port))) for _ in range(100)]
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
