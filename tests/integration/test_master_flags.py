"""syncbn-master's flags, variables and config file, and its exit codes."""

import os
import pathlib
import re
import socket
import subprocess
from typing import Any, Callable, List

import pytest
from processes import MASTER, PATIENCE, Master, grpcurl

from syncbn import _variables

OPERATIONS = pathlib.Path(__file__).resolve().parents[2] / "docs/operations.md"
FLAGS = [
    "address",
    "insecure",
    "cert-file",
    "key-file",
    "trusted-ca-file",
    "client-cert-auth",
    "identity-template",
    "auto-tls",
    "token-file",
    "inspection",
    "inspection-token-file",
    "max-channels",
    "max-workers",
    "max-groups",
    "max-retained-bytes",
    "max-connections",
    "state-dir",
    "max-connections-per-address",
    "shared-memory",
    "shared-memory-dir",
    "watchdog",
    "reflection",
    "exit-timeout",
    "max-lifetime",
    "log-level",
    "config-file",
]
# A flag, values that it refuses, and the allowed values in the message.
BAD_VALUES = [
    *[
        (flag, ["0", "-1", "", "many", "1.5", "1e3", "99999999999999999999", " "], "a whole number in 1 .. ")
        for flag in (
            *("max-channels", "max-workers", "max-groups", "max-retained-bytes", "max-connections"),
            "max-connections-per-address",
        )
    ],
    *[
        (flag, ["-1", "", "soon", "nan", "inf", "1e10", "-0.001"], "a number of seconds in 0 .. ")
        for flag in ("exit-timeout", "max-lifetime")
    ],
    # Less than 5 seconds would end a master that is well.
    ("watchdog", ["-1", "", "soon", "nan", "1e10", "0.5", "4.99"], "a number of seconds in 0 or 5 .. "),
    *[(flag, [""], "the name of a file") for flag in ("cert-file", "key-file", "trusted-ca-file")],
    ("state-dir", [""], "the name of a directory"),
    ("shared-memory-dir", ["", "/nowhere", "/dev/null"], "the name of a directory that exists"),
    ("shared-memory", ["", "maybe", "2", "Off"], "off, same-user or any-user"),
    ("log-level", ["", "loud", "INFO", "10"], "debug, info, warning or error"),
    *[(flag, ["", "maybe", "2"], "on or off") for flag in ("reflection", "inspection")],
    *[(flag, ["maybe", "2", "-1", "10", "yes please"], "true or false") for flag in ("insecure", "client-cert-auth", "auto-tls")],
]
BAD = [(flag, value, limit) for flag, values, limit in BAD_VALUES for value in values]


def variable(flag: str) -> str:
    return "SYNCBN_" + flag.upper().replace("-", "_")


