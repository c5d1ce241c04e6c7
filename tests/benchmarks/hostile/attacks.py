"""What the attacks of the benchmark send. Each takes its time, and returns the bytes that it has sent."""

import contextlib
import itertools
import pathlib
import select
import socket
import subprocess
import sys
import time
import zlib
from typing import Callable, Dict, Iterator, List, NamedTuple

import wire

_HERE = pathlib.Path(__file__).resolve().parent
_MIB = 1 << 20
_WIDEST = 1 << 16  # Channels.
TOKEN = "the-token-of-the-honest-workers"

Attack = Callable[[wire.Target, float], int]


def _wait_until(end: float) -> None:
    time.sleep(max(0.0, end - time.monotonic()))


def _paced(seconds: float, per_second: int) -> Iterator[int]:
    """Counts from 0, each number at its time."""
    begin = time.monotonic()
    for index in range(int(seconds * per_second) + 1):
        _wait_until(begin + index / per_second)
        yield index


def _send(target: wire.Target, seconds: float, *contents: bytes, reads: bool = True, encoding: str = "") -> int:
    """Writes the messages on one call, then keeps it for the rest of the time. Bytes sent."""
    end = time.monotonic() + seconds
    call = wire.Call(target, reads=reads, encoding=encoding)
    try:
        for content in contents:
            call.write(content)
        _wait_until(end)
        return call.sent
    finally:
        call.close()


def _empty_rounds(reads: bool) -> Attack:
    first = wire.join("empty rounds", 1) + wire.layer_spec(b"wide", _WIDEST)
    first += b"".join(wire.empty_contribution(b"wide", sequence) for sequence in range(900))
    return lambda target, seconds: _send(target, seconds, wire.message(first), reads=reads)


