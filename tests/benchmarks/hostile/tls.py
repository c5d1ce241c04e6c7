"""Connections with TLS or without, by which an attack writes and another of its threads may read."""

import contextlib
import pathlib
import select
import socket
import ssl
import subprocess
import threading
from typing import NamedTuple, Optional, Union


class Target(NamedTuple):
    host: str
    port: int
    context: Optional[ssl.SSLContext] = None  # With TLS.


class Socket:
    """A connection with TLS. Two threads may use it at once, which Python's own does not allow."""

    def __init__(self, target: Target) -> None:
        assert target.context is not None
        raw = socket.create_connection((target.host, target.port), timeout=60)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket = target.context.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise
        self._socket.setblocking(False)
        self._lock = threading.Lock()

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            sent = self._try_to_send(left)
            left = left[sent:]
            if not sent:
                self._await(select.POLLOUT)

    def send(self, data: bytes, _flags: int = 0) -> int:
        return self._try_to_send(memoryview(data))

    def recv(self, size: int) -> bytes:
        while True:
            with self._lock, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return self._socket.recv(size)
            self._await(select.POLLIN)

    def drain(self) -> None:
        """Drops what has come."""
        with self._lock, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            while self._socket.recv(1 << 16):
                pass

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()

    def _try_to_send(self, data: memoryview) -> int:
        with self._lock, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return self._socket.send(data)
        return 0

    def _await(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), event)
        if not poll.poll(60000):
            raise TimeoutError


def connect(target: Target) -> Union[socket.socket, Socket]:
    if target.context is not None:
        return Socket(target)
    plain = socket.create_connection((target.host, target.port), timeout=60)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain


def make_certificate(folder: pathlib.Path) -> None:
    """Writes cert.pem and key.pem, which a master and its workers can have for their own, and as what they trust."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", "/CN=hostile", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def client_context(folder: pathlib.Path, certificate: bool) -> ssl.SSLContext:
    """A client's, with that certificate or with none. Trusts any server: an attack does not care."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
