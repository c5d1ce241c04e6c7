"""Bytes on the wire to a master, made by hand: protobuf fields, gRPC messages, HTTP/2 frames. Needs no library."""

import contextlib
import selectors
import socket
import struct
import threading
from typing import List, Optional, Tuple, Union

import tls

Target = tls.Target
Socket = Union[socket.socket, tls.Socket]

SYNCHRONIZE = "/syncbn.v1.StatisticsService/Synchronize"
GET_LAYER = "/syncbn.v1.InspectionService/GetLayer"
WATCH_ROUNDS = "/syncbn.v1.InspectionService/WatchRounds"

# Values of protobuf's enums.
FORWARD, REQUIRED, NO_BACKWARD, BATCH_NORM = 1, 1, 3, 1


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def piece(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def key(layer: bytes, sequence: int) -> bytes:
    return piece(1, layer) + number(2, sequence) + number(3, FORWARD)


def empty_contribution(layer: bytes, sequence: int) -> bytes:
    """The contribution of a worker whose batch is empty, and which takes no part in the backward round."""
    return piece(3, piece(1, key(layer, sequence)) + piece(2, number(4, NO_BACKWARD)))


def layer_spec(name: bytes, channels: int) -> bytes:
    return piece(2, piece(1, name) + number(2, channels) + number(3, BATCH_NORM))


def _optional(field: int, text: str) -> bytes:
    return piece(field, text.encode()) if text else b""


def join(group: str, world_size: int, round_timeout: float = 0.0, rank: int = 0, token: str = "") -> bytes:
    config = b""
    if round_timeout:
        nanoseconds = round(round_timeout * 1e9)
        config = piece(10, piece(1, number(1, nanoseconds // 10**9) + number(2, nanoseconds % 10**9)))
    versions = number(1, 1) + number(2, 1)
    return piece(1, versions + piece(4, group.encode()) + number(5, rank) + number(6, world_size) + config + _optional(13, token))


def message(content: bytes, compressed: bool = False) -> bytes:
    return struct.pack(">BI", int(compressed), len(content)) + content


# HTTP/2's frames by which the attacks are made.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
CANCELLED = struct.pack(">I", 8)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def text(text: str) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def header_block(path: str, encoding: str = "", token: str = "") -> bytes:
    """The headers of a gRPC call: literal fields that are not indexed, HPACK without its tables."""
    headers: List[Tuple[str, str]] = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
        ("content-type", "application/grpc"), ("te", "trailers"),
    ]
    if encoding:
        headers.append(("grpc-encoding", encoding))
    if token:
        headers.append(("authorization", f"Bearer {token}"))
    return b"".join(b"\x00" + text(name) + text(value) for name, value in headers)


def request(stream: int, headers: bytes, content: bytes) -> bytes:
    """A call with one message, after which the caller sends no more."""
    return frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, END_STREAM, stream, message(content))


class Drain:
    """Reads and drops all that comes by any number of connections, on one thread: an attack should cost its victim."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread: Optional[threading.Thread] = None

    def add(self, connection: socket.socket) -> None:
        # Reading waits for nothing; what is written by another descriptor of the same connection still may.
        self._selector.register(connection.dup(), selectors.EVENT_READ)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                with contextlib.suppress(OSError):
                    if connection.recv(1 << 16, socket.MSG_DONTWAIT):
                        continue
                self._selector.unregister(connection)
                connection.close()


_DRAIN = Drain()


class Connection:
    """A connection on which an attack writes what frames it likes. Reads and drops all that comes, or reads nothing."""

    def __init__(self, target: Target, reads: bool = True, window: int = 65535) -> None:
        self.sent = 0
        self._socket: Socket = tls.connect(target)
        self._drains = reads and target.context is not None
        self.send(_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HIHI", 2, 0, 4, window)))
        if reads and isinstance(self._socket, socket.socket):
            _DRAIN.add(self._socket)

    def send(self, data: bytes, wait: bool = True) -> bool:
        """False: the peer has closed the connection; or it has no room for all of the data and `wait` is false."""
        try:
            if wait:
                self._socket.sendall(data)
            elif self._socket.send(data, socket.MSG_DONTWAIT) < len(data):
                return False
            if self._drains:
                self._socket.drain()
        except OSError:
            return False
        self.sent += len(data)
        return True

    def call(self, stream: int, path: str, content: bytes, ends: bool = False) -> bool:
        """Begins a call, with one message."""
        flags = END_STREAM if ends else 0
        return self.send(
            frame(HEADERS, END_HEADERS, stream, header_block(path)) + frame(DATA, flags, stream, message(content))
        )

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


class Call:
    """One gRPC call on a connection of its own, which reads and drops all answers, or reads nothing."""

    _CHUNK = 16384  # HTTP/2's longest frame unless the peer allows more.

    def __init__(self, target: Target, path: str = SYNCHRONIZE, reads: bool = True, encoding: str = "") -> None:
        self.sent = 0
        self._window = 65535
        self._stream_window = 65535
        self._changed = threading.Condition()
        self._closed = False
        self._initial_window = 65535
        self._socket: Socket = tls.connect(target)
        window = 2**31 - 1 if reads else 0
        settings = struct.pack(">HIHI", 2, 0, 4, window)  # No pushes; the window of each stream.
        self._send(_PREFACE + frame(SETTINGS, 0, 0, settings))
        if reads:
            self._send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", window - 65535)))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send(frame(HEADERS, END_HEADERS, 1, header_block(path, encoding)))

    def write(self, content: bytes) -> None:
        """Sends as fast as the peer's windows allow. Returns early if the peer ends the call."""
        for begin in range(0, len(content), self._CHUNK):
            chunk = content[begin : begin + self._CHUNK]
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or min(self._window, self._stream_window) >= len(chunk), timeout=60
                )
                if self._closed or min(self._window, self._stream_window) < len(chunk):
                    return
                self._window -= len(chunk)
                self._stream_window -= len(chunk)
            try:
                self._send(frame(DATA, 0, 1, chunk))
            except OSError:
                return

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._reader.join(10)
        self._socket.close()

    def _send(self, data: bytes) -> None:
        self._socket.sendall(data)
        self.sent += len(data)

    def _exactly(self, size: int) -> Optional[bytes]:
        parts = []
        while size:
            try:
                part = self._socket.recv(min(size, 1 << 20))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _read(self) -> None:
        received = 0
        while True:
            head = self._exactly(9)
            payload = self._exactly(int.from_bytes(head[:3], "big")) if head is not None else None
            if head is None or payload is None:
                break
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            with self._changed:
                if kind == 8:
                    if stream:
                        self._stream_window += int.from_bytes(payload, "big")
                    else:
                        self._window += int.from_bytes(payload, "big")
                elif kind == 4 and not flags & 1:
                    for identifier, value in struct.iter_unpack(">HI", payload):
                        if identifier == 4:
                            self._stream_window += value - self._initial_window
                            self._initial_window = value
                elif kind == 3 or kind == 7 or (kind == 1 and flags & 1):
                    self._closed = True  # The stream was reset, the connection goes away, or trailers.
                self._changed.notify_all()
            try:
                if kind == 4 and not flags & 1:
                    self._send(frame(SETTINGS, 1, 0, b""))
                elif kind == 6 and not flags & 1:
                    self._send(frame(PING, 1, 0, payload))
                elif kind == 0:
                    received += len(payload)
                    if received > 1 << 29:
                        for number_of_stream in (0, 1):
                            self._send(frame(WINDOW_UPDATE, 0, number_of_stream, struct.pack(">I", received)))
                        received = 0
            except OSError:
                break
        with self._changed:
            self._closed = True
            self._changed.notify_all()
