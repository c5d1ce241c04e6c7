"""Frames that ask for far more than they are, and floods, beside honest workers; `tools/benchmark hostile` runs it."""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import attacks  # noqa: E402
import report  # noqa: E402
import tls  # noqa: E402

_HERE = pathlib.Path(__file__).resolve().parent
_MIB = 1 << 20
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


class Setting(NamedTuple):
    """How a row's masters and honest workers are run, and how its attack connects."""

    flags: List[str]
    environment: Dict[str, str]
    attacker: "Optional[tls.ssl.SSLContext]"


def setting_of(row: attacks.Row, folder: pathlib.Path, transport: str) -> Setting:
    flags, attacker = [], None
    environment = {**os.environ, "SYNCBN_SHARED_MEMORY": "off" if transport == "grpc" else "same-user"}
    if row.tls:
        cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
        flags = ["--cert-file", cert, "--key-file", key, "--trusted-ca-file", cert, "--client-cert-auth"]
        attacker = tls.client_context(folder, row.certificate)
        for name, file in (("TRUSTED_CA", cert), ("CERT", cert), ("KEY", key)):
            environment[f"SYNCBN_CLIENT_{name}_FILE"] = file
    if row.token:
        environment["SYNCBN_TOKEN"] = attacks.TOKEN
    return Setting(flags, environment, attacker)


@contextlib.contextmanager
def master(setting: Setting) -> Iterator[Tuple[int, tls.Target]]:
    command = [os.environ["SYNCBN_MASTER"], "--address", "127.0.0.1:0", "--max-lifetime", "600", *setting.flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=setting.environment
    )
    try:
        assert process.stdout is not None
        host, port = process.stdout.readline().split()[-1].rsplit(":", 1)
        yield process.pid, tls.Target(host, int(port), setting.attacker)
    finally:
        process.terminate()
        process.wait()


class HonestWorkers:
    def __init__(self, target: tls.Target, setting: Setting, count: int, channels: int) -> None:
        script = str(_HERE / "honest_worker.py")
        address = f"{target.host}:{target.port}"
        self._processes = [
            subprocess.Popen(
                [sys.executable, script, address, str(rank), str(count), str(channels)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=setting.environment,
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


def measure(row: attacks.Row, setting: Setting, workers: int, channels: int, seconds: float) -> Tuple[List[str], bool]:
    with master(setting) as (pid, target):
        honest = HonestWorkers(target, setting, workers, channels)
        try:
            honest.milliseconds()
            time.sleep(2)  # All have joined.
            honest.milliseconds()
            time.sleep(seconds)
            before = honest.milliseconds()
            with master(setting) as (_, other):
                honest.milliseconds()
                row.attack(other, seconds)
                elsewhere = honest.milliseconds()
            time.sleep(0.5)
            honest.milliseconds()
            sampler = Sampler(pid)
            sent = row.attack(target, seconds)
            during = honest.milliseconds()
            greatest = sampler.stop()
        finally:
            honest.stop()
    holds = bool(before and during) and greatest < _BOUND_MIB and during[-1] < before[-1] + _BOUND_MS
    size = f"{sent / _MIB:.1f} MiB" if sent >= _MIB else f"{sent / 1024:.0f} KiB"
    times = [quantiles(rounds) for rounds in (before, elsewhere, during)]
    ratios = [p99_ratio(before, during), p99_ratio(before, elsewhere)]
    return [size, f"{greatest:.0f}", *times, *ratios, "yes" if holds else "no"], holds


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/benchmark hostile", description=__doc__)
    parser.add_argument("--workers", type=int, default=8, help="honest ones")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack, and of the time before it")
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc", help="of the honest workers")
    parser.add_argument("--only", default="", help="attacks whose name has this part; printed, not written")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file whose part between markers is rewritten")
    options = parser.parse_args()
    chosen = [row for row in attacks.ROWS if options.only in row.name]
    if not chosen:
        parser.error(f"--only {options.only!r} fits none of these: {'; '.join(row.name for row in attacks.ROWS)}")
    provenance = report.provenance("tools/benchmark hostile")
    rows, all_hold = [], True
    with tempfile.TemporaryDirectory() as folder:
        tls.make_certificate(pathlib.Path(folder))
        for chosen_row in chosen:
            setting = setting_of(chosen_row, pathlib.Path(folder), options.transport)
            row, holds = measure(chosen_row, setting, options.workers, options.channels, options.seconds)
            rows.append([chosen_row.name, *row])
            all_hold = all_hold and holds
            print(" | ".join(rows[-1]), flush=True)
    head = ["attack", "bytes sent", "master, MiB at most", "before, ms", "elsewhere, ms", "during, ms",
            "p99 during / before", "p99 elsewhere / before", "within bounds"]
    setting_line = f"Honest workers: {options.workers}, by {options.transport}; {options.seconds:g} s of each."
    lines = [provenance, setting_line, "", *report.table(head, rows)]
    report.publish("hostile", lines, None if options.only else options.output)
    if not all_hold:
        raise SystemExit(f"not within {_BOUND_MIB} MiB and {_BOUND_MS} ms more than undisturbed")


if __name__ == "__main__":
    main()