def run(*flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [MASTER, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def expect_refusal(done: "subprocess.CompletedProcess[str]", *texts: str, code: int = 2) -> None:
    """Checks the exit code, and that stderr has one line of the program, with the texts; it was never ready."""
    assert (done.returncode, done.stdout) == (code, ""), done
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\dT\S+Z info ", line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("syncbn-master: ")
    for text in texts:
        assert text in lines[0]


def test_the_page_has_every_flag_with_the_default_that_help_tells() -> None:
    # A line of help is: --max-workers N=4096 (Env:SYNCBN_MAX_WORKERS); the last word before "(" of a flag that may repeat
    # is "...".
    told = {
        flag: default or ""
        for flag, default in re.findall(
            r"^  --([a-z-]+)(?: [^=(\n]+(?:=(.+?))?(?: \.\.\.)?)? \(Env:", run("--help").stdout, re.M
        )
    }
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) ?\|", OPERATIONS.read_text(), re.M)
    page = {flag: default.strip() for flags, default in rows for flag in re.findall(r"--([a-z-]+)", flags)}
    assert set(page) == set(told) - {"config-file"}  # The text above the table has that one.
    in_words = {"4 MiB": str(4 << 20), "0 (never)": "0"}
    defaults = {flag: in_words.get(default, default) for flag, default in page.items()}
    assert {flag: defaults[flag] for flag in defaults if told[flag]} == {flag: told[flag] for flag in defaults if told[flag]}
    assert {defaults[flag] for flag in defaults if not told[flag] and flag != "shared-memory-dir"} == {"", "off", "none"}


def test_help_names_every_flag_and_its_variable() -> None:
    done = run("--help")
    assert done.returncode == 0
    for flag in FLAGS:
        assert f"--{flag}" in done.stdout
        assert variable(flag) in done.stdout


def test_version() -> None:
    done = run("--version")
    version = (pathlib.Path(__file__).resolve().parents[2] / "VERSION").read_text()
    assert done.returncode == 0
    form = rf"syncbn-master {re.escape(version.strip())} \((commit [0-9a-f]{{12,}}(-dirty)?, )?protocol 1, gRPC [\d.]+\)\n"
    assert re.fullmatch(form, done.stdout)


# ---- Bad values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, value, limit", BAD)
def test_a_bad_value_is_refused(flag: str, value: str, limit: str) -> None:
    expect_refusal(run(f"--{flag}={value}"), f"--{flag}", f'"{value}"', limit)


@pytest.mark.parametrize("flag, value, limit", [bad for bad in BAD if bad[1].strip()])
def test_a_bad_variable_is_refused(flag: str, value: str, limit: str) -> None:
    expect_refusal(run(**{variable(flag): value}), f"--{flag}", f'"{value}"', limit)


@pytest.mark.parametrize("flag, value, limit", BAD)
def test_a_bad_value_in_a_file_is_refused(flag: str, value: str, limit: str, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text(f'{flag} = "{value}"\n')
    expect_refusal(run("--config-file", str(config)), f"--{flag}", f'"{value}"', limit)


@pytest.mark.parametrize(
    "flags",
    [
        "--max-workers=1",
        "--max-workers=1048576",
        "--max-groups=1048576",
        "--max-channels=16777216",
        "--max-retained-bytes=1099511627776",
        "--max-connections=1048576",
        "--exit-timeout=0",
        "--exit-timeout=1000000000",
        "--log-level=debug",
        "--reflection=off",
        "--reflection=No",
        "--inspection=1",
        "--inspection=ON",
        "--max_workers=7",
        "--insecure=false",
    ],
)
def test_a_value_at_its_limit_is_taken(flags: str) -> None:
    done = run("--address", "127.0.0.1:0", "--max-lifetime", "0.01", flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("syncbn-master stopped\n")


@pytest.mark.parametrize("flag", ["max-workers", "exit-timeout", "log-level", "cert-file", "address", "insecure"])
def test_an_empty_variable_is_none(flag: str) -> None:
    done = run("--max-lifetime", "0.01", *([] if flag == "address" else ["--address", "127.0.0.1:0"]), **{variable(flag): ""})
    # The default address may be taken by someone.
    assert done.returncode == 0 or (flag == "address" and "address already in use" in done.stderr), done.stderr


@pytest.mark.parametrize(
    "flags, texts",
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--adress", "127.0.0.1:0"], ["--adress is not a flag", "the nearest flag is --address"]),
        (["--max-worker=3"], ["--max-worker is not a flag", "the nearest flag is --max-workers"]),
        (["stray"], ["stray"]),
        (["--max-workers"], ["--max-workers"]),
        (["--address"], ["--address"]),
        (["--max-workers", "3", "--max-workers", "4"], ['--max-workers has 2 values, "3" and "4", and takes one: give it once']),
        (["--log-level=info"] * 3, ["--log-level has 3 values", "give it once"]),
        (["--insecure", "--insecure", "--state-dir=a", "--state-dir=b"], ['--state-dir has 2 values, "a" and "b"']),
        (["--config-file", "a", "--config-file", "b"], ['--config-file has 2 values, "a" and "b"', "give it once"]),
        (["--insecure=maybe"], ["maybe"]),
        (["--client-cert-auth=maybe"], ["maybe"]),
        (["--config-file", "/no/such/file"], ["/no/such/file"]),
        (["--config-file", "/"], ["/"]),
        (["--config-file"], ["--config-file"]),
    ],
)
def test_what_is_no_flag_is_refused(flags: List[str], texts: List[str]) -> None:
    expect_refusal(run(*flags), *texts)


@pytest.mark.parametrize("flags", [["--token", "hush"], ["--token=hush"]])
def test_a_token_given_as_a_flag_is_not_shown(flags: List[str]) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert "--token is not a flag; the nearest flag is --token-file" in done.stderr
    assert "hush" not in done.stderr


# ---- Addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, text",
    [
        ("127.0.0.1:70000", "port 70000 is not in 0 .. 65535"),
        ("127.0.0.1:99999", "port 99999 is not in 0 .. 65535"),
        ("127.0.0.1:-1", "port -1 is not in 0 .. 65535"),
        ("[::1]:65536", "port 65536 is not in 0 .. 65535"),
        ("foo:bar", "no such host or port"),
        ("nowhere.invalid:50051", "no such host or port"),
        ("127.0.0.1", "neither HOST:PORT nor unix:PATH"),
        ("", "HOST:PORT or unix:PATH"),
        ("::1:50051", "brackets"),
        ("unix:", "neither HOST:PORT nor unix:PATH"),
        ("unix:/" + "p" * 107, "108 bytes"),
        ("0.0.0.0:0", "--insecure"),
        ("[::]:0", "--insecure"),
        ("127.0.0.1:0,127.0.0.1:70000", "port 70000"),
    ],
)
def test_a_bad_address_is_refused(address: str, text: str, tmp_path: pathlib.Path) -> None:
    expect_refusal(run(f"--address={address}"), text)
    if not address:
        return
    expect_refusal(run(SYNCBN_ADDRESS=address), text)
    config = tmp_path / "master.toml"
    config.write_text(f'address = "{address}"\n')
    expect_refusal(run("--config-file", str(config)), text)


def test_an_address_in_use_is_named_with_the_reason(master: Master, tmp_path: pathlib.Path) -> None:
    expect_refusal(run("--address", master.target), f'"{master.target}"', "address already in use", code=1)
    port = master.target.split(":")[1]
    expect_refusal(run("--address", f"localhost:{port}"), f"localhost:{port}", "address already in use", code=1)


def test_a_socket_in_use_and_things_in_its_way(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "master.sock"
    first = start(Master, address=f"unix:{path}")
    expect_refusal(run("--address", f"unix:{path}"), str(path), "address already in use", code=1)
    first.kill()
    assert path.is_socket()
    assert run("--address", f"unix:{path}", "--max-lifetime", "0.01").returncode == 0
    path.mkdir()
    expect_refusal(run("--address", f"unix:{path}"), str(path), "file of another kind", code=1)
    missing = tmp_path / "missing" / "master.sock"
    expect_refusal(run("--address", f"unix:{missing}"), str(missing), "no such file or directory", code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    expect_refusal(run("--address", f"unix:{tmp_path}/master.sock"), "permission denied", code=1)


def test_localhost_is_all_its_addresses(start: Callable[..., Any]) -> None:
    master = start(Master, address="localhost:0")
    host, port = master.target.split(":")
    assert host == "localhost" and int(port) > 0
    addresses = {info[4][0] for info in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    reached = 0
    for address in addresses:
        try:
            socket.create_connection((address, int(port)), timeout=PATIENCE).close()
            reached += 1
        except OSError:
            # A name may stand for ::1 where there is no IPv6.
            assert ":" in address
    assert reached > 0


# ---- Variables and files ---------------------------------------------------------------------------------------------


def test_variables_stand_for_flags(start: Callable[..., Any]) -> None:
    started = start(Master, address="", env={"SYNCBN_ADDRESS": "127.0.0.1:0, localhost:0", "SYNCBN_MAX_WORKERS": "1"})
    assert len(started.targets) == 2
    for target in started.targets:
        assert "syncbn.v1.StatisticsService" in grpcurl(target, "list")


def test_hyphens_and_underscores_are_the_same_in_variables() -> None:
    expect_refusal(run(**{"SYNCBN_MAX-WORKERS": "0"}), "--max-workers", '"0"')


def test_a_variable_that_is_almost_ours_is_doubted() -> None:
    done = run("--address", "127.0.0.1:0", "--max-lifetime", "0.01", SYNCBN_ADRESS="127.0.0.1:1", SYNCBN_TARGET="elsewhere:1")
    assert done.returncode == 0
    assert "SYNCBN_ADRESS is not known; SYNCBN_ADDRESS is" in done.stderr
    assert "SYNCBN_TARGET" not in done.stderr


def test_workers_and_masters_know_each_others_variables() -> None:
    flags = set(re.findall(r"^ *--([a-z-]+)", run("--help").stdout, re.M)) - {"help", "version"}
    assert {variable(flag) for flag in flags} <= _variables.OF_MASTERS
    others = {name: "1" for name in _variables.OF_WORKERS - _variables.OF_MASTERS}
    done = run("--address", "127.0.0.1:0", "--max-lifetime", "0.01", **others)
    assert done.returncode == 0 and "not known" not in done.stderr, done.stderr


@pytest.mark.parametrize("hyphen", ["-", "_"])
def test_a_config_file(start: Callable[..., Any], tmp_path: pathlib.Path, hyphen: str) -> None:
    path = tmp_path / "master.sock"
    config = tmp_path / "master.toml"
    config.write_text(f'address = ["unix:{path}"]\nexit{hyphen}timeout = 1\nmax{hyphen}workers = 2\n')
    started = start(Master, "--config-file", str(config), address="")
    assert started.targets == [f"unix:{path}"]
    assert path.is_socket()
    assert started.terminate() == 0


def test_a_config_file_named_by_its_variable(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "master.sock"
    config = tmp_path / "master.ini"
    config.write_text(f"address=unix:{path}\n")
    assert start(Master, address="", env={"SYNCBN_CONFIG_FILE": str(config)}).targets == [f"unix:{path}"]
    expect_refusal(run(SYNCBN_CONFIG_FILE="/no/such/file"), "/no/such/file")


@pytest.mark.parametrize(
    "text, key, nearest",
    [
        ('adress = "127.0.0.1:0"', "adress", "address"),
        ("client_cert_aut = true", "client_cert_aut", "client-cert-auth"),
        ("max-worker = 3", "max-worker", "max-workers"),
        ("Max-Workers = 3", "Max-Workers", "max-workers"),
        ("MAX_WORKERS = 3", "MAX_WORKERS", "max-workers"),
        ("server.max-workers = 3", "server.max-workers", "max-workers"),
        ("config-file = 'other.toml'", "config-file", ""),
        ("version = true", "version", ""),
        ("nonsense", "nonsense", ""),
    ],
)
def test_an_unknown_key_is_refused(text: str, key: str, nearest: str, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text(text + "\n")
    expect_refusal(run("--config-file", str(config)), f"{key}", f'the nearest is "{nearest}')


def test_a_key_that_is_given_twice_is_refused(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text("max-workers = 3\nmax_workers = 4\n")
    expect_refusal(run("--config-file", str(config)), "max_workers", "twice, in the lines 1 and 2")


def test_a_key_with_two_values_is_refused(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text("max-workers = [3, 4]\n")
    expect_refusal(run("--config-file", str(config)), '--max-workers has 2 values, "3" and "4"')
    config.write_text("insecure = [true, true]\n")
    expect_refusal(run("--config-file", str(config)), "insecure")


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("insecure = true\naddress = [127.0.0.1:0\n", "a '[' that no ']' closes, in line 2"),
        ('insecure = true\naddress = "127.0.0.1:0\n', "a quote that is not closed in line 2"),
        ("[server]\nmax-workers = 3\n", 'a section, "[server]", in line 1'),
        ("\n= 3\n", "a value without a key in line 2"),
    ],
)
def test_a_config_file_that_cannot_be_parsed(text: str, wrong: str, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text(text)
    expect_refusal(run("--config-file", str(config)), wrong)
    expect_refusal(run(SYNCBN_CONFIG_FILE=str(config)), wrong)


@pytest.mark.parametrize("name, reason", [("absent", "no such file or directory"), ("", "is a directory")])
def test_a_config_file_that_cannot_be_read(name: str, reason: str, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / name)
    for done in run("--config-file", path), run(SYNCBN_CONFIG_FILE=path):
        expect_refusal(done, f'cannot read the config file "{path}": {reason}')


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text("max-workers = 0\n", encoding="utf-8-sig")
    expect_refusal(run("--config-file", str(config)), "--max-workers", '"0" is not a whole number')
    config.write_text("max-workers = 3\n", encoding="utf-16")
    expect_refusal(run("--config-file", str(config)), "UTF-8")


# Bytes of a file that are read at most, and the flag that it is for.
_LIMITS = [("config-file", 1 << 20), ("token-file", 4096), ("inspection-token-file", 4096), ("cert-file", 4 << 20)]


@pytest.mark.parametrize("flag, limit", _LIMITS)
def test_a_file_without_an_end_is_refused(flag: str, limit: int, tmp_path: pathlib.Path) -> None:
    others = [f"--key-file={tmp_path}/key.pem"] if flag == "cert-file" else []
    expect_refusal(run(f"--{flag}=/dev/zero", *others), f"longer than {limit} bytes, the most that are read")
    expect_refusal(run(*others, **{variable(flag): "/dev/zero"}), f"longer than {limit} bytes")


def test_a_switch_of_a_config_file_is_heeded(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "master.toml"
    config.write_text("client_cert_auth = true\n")
    expect_refusal(run("--config-file", str(config)), "trusted CA")
    config.write_text("client_cert_auth = maybe\n")
    expect_refusal(run("--config-file", str(config)), "maybe")


# ---- TLS -------------------------------------------------------------------------------------------------------------


def test_half_of_tls_is_refused(tmp_path: pathlib.Path) -> None:
    expect_refusal(run("--client-cert-auth"), "trusted CA")
    expect_refusal(run("--cert-file", "a.pem"), "certificate and its key")
    expect_refusal(run("--key-file", "a.pem"), "certificate and its key")
    expect_refusal(run("--trusted-ca-file", "a.pem"), "--client-cert-auth")
    expect_refusal(run("--cert-file", f"{tmp_path}/a.pem", "--key-file", "b.pem"), f"{tmp_path}/a.pem", "no such file")


# ---- The end ---------------------------------------------------------------------------------------------------------


def test_a_lifetime_ends_the_master() -> None:
    done = run("--address", "127.0.0.1:0", "--max-lifetime", "0.05")
    assert done.returncode == 0
    assert done.stdout.endswith("syncbn-master stopped\n")
