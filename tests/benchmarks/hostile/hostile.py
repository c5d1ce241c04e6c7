"""Frames that ask for far more than they are, and floods, beside honest workers; `tools/benchmark hostile` runs it."""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import zlib
from typing import Callable, Dict, Iterator, List, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402
import wire  # noqa: E402

_HERE = pathlib.Path(__file__).resolve().parent
_MIB = 1 << 20
_WIDEST = 1 << 16  # Channels.
_BOUND_MIB = 200
_BOUND_MS = 100


def resident(pid: int) -> float:
    """MiB."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Sampler:
    """The greatest resident size of a process while it lives."""

    def __init__(self, pid: int) -> None:
        self._pid, self._greatest, self._ended = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            self._greatest = max(self._greatest, resident(self._pid))

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._greatest


Target = Tuple[str, int]
Attack = Callable[[Target, float], int]


def _send(target: Target, seconds: float, *contents: bytes, reads: bool = True, encoding: str = "") -> int:
    """Writes the messages on one call, then keeps it for the rest of the time. Bytes sent."""
    end = time.monotonic() + seconds
    call = wire.Call(target, reads=reads, encoding=encoding)
    try:
        for content in contents:
            call.write(content)
        time.sleep(max(0.0, end - time.monotonic()))
        return call.sent
    finally:
        call.close()


def _empty_rounds(reads: bool) -> Attack:
    first = wire.join("empty rounds", 1) + wire.layer_spec(b"wide", _WIDEST)
    first += b"".join(wire.empty_contribution(b"wide", sequence) for sequence in range(900))
    return lambda target, seconds: _send(target, seconds, wire.message(first), reads=reads)


def _gzip_bomb(target: Target, seconds: float) -> int:
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


def _expiry_storm(target: Target, seconds: float) -> int:
    rounds = b"".join(wire.empty_contribution(b"a", sequence) for sequence in range(8192))
    end = time.monotonic() + seconds
    sent = 0
    for storm in itertools.count():
        if time.monotonic() > end:
            return sent
        first = wire.join(f"expiry storm {storm}", 4096, round_timeout=0.01) + wire.layer_spec(b"a", 1)
        sent += _send(target, 0.2, wire.message(first + rounds))


def _many_wide_layers(target: Target, seconds: float) -> int:
    names = [f"{index}".encode() for index in range(1500)]
    first = wire.join("many wide layers", 1) + b"".join(wire.layer_spec(name, _WIDEST) for name in names)
    rounds = b"".join(wire.empty_contribution(name, 0) for name in names)
    return _send(target, seconds, wire.message(first), wire.message(rounds))


def _blocked_on(target: Target, seconds: float) -> int:
    layer = b"a"
    first = wire.join("blocked on", 2) + wire.layer_spec(layer, 1)
    rounds = b"".join(wire.empty_contribution(layer, sequence) for sequence in range(8192))
    promises = b"".join(wire.piece(4, wire.key(layer, 8191 - sequence % 8192)) for sequence in range(65536))
    return _send(target, seconds, wire.message(first), *[wire.message(rounds + promises)] * 3)


def _idle(target: Target, seconds: float) -> int:
    connections = [wire.Connection(target) for _ in range(2000)]
    try:
        time.sleep(seconds)
        return sum(connection.sent for connection in connections)
    finally:
        for connection in connections:
            connection.close()


def _joined_and_deaf(target: Target, seconds: float) -> int:
    connection = wire.Connection(target, reads=False, window=0)
    layer = wire.layer_spec(b"wide", _WIDEST)
    rounds = b"".join(wire.empty_contribution(b"wide", sequence) for sequence in range(4))
    end = time.monotonic() + seconds
    try:
        for index in range(1000):
            if not connection.call(2 * index + 1, wire.SYNCHRONIZE, wire.join(f"deaf {index}", 1) + layer + rounds):
                break
        time.sleep(max(0.0, end - time.monotonic()))
        return connection.sent
    finally:
        connection.close()


def _joins(target: Target, seconds: float) -> int:
    """500 workers a second join, each alone in its group, and leave."""
    connection = wire.Connection(target)
    begin = time.monotonic()
    try:
        for index in itertools.count():
            if index / 500 > seconds:
                return connection.sent
            time.sleep(max(0.0, begin + index / 500 - time.monotonic()))
            content = wire.join(f"joins {index % 500}", 1) + wire.piece(5, b"")
            connection.call(2 * index + 1, wire.SYNCHRONIZE, content, ends=True)
    finally:
        connection.close()
    return 0


def _flood(make: Callable[[int], bytes], first: bytes = b"") -> Attack:
    """Sends what `make` makes for each stream's number as fast as it can, and connects again when it is cut off."""

    def attack(target: Target, seconds: float) -> int:
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


def _unread_answers(target: Target, seconds: float) -> int:
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
        time.sleep(max(0.0, end - time.monotonic()))
        return worker.sent + connection.sent
    finally:
        connection.close()
        worker.close()


def _long_sums(target: Target, seconds: float) -> int:
    command = [sys.executable, str(_HERE / "summing_worker.py"), f"{target[0]}:{target[1]}"]
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

