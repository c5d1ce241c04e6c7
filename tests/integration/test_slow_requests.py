"""Requests to the master's pages that are slow, endless or malformed, and the probes beside them."""

import http.client
import pathlib
import select
import socket
from typing import Any, Callable, List, Tuple

import pytest
from processes import PATIENCE
from test_http import HttpMaster, train

# Connections that the master serves at a time.
MOST = 256
UNFINISHED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: "


@pytest.fixture
def pages(start: Callable[..., Any], tmp_path: pathlib.Path) -> HttpMaster:
    return start(HttpMaster, tmp_path / "log")


def connect(pages: HttpMaster, receive_buffer: int = 0) -> socket.socket:
    host, port = pages.address.split(":")
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    return connection


def send_each(pages: HttpMaster, number: int, sent: bytes, receive_buffer: int = 0) -> List[socket.socket]:
    connections = []
    for _ in range(number):
        connections.append(connect(pages, receive_buffer))
        connections[-1].sendall(sent)
    return connections


def readable(connections: List[socket.socket]) -> List[socket.socket]:
    return select.select(connections, [], [], 0)[0]


def answer_to(pages: HttpMaster, sent: bytes) -> Tuple[int, bytes]:
    """Returns status and body of the only answer, after which the connection ends."""
    with connect(pages) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection, method="HEAD" if sent.startswith(b"HEAD") else "GET")
        answer.begin()
        body = answer.read()
        assert connection.recv(1) == b""
        return answer.status, body


def test_a_probe_does_not_wait_for_two_hundred_unfinished_requests(pages: HttpMaster) -> None:
    slow = send_each(pages, 200, UNFINISHED)
    for path in ("/livez", "/readyz"):
        assert pages.get(path)[0] == 200
    # Slow requests would have ended with their time, had the probe waited for it.
    assert not readable(slow)
    for connection in slow:
        connection.close()


def test_a_request_takes_the_place_of_the_oldest_unfinished_one(pages: HttpMaster) -> None:
    slow = send_each(pages, MOST + 100, UNFINISHED)
    assert pages.get("/livez")[0] == 200
    for connection in slow[:50]:
        with pytest.raises(ConnectionResetError):
            assert connection.recv(1) == b""
            raise ConnectionResetError
    assert not readable(slow[-50:])
    for connection in slow:
        connection.close()


def test_a_request_that_comes_byte_by_byte_ends(pages: HttpMaster) -> None:
    with connect(pages) as slow:
        slow.sendall(UNFINISHED)
        sent = 0
        while not readable([slow]):
            try:
                slow.sendall(b"x")
            except ConnectionError:
                break
            sent += 1
            select.select([slow], [], [], 0.05)  # A slow peer, and not a long request.
        assert 0 < sent < 8000


def test_answers_that_nobody_reads_do_not_hold_up_a_probe(pages: HttpMaster) -> None:
    train(pages.target, 3)
    unread = send_each(pages, 200, b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n", receive_buffer=1)
    assert pages.get("/livez")[0] == 200
    assert pages.get("/metrics")[0] == 200
    for connection in unread:
        connection.close()


def test_a_body_that_does_not_come_is_not_awaited(pages: HttpMaster) -> None:
    slow = send_each(pages, 200, b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
    assert pages.get("/livez")[0] == 200
    for connection in slow:
        assert b"405" in connection.recv(100)
        connection.close()


def test_hundreds_of_whole_requests_are_all_answered(pages: HttpMaster) -> None:
    asked = []
    for path in ("/livez", "/metrics", "/statusz", "/healthz"):
        asked += send_each(pages, 50, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    for connection in asked:
        assert b" 200 OK\r\n" in connection.recv(100)
        connection.close()


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"GET /livez HTTP/1.1\nHost: localhost\n\n", 505),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://rebound.example/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 421),
        (b"GET /livez HTTP/1.1\r\nhOsT:localhost\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n", 200),
        (b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nNo colon\r\n\r\n", 400),
        (b"GET /li\x00vez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"POST /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /%6civez HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000, 431),
        (b"\xff" * 20000, 400),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, int) else repr(value[:60]),
)
def test_odd_requests(pages: HttpMaster, sent: bytes, status: int) -> None:
    assert answer_to(pages, sent)[0] == status
    assert pages.get("/livez")[0] == 200


def test_parameters_are_decoded(pages: HttpMaster) -> None:
    train(pages.target, 1, job="a&b =%", group="ü")
    assert pages.get("/api/group?job=a%26b+%3D%25&group=%C3%BC")[0] == 200
    assert pages.get("/api/group?group=%c3%bc&job=a%26b%20=%")[0] == 200
    assert pages.get("/api/group?job=a&b%20=%25&group=%C3%BC")[0] == 404
