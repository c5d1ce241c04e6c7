"""syncbn-master as a process: descriptors, signals, and a log that nobody reads."""

import concurrent.futures
import fcntl
import gzip
import os
import pathlib
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from typing import Any, Callable, Dict, List, Optional

import pytest
import syncbn
from processes import MASTER, PATIENCE, Master, grpcurl


class LimitedMaster(Master):
    """A master with limits of its own, whose stderr goes to the given file."""

    def __init__(
        self,
        *flags: str,
        descriptors: Optional[int] = None,
        hard: Optional[int] = None,
        stderr: Any = None,
        env: Optional[Dict[str, str]] = None,
    ) -> None:
        def limit() -> None:
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard or descriptors))

        self.process = subprocess.Popen(
            [MASTER, "--max-lifetime", "300", "--address", "127.0.0.1:0", *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=limit,
            env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("syncbn-master ready on "), line
        self.targets = line.split()[3:]
        self.target = self.targets[0]
        self.port = int(self.target.split(":")[1])


def is_serving(target: str) -> bool:
    return "SERVING" in grpcurl(target, "grpc.health.v1.Health/Check")


def serves_in_time(target: str) -> None:
    """Tries again: a full master closes connections as they come, and grpcurl does not try again by itself."""
    end = time.monotonic() + 2 * PATIENCE
    while True:
        try:
            assert is_serving(target)
            return
        except AssertionError:
            if time.monotonic() > end:
                raise


def idle_connections(port: int, count: int) -> List[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(count)]


# ---- Descriptors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors, count, cap", [(64, 200, "default"), (64, 200, "none"), (1024, 1100, "default")])
def test_more_connections_than_descriptors(
    start: Callable[..., Any], descriptors: int, count: int, cap: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        # Without a cap of its own, the master runs out of descriptors.
        flags = [] if cap == "default" else ["--max-connections", "100000"]
        master = start(LimitedMaster, *flags, descriptors=descriptors)
        for connection in idle_connections(master.port, count):
            connection.close()
        serves_in_time(master.target)
        held = idle_connections(master.port, count)
        # The last ones were refused at once. Silent ones are closed after some seconds, which makes room for others.
        serves_in_time(master.target)
        for connection in held:
            connection.close()
        serves_in_time(master.target)
        assert master.terminate() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_workers_than_descriptors(start: Callable[..., Any]) -> None:
    """Connections within the limit work; one beyond it gets an error, or is accepted when another has ended."""
    count, fit = 70, 48
    master = start(LimitedMaster, "--address", "0.0.0.0:0", "--insecure", descriptors=64)
    port = master.targets[1].split(":")[1]
    changed = threading.Condition()
    joined: List[int] = []
    worked: List[int] = []
    may_leave = threading.Event()

    def target(worker: int) -> str:
        return f"127.0.0.{worker + 1}:{port}"  # Workers of one process and one target would share a connection.

    def work(worker: int) -> None:
        options = dict(rank=0, world_size=1, timeout=PATIENCE, join_timeout=4 * PATIENCE)
        with syncbn.Worker(target(worker), f"group {worker}", **options) as member:
            with changed:
                joined.append(worker)
                changed.notify_all()
            may_leave.wait(4 * PATIENCE)
            assert member.all_reduce("sum", [float(worker)]) == [float(worker)]
        worked.append(worker)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(work, worker) for worker in range(count)]
        with changed:
            assert changed.wait_for(lambda: len(joined) == fit, 2 * PATIENCE), sorted(joined)
        with pytest.raises(syncbn.Unavailable) as caught:
            syncbn.Worker(target(count), "one too many", rank=0, world_size=1, join_timeout=2.0)
        assert caught.value.reason == "UNREACHABLE"
        assert f"no answer from the master at {target(count)} within 2s" in caught.value.message
        assert len(joined) == fit
        may_leave.set()
        for future in workers:
            future.result(4 * PATIENCE)
    assert sorted(worked) == list(range(count))
    assert master.terminate() == 0


def test_the_limit_of_descriptors_is_raised_and_told(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        master = start(LimitedMaster, descriptors=64, hard=512, stderr=stderr)
    limits = pathlib.Path(f"/proc/{master.process.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")] == [["512", "512"]]
    assert "raised the limit of descriptors from 64 to 512" in log.read_text()


# ---- What a connection is told ---------------------------------------------------------------------------------------


def test_streams_of_a_connection_are_bounded(start: Callable[..., Any]) -> None:
    master = start(LimitedMaster, "--max-workers", "10")
    with socket.create_connection(("127.0.0.1", master.port), timeout=PATIENCE) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        stream = connection.makefile("rb")
        while True:
            header = stream.read(9)
            payload = stream.read(int.from_bytes(header[:3], "big"))
            if header[3] == 4 and not header[4] & 1:
                break
        settings = dict(struct.unpack(">HI", payload[i : i + 6]) for i in range(0, len(payload), 6))
    assert settings[3] == 10 + 64


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal that is not indexed."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


@pytest.mark.parametrize("method", [b"StatisticsService/Synchronize", b"InspectionService/GetLayer"])
def test_a_compressed_message_is_not_unpacked(start: Callable[..., Any], method: bytes) -> None:
    master = start(LimitedMaster)
    message = gzip.compress(bytes(60 << 20), 9)  # 61 KB; the longest frame that is taken is a little longer.
    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/syncbn.v1." + method), (b":authority", b"test")]
    headers += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"grpc-encoding", b"gzip")]
    body = b"\1" + len(message).to_bytes(4, "big") + message
    assert len(body) < 65535, "the window that a stream begins with"
    chunks = [body[i : i + 16384] for i in range(0, len(body), 16384)]
    answer = b""
    with socket.create_connection(("127.0.0.1", master.port), timeout=PATIENCE) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, b""))
        connection.sendall(http2_frame(1, 4, 1, b"".join(header(*pair) for pair in headers)))
        for chunk in chunks:
            connection.sendall(http2_frame(0, 0, 1, chunk))
        while b"Compression algorithm 'gzip' is disabled" not in answer:
            received = connection.recv(65536)
            assert received, answer
            answer += received
    assert is_serving(master.target)
    peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{master.process.pid}/status").read_text())
    assert peak is not None and int(peak[1]) < 50 << 10


