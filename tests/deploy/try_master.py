"""Tries the installed syncbn-master with the installed Python package, on a system that has nothing else:

1. the configuration as it was installed, and two trainers;
2. certificates on both sides, by the configuration's own keys, and a trainer without one, which is refused;
3. a restart of the master while the trainers run: no round is lost.

Every merged result is compared with NumPy's, over the whole batch in float64. The script runs as root, the master as
nobody.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from typing import Dict, List, Optional

import numpy

CONFIG = pathlib.Path("/etc/syncbn/master.toml")
TLS = pathlib.Path("/etc/syncbn/tls")
# Where systemd shows the files of /etc/syncbn/tls to the service; here they are copied.
CREDENTIALS = pathlib.Path("/run/credentials/syncbn-master.service")
TARGET = "127.0.0.1:50051"
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
    outputs = [process.communicate(timeout=PATIENCE)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
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


def try_restart(config: pathlib.Path, variables: Dict[str, str]) -> None:
    master: Optional[Master] = Master(config)
    processes = trainers(ROUNDS, variables)
    assert processes[0].stdout is not None
    seen = 0
    for restart_after in (ROUNDS // 4, ROUNDS // 2):
        while seen < restart_after:
            assert processes[0].stdout.readline() == f"{seen}\n"
            seen += 1
        assert master is not None
        master.stop()
        master = Master(config)
    assert seen + finish(processes) == ROUNDS
    master.stop()


def main() -> None:
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
        try_restart(config, known)
        print(f"two restarts of the master during {ROUNDS} rounds: none lost")


if __name__ == "__main__":
    numpy.seterr(all="raise")
    main()
