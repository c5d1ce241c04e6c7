"""The systemd unit and the configuration file that the Debian package installs."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any, Dict, List

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MASTER = os.environ["SYNCBN_MASTER"]
UNIT = ROOT / "deploy/systemd/syncbn-master.service"
MAKE_CONFIG = ROOT / "deploy/systemd/make_config.py"
PATIENCE = 60.0
HELP = """\
Addresses:
  --where ADDRESS ...=127.0.0.1:1 ... (Env:SYNCBN_WHERE)
                              where to listen; may repeat
  --key-file FILE (Env:SYNCBN_KEY_FILE)
                              PEM key
  --state-dir DIR (Env:SYNCBN_STATE_DIR)
                              keep things here

Limits:
  --most N=7 (Env:SYNCBN_MOST)
                              most things
  --many N=what there is room for (Env:SYNCBN_MANY)
                              many things
  --open (Env:SYNCBN_OPEN)
                              open it

General:
  -h,--help                   Print this help message and exit
  --version                   Display program version information and exit
"""


def make_config() -> Any:
    spec = importlib.util.spec_from_file_location("make_config", MAKE_CONFIG)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


def unit() -> Dict[str, List[str]]:
    """The settings of the unit, of all sections together."""
    found: Dict[str, List[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def seconds(value: str) -> float:
    return float(value.rstrip("s"))


def keys(config: str) -> Dict[str, str]:
    return dict(re.findall(r"^#([\w-]+) = (.*)$", config, re.MULTILINE))


def test_the_config_has_an_example_for_each_kind_of_option() -> None:
    config = make_config().config(HELP)
    assert keys(config) == {
        "where": '"127.0.0.1:1"',
        "key-file": '"/run/credentials/syncbn-master.service/tls_key"',
        "state-dir": '"/var/lib/syncbn"',
        "most": "7",
        "many": "1024",
        "open": "false",
    }
    assert "# Many things. Default: what there is room for." in config


def test_the_config_has_every_option_and_sets_none() -> None:
    told = run(MASTER, "--help").stdout
    config = make_config().config(told)
    flags = set(re.findall(r"^  (?:-\w,)?--([\w-]+)", told, re.MULTILINE))
    assert set(keys(config)) == flags - {"help", "version", "config-file"} != set()
    assert [line for line in config.splitlines() if line and not line.startswith("#")] == []


def test_the_master_takes_what_the_config_shows(tmp_path: pathlib.Path) -> None:
    """Every key is uncommented, but for the names of files and addresses that others may have."""
    config = make_config().config(run(MASTER, "--help").stdout)
    lines = []
    for key, value in keys(config).items():
        if "/" in value or key in ("address", "max-lifetime", "identity-template"):
            continue
        # An address of another server, on a free port.
        lines.append(f"{key} = " + re.sub(r'"127\.0\.0\.1:\d+"', '"127.0.0.1:0"', value))
    path = tmp_path / "master.toml"
    path.write_text("\n".join(lines) + "\n")
    done = run(MASTER, "--config-file", path, "--address", "127.0.0.1:0", "--max-lifetime", "0.001")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("syncbn-master ready on 127.0.0.1:")


def test_an_unknown_key_of_the_config_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "master.toml").write_text("adress = \"127.0.0.1:0\"\n")
    done = run(MASTER, "--config-file", tmp_path / "master.toml", "--max-lifetime", "0.001")
    assert done.returncode == 2 and '"adress" in line 1; the nearest is "address"' in done.stderr, done.stderr


def test_the_unit_is_valid(tmp_path: pathlib.Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # The program and its man page are not installed here.
    text = UNIT.read_text().replace("/usr/bin/syncbn-master", "/bin/true").replace("man:syncbn-master(8)", "")
    path = tmp_path / UNIT.name
    path.write_text(text)
    done = run("systemd-analyze", "verify", "--man=no", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fault_of_the_unit_is_seen(tmp_path: pathlib.Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/usr/bin/syncbn-master", "/bin/true")
    path.write_text(text.replace("DynamicUser", "DynamicUsr"))
    assert "DynamicUsr" in run("systemd-analyze", "verify", "--man=no", path).stderr


def test_the_exposure_of_the_unit_is_as_the_page_says() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    told = run("systemd-analyze", "security", "--offline=true", "--no-pager", UNIT).stdout
    [level] = re.findall(r"Overall exposure level for syncbn-master.service: (\S+)", told)
    page = (ROOT / "docs/operations/systemd.md").read_text()
    [promised] = re.findall(r"exposure level of (\d+\.\d+)", page)
    assert float(level) <= float(promised)


def test_systemd_waits_longer_than_the_master_drains() -> None:
    [stop] = unit()["TimeoutStopSec"]
    [drain] = re.findall(r"--exit-timeout SECONDS=(\S+)", run(MASTER, "--help").stdout)
    assert seconds(stop) > float(drain)


def test_systemd_goes_on_starting_a_master_that_fails_at_once() -> None:
    """systemd's own limit is five starts in ten seconds; an address that is in use for longer would be the end."""
    settings = unit()
    [pause], [interval] = settings["RestartSec"], settings.get("StartLimitIntervalSec", ["10"])
    [burst] = settings.get("StartLimitBurst", ["5"])
    assert seconds(interval) == 0 or int(burst) * seconds(pause) > seconds(interval)


def test_the_unit_and_the_config_agree_on_places() -> None:
    [state], [start], [credential] = unit()["StateDirectory"], unit()["ExecStart"], unit()["LoadCredential"]
    module = make_config()
    assert module.example(module.Option("state-dir", "DIR", None, "")) == f'"/var/lib/{state}"'
    assert start.endswith("--config-file /etc/syncbn/master.toml")
    identifier, _, folder = credential.partition(":")
    # systemd names a folder's files ID_NAME.
    assert module.CREDENTIAL == f"/run/credentials/{UNIT.name}/{identifier}_"
    assert (ROOT / "deploy/debian/syncbn-master.dirs").read_text().split() == [folder.lstrip("/")]
