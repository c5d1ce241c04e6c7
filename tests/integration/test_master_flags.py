"""syncbn-master's flags, variables and config file."""

import os
import pathlib
import subprocess
from typing import Any, Callable

from processes import MASTER, PATIENCE, Master, grpcurl


def run(*flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [MASTER, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def test_help_names_every_flag_and_its_variable() -> None:
    done = run("--help")
    assert done.returncode == 0
    for flag in ("address", "insecure", "cert-file", "key-file", "trusted-ca-file", "client-cert-auth", "exit-timeout"):
        assert f"--{flag}" in done.stdout
        assert f"SYNCBN_{flag.upper().replace('-', '_')}" in done.stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "syncbn-master 0.1.0\n")


def test_a_bad_flag_is_refused() -> None:
    done = run("--no-such-flag")
    assert done.returncode not in (0, 1)
    assert "--no-such-flag" in done.stderr
    done = run("--exit-timeout", "soon")
    assert done.returncode != 0
    assert "soon" in done.stderr


def test_an_address_beyond_loopback_is_refused() -> None:
    done = run("--address", "0.0.0.0:0")
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_an_address_in_use_is_named(master: Master) -> None:
    done = run("--address", master.target)
    assert done.returncode == 1
    assert master.target in done.stderr


def test_variables_stand_for_flags(start: Callable[..., Any]) -> None:
    started = start(Master, address="", env={"SYNCBN_ADDRESS": "127.0.0.1:0,localhost:0", "SYNCBN_MAX_WORKERS": "1"})
    assert len(started.targets) == 2
    for target in started.targets:
        assert "syncbn.v1.StatisticsService" in grpcurl(target, "list")


def test_a_config_file(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    socket = tmp_path / "master.sock"
    config = tmp_path / "master.toml"
    config.write_text(f'address = ["unix:{socket}"]\nexit-timeout = 1\n')
    started = start(Master, "--config-file", str(config), address="")
    assert started.targets == [f"unix:{socket}"]
    assert socket.is_socket()
    assert started.terminate() == 0


def test_a_lifetime_ends_the_master() -> None:
    done = run("--address", "127.0.0.1:0", "--max-lifetime", "0.05")
    assert done.returncode == 0
    assert done.stdout.endswith("syncbn-master stopped\n")