ATTACKS: Dict[str, Attack] = {
    "2,000 idle connections": _idle,
    "1,000 streams that join and never read": _joined_and_deaf,
    "500 joins a second": _joins,
    "rapid reset": _flood(
        lambda stream: wire.frame(wire.HEADERS, wire.END_HEADERS, stream, _BLOCK)
        + wire.frame(wire.RST_STREAM, 0, stream, wire.CANCELLED)
    ),
    "1,000 answers that nobody reads": _unread_answers,
    "PING flood": _flood(lambda _: wire.frame(wire.PING, 0, 0, bytes(8))),
    "SETTINGS flood": _flood(lambda _: wire.frame(wire.SETTINGS, 0, 0, b"")),
    "WINDOW_UPDATE flood": _flood(lambda _: wire.frame(wire.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), _OPEN),
    "PRIORITY flood": _flood(lambda stream: wire.frame(wire.PRIORITY, 0, stream, bytes(5))),
    "empty DATA flood": _flood(lambda _: wire.frame(wire.DATA, 0, 1, b""), _OPEN),
    "CONTINUATION flood": _flood(
        lambda _: wire.frame(wire.CONTINUATION, 0, 1, b""), wire.frame(wire.HEADERS, 0, 1, _BLOCK)
    ),
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


@contextlib.contextmanager
def master() -> Iterator[Tuple[int, Target]]:
    command = [os.environ["SYNCBN_MASTER"], "--address", "127.0.0.1:0", "--max-lifetime", "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        host, port = process.stdout.readline().split()[-1].rsplit(":", 1)
        yield process.pid, (host, int(port))
    finally:
        process.terminate()
        process.wait()


class HonestWorkers:
    def __init__(self, target: Target, count: int, channels: int) -> None:
        script = str(_HERE / "honest_worker.py")
        address = f"{target[0]}:{target[1]}"
        self._processes = [
            subprocess.Popen(
                [sys.executable, script, address, str(rank), str(count), str(channels)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(count)
        ]

    def milliseconds(self) -> List[float]:
        """Returns the times of all rounds since the last call, ascending."""
        rounds: List[float] = []
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # One that has ended may have left a line that says why.
                process.stdin.write("\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:  # Its traceback is on stderr.
                raise SystemExit(f"an honest worker ended with code {process.wait()}")
            told = json.loads(line)
            if isinstance(told, dict):
                raise SystemExit(f"an honest worker failed: {told['error']}")
            rounds += told
        return sorted(1000 * duration for duration in rounds)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()  # One that left would leave the others in a round.
        for process in self._processes:
            process.communicate()


def quantile(rounds: List[float], part: float) -> float:
    return rounds[int(part * (len(rounds) - 1))]


def quantiles(rounds: List[float]) -> str:
    if not rounds:
        return "no round"
    return " / ".join(f"{quantile(rounds, part):.1f}" for part in (0.5, 0.99, 1.0))


def p99_ratio(before: List[float], during: List[float]) -> str:
    return f"{quantile(during, 0.99) / quantile(before, 0.99):.2f}" if before and during else "–"


def measure(attack: Attack, workers: int, channels: int, seconds: float) -> Tuple[List[str], bool]:
    with master() as (pid, target):
        honest = HonestWorkers(target, workers, channels)
        try:
            honest.milliseconds()
            time.sleep(2)  # All have joined.
            honest.milliseconds()
            time.sleep(seconds)
            before = honest.milliseconds()
            sampler = Sampler(pid)
            sent = attack(target, seconds)
            during = honest.milliseconds()
            greatest = sampler.stop()
        finally:
            honest.stop()
    holds = bool(before and during) and greatest < _BOUND_MIB and during[-1] < before[-1] + _BOUND_MS
    size = f"{sent / _MIB:.1f} MiB" if sent >= _MIB else f"{sent / 1024:.0f} KiB"
    times = [quantiles(before), quantiles(during), p99_ratio(before, during)]
    return [size, f"{greatest:.0f}", *times, "yes" if holds else "no"], holds


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark hostile", description=__doc__)
    parser.add_argument("--workers", type=int, default=8, help="honest ones")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack, and of the time before it")
    parser.add_argument("--only", default="", help="attacks whose name has this part; printed, not written")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    chosen = {name: attack for name, attack in ATTACKS.items() if options.only in name}
    if not chosen:
        parser.error(f"--only {options.only!r} fits none of these attacks: {'; '.join(ATTACKS)}")
    provenance = report.provenance("tools/benchmark hostile")
    rows, all_hold = [], True
    for name, attack in chosen.items():
        row, holds = measure(attack, options.workers, options.channels, options.seconds)
        rows.append([name, *row])
        all_hold = all_hold and holds
        print(" | ".join(rows[-1]), flush=True)
    head = ["attack", "bytes sent", "master, MiB at most", "before, ms", "during, ms", "p99 during / before",
            "within bounds"]
    setting = f"Honest workers: {options.workers}."
    report.publish("hostile", [provenance, setting, "", *report.table(head, rows)], None if options.only else options.output)
    if not all_hold:
        raise SystemExit(f"not within {_BOUND_MIB} MiB and {_BOUND_MS} ms more than undisturbed")


if __name__ == "__main__":
    main()
