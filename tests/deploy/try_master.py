"""Tries the installed syncbn-master with the installed Python package, on a system that has nothing else:

1. the configuration as it was installed, and two trainers;
2. certificates on both sides, by the configuration's own keys, and a trainer without one, which is refused;
3. the slow one of two trainers, found as an operator would: by the page, by the metrics, by grpcurl;
4. the installation of a newer package and a restart while the trainers run, and another restart: no round is lost.

    try_master.py GRPCURL NEWER-PACKAGE

Every merged result is compared with NumPy's, over the whole batch in float64. The script runs as root, the master as
nobody.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any, Callable, Dict, List, Optional

import numpy

CONFIG = pathlib.Path("/etc/syncbn/master.toml")
TLS = pathlib.Path("/etc/syncbn/tls")
# systemd shows the service the files of /etc/syncbn/tls there; here they are copied.
CREDENTIALS = pathlib.Path("/run/credentials/syncbn-master.service")
TARGET = "127.0.0.1:50051"
PAGE = "http://127.0.0.1:8080"
PATIENCE = 120.0
NOBODY = 65534
ROUNDS = 400
BATCHES = (3, 9)
TRAINER = pathlib.Path(__file__).with_name("trainer.py")


class Master:
    """The installed master, ready when made; it is nobody's process, as the service is not root's."""

    def __init__(self, config: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            ["syncbn-master", "--config-file", str(config), "--max-lifetime", "600"],
            stdout=subprocess.PIPE, text=True, user=NOBODY, group=NOBODY, extra_groups=[],
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"syncbn-master ready on {TARGET}\n", line

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0


def trainers(rounds: int, variables: Dict[str, str]) -> List["subprocess.Popen[str]"]:
    environment = {**os.environ, "SYNCBN_TARGET": TARGET, **variables}
    return [
        subprocess.Popen(
            [sys.executable, str(TRAINER), str(rank), str(rounds), *map(str, BATCHES)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(len(BATCHES))
    ]


def finish(processes: List["subprocess.Popen[str]"]) -> int:
    """Returns the number of lines that each of them has still printed, once all have ended with 0."""
    outputs = []
    for process in processes:
        assert process.stdout is not None
        # communicate() would not see lines that readline() has read ahead. The master's lifetime bounds this.
        outputs.append(process.stdout.read().splitlines())
    assert [process.wait(PATIENCE) for process in processes] == [0] * len(processes)
    assert len({len(lines) for lines in outputs}) <= 2, outputs
    return len(outputs[0])


def configure(values: Dict[str, str], path: pathlib.Path) -> None:
    """Writes the installed configuration with these keys set."""
    text = CONFIG.read_text()
    for key, value in values.items():
        text, found = re.subn(rf"^#{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    path.write_text(text)
    path.chmod(0o644)


def give_credentials() -> None:
    CREDENTIALS.mkdir(parents=True)
    for name in ("cert", "key", "trusted-ca"):
        file = CREDENTIALS / f"tls_{name}"
        file.write_bytes((TLS / name).read_bytes())
        os.chown(file, NOBODY, NOBODY)
        file.chmod(0o400)


def example(key: str) -> str:
    """The value of a key in the installed configuration, as it is written there."""
    [value] = re.findall(rf"^#{key} = (.*)$", CONFIG.read_text(), re.MULTILINE)
    return value


def page(path: str) -> str:
    with urllib.request.urlopen(PAGE + path, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def slowest_by_page() -> int:
    """By the table that /statusz shows: rank, state, how often it was the last, mean lateness, and more."""
    rows = re.findall(r"^ +(\d+) +present +(\d+) ", page("/statusz"), re.MULTILINE)
    assert len(rows) == len(BATCHES), page("/statusz")
    return int(max(rows, key=lambda row: int(row[1]))[0])


def slowest_by_metrics() -> int:
    late = re.findall(r'^syncbn_lateness_seconds_total{.*rank="(\d+)".*} (\S+)$', page("/metrics"), re.MULTILINE)
    assert len(late) == len(BATCHES)
    return int(max(late, key=lambda sample: float(sample[1]))[0])


def slowest_by_grpcurl(grpcurl: str, variables: Dict[str, str]) -> int:
    identity = [
        "-cacert", variables["SYNCBN_CLIENT_TRUSTED_CA_FILE"], "-cert", variables["SYNCBN_CLIENT_CERT_FILE"],
        "-key", variables["SYNCBN_CLIENT_KEY_FILE"],
    ]

    def ask(method: str, **request: str) -> Any:
        command = [grpcurl, *identity, "-d", json.dumps(request), TARGET, f"syncbn.v1.InspectionService/{method}"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE).stdout)

    [group] = ask("ListGroups")["groups"]
    members = ask("GetGroup", job=group["job"], group=group["group"])["members"]
    return int(max(members, key=lambda member: int(member.get("last_arrivals", 0))).get("rank", 0))


def try_to_find_the_slow_one(config: pathlib.Path, grpcurl: str, variables: Dict[str, str]) -> None:
    rounds, looked_at = 200, 100
    ways: Dict[str, Callable[[], int]] = {
        "the page": slowest_by_page,
        "the metrics": slowest_by_metrics,
        "grpcurl": lambda: slowest_by_grpcurl(grpcurl, variables),
    }
    for slow in range(len(BATCHES)):
        master = Master(config)
        processes = trainers(rounds, {**variables, "TRAINER_SLOW_RANK": str(slow), "TRAINER_SLOWNESS": "0.02"})
        assert processes[0].stdout is not None
        for step in range(looked_at):
            assert processes[0].stdout.readline() == f"{step}\n"
        for name, find in ways.items():
            begin = time.monotonic()
            assert find() == slow, name
            print(f"rank {slow} is the slow one, says {name}, after {time.monotonic() - begin:.1f} s")
        assert looked_at + finish(processes) == rounds
        master.stop()


def install(package: str) -> None:
    subprocess.run(["dpkg", "--install", package], stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    [version] = re.findall(r"^ Version: (.*)$", output_of("dpkg-deb", "--info", package), re.MULTILINE)
    assert output_of("dpkg-query", "--show", "--showformat", "${Version}", "syncbn-master") == version


def output_of(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE).stdout


def try_upgrade(config: pathlib.Path, newer: str, variables: Dict[str, str]) -> None:
    master: Optional[Master] = Master(config)
    processes = trainers(ROUNDS, variables)
    assert processes[0].stdout is not None
    seen = 0
    for restart_after in (ROUNDS // 4, ROUNDS // 2):
        while seen < restart_after:
            assert processes[0].stdout.readline() == f"{seen}\n"
            seen += 1
        assert master is not None
        if newer:  # As apt does it: the files first, while the old program runs, then the restart.
            install(newer)
            newer = ""
        master.stop()
        master = Master(config)
    assert seen + finish(processes) == ROUNDS
    master.stop()


def main(grpcurl: str, newer: str) -> None:
    master = Master(CONFIG)
    assert finish(trainers(20, {})) == 20
    master.stop()
    print("the installed configuration: 20 rounds of two trainers")

    give_credentials()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        config = pathlib.Path(folder) / "master.toml"
        tls_keys = ("cert-file", "key-file", "trusted-ca-file")
        configure({**{key: example(key) for key in tls_keys}, "client-cert-auth": "true"}, config)
        trusting = {"SYNCBN_CLIENT_TRUSTED_CA_FILE": str(TLS / "trusted-ca")}
        known = {
            **trusting,
            "SYNCBN_CLIENT_CERT_FILE": str(TLS / "worker-cert"),
            "SYNCBN_CLIENT_KEY_FILE": str(TLS / "worker-key"),
        }
        master = Master(config)
        assert finish(trainers(20, known)) == 20
        print("certificates on both sides: 20 rounds of two trainers")
        strangers = trainers(1, {**trusting, "TRAINER_JOIN_TIMEOUT": "5"})
        for stranger in strangers:
            output = stranger.communicate(timeout=PATIENCE)[0]
            assert stranger.returncode != 0 and output == "", output
        print("trainers without a certificate are refused")
        master.stop()
        try_to_find_the_slow_one(config, grpcurl, known)
        try_upgrade(config, newer, known)
        print(f"an upgrade of the package and two restarts of the master during {ROUNDS} rounds: none lost")


if __name__ == "__main__":
    numpy.seterr(all="raise")
    main(*sys.argv[1:])