def _gzip_bomb(target: wire.Target, seconds: float) -> int:
    # An unknown field of zeros, a thousand times as long as its compressed form.
    size = 512 * _MIB
    compressor = zlib.compressobj(6, wbits=31)
    parts = [compressor.compress(wire.varint(15 << 3 | 2) + wire.varint(size))]
    parts += [compressor.compress(bytes(_MIB)) for _ in range(size // _MIB)]
    content = b"".join([*parts, compressor.flush()])
    return _send(target, seconds, wire.message(content, compressed=True), encoding="gzip")


def _empty_messages(joins: bool) -> Attack:
    flood = wire.message(b"\x12\x00" * (30 * _MIB))
    first = [wire.message(wire.join("empty messages", 1))] if joins else []
    return lambda target, seconds: _send(target, seconds, *first, flood)


def _expiry_storm(target: wire.Target, seconds: float) -> int:
    rounds = b"".join(wire.empty_contribution(b"a", sequence) for sequence in range(8192))
    end = time.monotonic() + seconds
    sent = 0
    for storm in itertools.count():
        if time.monotonic() > end:
            return sent
        first = wire.join(f"expiry storm {storm}", 4096, round_timeout=0.01) + wire.layer_spec(b"a", 1)
        sent += _send(target, 0.2, wire.message(first + rounds))


def _many_wide_layers(target: wire.Target, seconds: float) -> int:
    names = [f"{index}".encode() for index in range(1500)]
    first = wire.join("many wide layers", 1) + b"".join(wire.layer_spec(name, _WIDEST) for name in names)
    rounds = b"".join(wire.empty_contribution(name, 0) for name in names)
    return _send(target, seconds, wire.message(first), wire.message(rounds))


def _blocked_on(target: wire.Target, seconds: float) -> int:
    layer = b"a"
    first = wire.join("blocked on", 2) + wire.layer_spec(layer, 1)
    rounds = b"".join(wire.empty_contribution(layer, sequence) for sequence in range(8192))
    promises = b"".join(wire.piece(4, wire.key(layer, 8191 - sequence % 8192)) for sequence in range(65536))
    return _send(target, seconds, wire.message(first), *[wire.message(rounds + promises)] * 3)


def _idle(target: wire.Target, seconds: float) -> int:
    # With TLS each takes both sides a millisecond and more.
    count = 2000 if target.context is None else 1000
    connections = [wire.Connection(target) for _ in range(count)]
    try:
        time.sleep(seconds)
        return sum(connection.sent for connection in connections)
    finally:
        for connection in connections:
            connection.close()


def _joined_and_deaf(target: wire.Target, seconds: float) -> int:
    connection = wire.Connection(target, reads=False, window=0)
    layer = wire.layer_spec(b"wide", _WIDEST)
    rounds = b"".join(wire.empty_contribution(b"wide", sequence) for sequence in range(4))
    end = time.monotonic() + seconds
    try:
        for index in range(1000):
            if not connection.call(2 * index + 1, wire.SYNCHRONIZE, wire.join(f"deaf {index}", 1) + layer + rounds):
                break
        _wait_until(end)
        return connection.sent
    finally:
        connection.close()


def _joins(target: wire.Target, seconds: float) -> int:
    """500 workers a second join, each alone in its group, and leave."""
    connection = wire.Connection(target)
    try:
        for index in _paced(seconds, 500):
            content = wire.join(f"joins {index % 500}", 1) + wire.piece(5, b"")
            connection.call(2 * index + 1, wire.SYNCHRONIZE, content, ends=True)
        return connection.sent
    finally:
        connection.close()


def _taken_seats(target: wire.Target, seconds: float) -> int:
    """500 joins a second of a rank that an honest worker has, with the group's token, each of which is refused."""
    connection, sent = wire.Connection(target), 0
    try:
        for index in _paced(seconds, 500):
            content = wire.join("honest", 8, rank=index % 8, token=TOKEN)
            if not connection.call(2 * (index % 2**29) + 1, wire.SYNCHRONIZE, content, ends=True):
                connection.close()
                sent += connection.sent
                connection = wire.Connection(target)
        return sent + connection.sent
    finally:
        connection.close()


def _watchers(target: wire.Target, seconds: float) -> int:
    """1,000 calls that ask for the end of each honest round, on ten connections that read nothing."""
    end = time.monotonic() + seconds
    connections = [wire.Connection(target, reads=False, window=0) for _ in range(10)]
    try:
        for index in range(1000):
            connection = connections[index % 10]
            headers = wire.header_block(wire.WATCH_ROUNDS, token=TOKEN)
            connection.send(wire.request(2 * (index // 10) + 1, headers, wire.piece(2, b"honest")))
        _wait_until(end)
        return sum(connection.sent for connection in connections)
    finally:
        for connection in connections:
            connection.close()


def _handshakes(target: wire.Target, seconds: float) -> int:
    """Handshakes one after another, each of which is refused, since it shows no certificate."""
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            wire.Connection(target).close()
        done += 1
    return done * 600  # About as many bytes each.


def _half_handshakes(target: wire.Target, seconds: float) -> int:
    """2,000 connections that begin a handshake and send no more; each connects again when it is cut off."""
    end, sent = time.monotonic() + seconds, 0
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)
    connections: List[socket.socket] = []
    try:
        while time.monotonic() < end:
            while len(connections) < 2000 and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    connections.append(socket.create_connection((target.host, target.port), timeout=60))
                    connections[-1].sendall(hello)
                    sent += len(hello)
            poll = select.poll()
            for connection in connections:
                poll.register(connection, select.POLLIN)
            closed = {descriptor for descriptor, _ in poll.poll(200)}
            for connection in [each for each in connections if each.fileno() in closed]:
                connections.remove(connection)
                connection.close()
    finally:
        for connection in connections:
            connection.close()
    return sent


def _flood(make: Callable[[int], bytes], first: bytes = b"") -> Attack:
    """Sends what `make` makes for each stream's number as fast as it can, and connects again when it is cut off."""

    def attack(target: wire.Target, seconds: float) -> int:
        end, sent = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            try:
                connection = wire.Connection(target)
            except OSError:
                continue
            connection.send(first)
            for begin in range(1, 2**30, 200):
                if time.monotonic() > end or not connection.send(b"".join(map(make, range(begin, begin + 200, 2)))):
                    break
            sent += connection.sent
            connection.close()
        return sent

    return attack


def _unread_answers(target: wire.Target, seconds: float) -> int:
    worker = wire.Call(target)
    connection = wire.Connection(target, reads=False, window=0)
    end = time.monotonic() + seconds
    try:
        layer = wire.layer_spec(b"wide", _WIDEST) + wire.empty_contribution(b"wide", 0)
        worker.write(wire.message(wire.join("unread", 1) + layer))
        time.sleep(0.5)  # The layer is there.
        request = wire.piece(2, b"unread") + wire.piece(3, b"wide")
        for index in range(1000):
            if not connection.call(2 * index + 1, wire.GET_LAYER, request, ends=True):
                break
        _wait_until(end)
        return worker.sent + connection.sent
    finally:
        connection.close()
        worker.close()


def _endless_headers(target: wire.Target, seconds: float) -> int:
    """Headers that go on in frame after frame, by 200 connections in turns; each connects again when it is cut off."""
    end, sent = time.monotonic() + seconds, 0
    begin = wire.frame(wire.HEADERS, 0, 1, _BLOCK + b"\x00\x01x\x7f" + wire.varint(_MIB * 64))
    more = wire.frame(wire.CONTINUATION, 0, 1, bytes(16384))
    connections: List[wire.Connection] = []
    while time.monotonic() < end:
        while len(connections) < 200 and time.monotonic() < end:
            with contextlib.suppress(OSError):
                connections.append(wire.Connection(target))
                connections[-1].send(begin)
        kept = []
        for connection in connections:
            if connection.send(more, wait=False):
                kept.append(connection)
            else:
                sent += connection.sent
                connection.close()
        connections = kept
    for connection in connections:
        sent += connection.sent
        connection.close()
    return sent


def _long_headers(target: wire.Target, seconds: float) -> int:
    """Calls as fast as they are taken, each with about as many headers as gRPC allows, by connections of 90 calls."""
    value = b"\x00" + wire.text("x") + b"\x7f" + wire.varint(6600 - 127) + bytes(6600)
    end, sent = time.monotonic() + seconds, 0
    connections: List[wire.Connection] = []
    while time.monotonic() < end and len(connections) < 112:
        connection = wire.Connection(target)
        connections.append(connection)
        for stream in range(1, 181, 2):
            if not connection.send(wire.frame(wire.HEADERS, wire.END_HEADERS, stream, _BLOCK + value)):
                break
    _wait_until(end)
    for connection in connections:
        sent += connection.sent
        connection.close()
    return sent


def _long_sums(target: wire.Target, seconds: float) -> int:
    command = [sys.executable, str(_HERE / "summing_worker.py"), f"{target.host}:{target.port}"]
    workers = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    time.sleep(seconds)
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
    sent = 0
    for worker in workers:
        assert worker.stdout is not None
        with worker.stdout:
            sent += int(worker.stdout.read())
        worker.wait()
    return sent


_BLOCK = wire.header_block(wire.SYNCHRONIZE)
_OPEN = wire.frame(wire.HEADERS, wire.END_HEADERS, 1, _BLOCK)

_RAPID_RESET = _flood(
    lambda stream: wire.frame(wire.HEADERS, wire.END_HEADERS, stream, _BLOCK)
    + wire.frame(wire.RST_STREAM, 0, stream, wire.CANCELLED)
)
_PINGS = _flood(lambda _: wire.frame(wire.PING, 0, 0, bytes(8)))
_SETTINGS = _flood(lambda _: wire.frame(wire.SETTINGS, 0, 0, b""))

_PLAIN: Dict[str, Attack] = {
    "2,000 idle connections": _idle,
    "1,000 streams that join and never read": _joined_and_deaf,
    "500 joins a second": _joins,
    "rapid reset": _RAPID_RESET,
    "1,000 answers that nobody reads": _unread_answers,
    "PING flood": _PINGS,
    "SETTINGS flood": _SETTINGS,
    "WINDOW_UPDATE flood": _flood(lambda _: wire.frame(wire.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), _OPEN),
    "PRIORITY flood": _flood(lambda stream: wire.frame(wire.PRIORITY, 0, stream, bytes(5))),
    "empty DATA flood": _flood(lambda _: wire.frame(wire.DATA, 0, 1, b""), _OPEN),
    "CONTINUATION flood": _flood(
        lambda _: wire.frame(wire.CONTINUATION, 0, 1, b""), wire.frame(wire.HEADERS, 0, 1, _BLOCK)
    ),
    "headers without an end, by 200 connections": _endless_headers,
    "10,000 calls with 6.6 KB of headers": _long_headers,
    "900 empty rounds of 65,536 channels, nobody reads": _empty_rounds(reads=False),
    "the same, read": _empty_rounds(reads=True),
    "a message that gzip makes 1,000 times longer": _gzip_bomb,
    "60 MiB of empty messages, before a join": _empty_messages(joins=False),
    "the same, after a join": _empty_messages(joins=True),
    "8,192 rounds that expire at once, over and over": _expiry_storm,
    "a round of each of 1,500 layers of 65,536 channels": _many_wide_layers,
    "65,536 promises of 8,192 rounds, 3 times": _blocked_on,
    "two honest workers that sum 10^6 doubles, over and over": _long_sums,
}
# By a master that demands certificates: of those who have one,
_WITH_CERTIFICATE: Dict[str, Attack] = {
    "1,000 idle connections": _idle,
    "1,000 streams that join and never read": _joined_and_deaf,
    "500 joins a second": _joins,
    "rapid reset": _RAPID_RESET,
    "PING flood": _PINGS,
    "SETTINGS flood": _SETTINGS,
    "headers without an end, by 200 connections": _endless_headers,
    "60 MiB of empty messages, before a join": _empty_messages(joins=False),
}
# and of those who have none.
_WITHOUT_CERTIFICATE: Dict[str, Attack] = {
    "handshakes without a certificate, one after another": _handshakes,
    "2,000 handshakes that stop half way": _half_handshakes,
}
# By a master with a token: of those who have it, and of those who have not.
_WITH_TOKEN: Dict[str, Attack] = {
    "500 joins a second of ranks that are taken": _taken_seats,
    "1,000 watchers that never read": _watchers,
}
_WITHOUT_TOKEN: Dict[str, Attack] = {"500 joins a second, all refused": _joins}


class Row(NamedTuple):
    name: str
    attack: Attack
    tls: bool = False  # The master demands certificates;
    certificate: bool = False  # the attack has one.
    token: bool = False  # The master has a token.


ROWS = [
    *[Row(name, attack) for name, attack in _PLAIN.items()],
    *[Row(f"TLS: {name}", attack, tls=True, certificate=True) for name, attack in _WITH_CERTIFICATE.items()],
    *[Row(f"TLS: {name}", attack, tls=True) for name, attack in _WITHOUT_CERTIFICATE.items()],
    *[Row(f"token: {name}", attack, token=True) for name, attack in _WITH_TOKEN.items()],
    *[Row(f"no token: {name}", attack, token=True) for name, attack in _WITHOUT_TOKEN.items()],
]