# ---- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(start: Callable[..., Any], number: int) -> None:
    master = start(LimitedMaster)
    master.process.send_signal(number)
    assert master.process.wait(PATIENCE) == 0


def wait_for(log: pathlib.Path, text: str) -> None:
    end = time.monotonic() + PATIENCE
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


def test_sighup_does_not_end_it(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        master = start(LimitedMaster, stderr=stderr)
    master.process.send_signal(signal.SIGHUP)
    wait_for(log, "SIGHUP is ignored")
    assert is_serving(master.target)
    assert master.terminate() == 0


def make_certificate(folder: pathlib.Path, name: str) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def test_sighup_reloads_certificates(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    make_certificate(tmp_path, "one")
    make_certificate(tmp_path, "two")
    cert, key, log = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "log"

    def install(certificate: str, of: str) -> None:
        cert.write_text((tmp_path / f"{certificate}.pem").read_text())
        key.write_text((tmp_path / f"{of}.key").read_text())

    def trusts(name: str) -> bool:
        command = ["openssl", "s_client", "-connect", master.target, "-CAfile", f"{tmp_path}/{name}.pem", "-alpn", "h2"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        return b"Verify return code: 0" in done.stdout

    install("one", "one")
    with log.open("w") as stderr:
        master = start(LimitedMaster, "--cert-file", str(cert), "--key-file", str(key), stderr=stderr)
    assert trusts("one") and not trusts("two")
    wait_for(log, "warning the certificate expires on 20")  # In two days.
    install("two", "one")
    master.process.send_signal(signal.SIGHUP)
    wait_for(log, "the certificates stay as they were")
    assert f'the key "{key}" does not belong to the certificate "{cert}"' in log.read_text()
    assert trusts("one")
    install("two", "two")
    master.process.send_signal(signal.SIGHUP)
    wait_for(log, "reloaded the certificates")
    assert trusts("two") and not trusts("one")
    cert.unlink()
    master.process.send_signal(signal.SIGHUP)
    wait_for(log, "cannot read the certificate")
    assert trusts("two")
    assert master.terminate() == 0


# ---- The log ---------------------------------------------------------------------------------------------------------


# Makes gRPC say a lot about each connection.
TALKATIVE = {"GRPC_VERBOSITY": "debug", "GRPC_TRACE": "http"}


def nonsense(port: int, count: int) -> None:
    """Opens connections about each of which gRPC logs many lines, with bytes of the peer among them."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(b"\x16\x03\x01 \x1b[31m this is no HTTP/2 \xff\xfe\r\n\r\n" * 4)
            try:
                while connection.recv(4096):
                    pass
            except ConnectionResetError:
                pass


def test_a_pipe_that_nobody_reads(start: Callable[..., Any]) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    master = start(LimitedMaster, "--log-level", "debug", stderr=writer, env=TALKATIVE)
    os.close(writer)
    nonsense(master.port, 300)
    assert is_serving(master.target)
    # Now somebody reads, and learns the number of dropped lines.
    text = os.read(reader, 4096)
    nonsense(master.port, 5)
    while b"lines of the log are lost" not in text:
        assert select.select([reader], [], [], PATIENCE)[0], text
        text += os.read(reader, 4096)
    assert b"\x1b" not in text and b"\xff" not in text
    assert master.terminate() == 0
    os.close(reader)


def test_a_reader_that_is_gone(start: Callable[..., Any]) -> None:
    reader, writer = os.pipe()
    master = start(LimitedMaster, "--log-level", "debug", stderr=writer, env=TALKATIVE)
    os.close(writer)
    os.close(reader)
    nonsense(master.port, 50)
    assert is_serving(master.target)
    master.process.stdout.close()
    assert master.terminate() == 0


def test_the_log_of_a_life(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        master = start(LimitedMaster, "--max-connections", "17", stderr=stderr)
    nonsense(master.port, 20)
    assert master.terminate() == 0
    lines = log.read_text().splitlines()
    assert all(line.split()[1] in ("info", "warning", "error") for line in lines), lines
    [ready] = [line for line in lines if "listens on" in line]
    for text in (master.target, "no TLS", "17 connections", "4096 workers"):
        assert text in ready
    assert "shutting down: SIGTERM" in log.read_text()


def test_without_standard_descriptors() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" --address 127.0.0.1:0 --max-lifetime 0.01 <&- >&- 2>&-', MASTER], timeout=PATIENCE
    )
    assert done.returncode == 0
