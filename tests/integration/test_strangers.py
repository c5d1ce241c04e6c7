"""Strangers who join or look, refused by syncbn-master as a process: tokens, certificates, and grpcurl with a token."""

import os
import pathlib
import subprocess
from typing import Any, Callable, Dict, Iterator, List

import pytest
import syncbn
from processes import GRPCURL, MASTER, PATIENCE, Master

TOKEN = "an-open-sesame-of-the-test"
SPIFFE = "spiffe://example.org/job/{job}/rank/{rank}"


def openssl(*arguments: Any) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a CA, a server that it has signed, and workers with names: each NAME.pem and NAME.key."""
    folder = tmp_path_factory.mktemp("authority")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl(*new, "-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-subj", "/CN=ca")
    names = {
        "server": "IP:127.0.0.1",
        "rank-0": "URI:" + SPIFFE.format(job="train", rank=0),
        "rank-1": "DNS:rank-1.train.example.org",
        "nobody": "DNS:elsewhere.example.org",
    }
    for name, alternative in names.items():
        signed = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", f"subjectAltName={alternative}"]
        openssl(*new, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-subj", "/CN=x", *signed)
    return folder


@pytest.fixture
def identified(start: Callable[..., Any], authority: pathlib.Path) -> Master:
    flags = ["--cert-file", authority / "server.pem", "--key-file", authority / "server.key"]
    flags += ["--trusted-ca-file", authority / "ca.pem", "--client-cert-auth"]
    flags += ["--identity-template", f"URI:{SPIFFE}", "--identity-template", "DNS:rank-{rank}.{job}.example.org"]
    return start(Master, *map(str, flags))


def join(master: Master, authority: pathlib.Path, name: str, job: str, rank: int) -> syncbn.Worker:
    files = {"cert_file": authority / f"{name}.pem", "key_file": authority / f"{name}.key"}
    return syncbn.Worker(
        master.target, f"{name} {job} {rank}", rank, 2, job=job, trusted_ca_file=authority / "ca.pem", **files
    )


# ---- Certificates ----------------------------------------------------------------------------------------------------


def test_a_certificate_stands_for_its_job_and_rank(identified: Master, authority: pathlib.Path) -> None:
    join(identified, authority, "rank-0", "train", 0).close()
    join(identified, authority, "rank-1", "train", 1).close()


@pytest.mark.parametrize(
    "name, job, rank",
    [
        *[("rank-0", "train", 1), ("rank-0", "other", 0), ("rank-1", "train", 0), ("rank-1", "Train.x", 1)],
        ("nobody", "train", 0),
    ],
)
def test_and_for_no_other(identified: Master, authority: pathlib.Path, name: str, job: str, rank: int) -> None:
    with pytest.raises(syncbn.PermissionDenied) as caught:
        join(identified, authority, name, job, rank)
    assert caught.value.reason == "IDENTITY_MISMATCH"
    says = {"rank-0": "rank/0", "rank-1": "rank-1.train.example.org", "nobody": "elsewhere.example.org"}[name]
    for text in (f"rank {rank}", f'job "{job}"', SPIFFE.format(job=job, rank=rank), says):
        assert text in caught.value.message


# ---- --auto-tls ------------------------------------------------------------------------------------------------------


def fingerprint(certificate: pathlib.Path) -> str:
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("=")[1].strip()


def test_a_master_makes_its_own_certificate(start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    flags = ["--auto-tls", "--cert-file", str(cert), "--key-file", str(key)]
    master = start(Master, *flags)
    assert key.stat().st_mode & 0o077 == 0
    syncbn.Worker(master.target, "g", 0, 1, trusted_ca_file=cert).close()
    first = fingerprint(cert)
    assert master.terminate() == 0
    again = start(Master, *flags)
    assert fingerprint(cert) == first, "workers would trust it no more"
    syncbn.Worker(again.target, "g", 0, 1, trusted_ca_file=cert).close()


def test_without_files_the_log_tells_where_it_is(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [MASTER, "--auto-tls", "--address", "127.0.0.1:0", "--max-lifetime", "300"],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        )
    try:
        assert process.stdout is not None
        target = process.stdout.readline().split()[-1]
        [certificate] = tmp_path.glob("syncbn-master-*/cert.pem")
        text = log.read_text()
        assert str(certificate) in text and fingerprint(certificate) in text
        syncbn.Worker(target, "g", 0, 1, trusted_ca_file=certificate).close()
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not list(tmp_path.glob("syncbn-master-*"))


# ---- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "variable"])
def guarded(request: pytest.FixtureRequest, start: Callable[..., Any], tmp_path: pathlib.Path) -> Iterator[Master]:
    if request.param == "variable":
        yield start(Master, env={"SYNCBN_TOKEN": TOKEN})
    else:
        file = tmp_path / "token"
        file.write_text(TOKEN + "\n")
        yield start(Master, "--token-file", str(file))


def test_workers_need_the_token(guarded: Master) -> None:
    with syncbn.Worker(guarded.target, "g", 0, 1, token=TOKEN) as worker:
        assert worker.all_reduce("sum", [1.0]) == [1.0]
    with pytest.raises(syncbn.Unauthenticated) as caught:
        syncbn.Worker(guarded.target, "g", 0, 1)
    assert caught.value.reason == "TOKEN_MISMATCH"


def grpcurl(master: Master, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    method = "syncbn.v1.InspectionService/ListGroups"
    return subprocess.run(
        [GRPCURL, "-plaintext", *arguments, master.target, method],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env={**os.environ, **env},
    )


def test_grpcurl_bears_the_token(guarded: Master) -> None:
    refused = grpcurl(guarded)
    assert refused.returncode != 0 and "Unauthenticated" in refused.stderr and "authorization: Bearer" in refused.stderr
    # As docs/operations.md has it: other users see no token among the arguments.
    done = grpcurl(guarded, "-expand-headers", "-H", "authorization: Bearer ${SYNCBN_TOKEN}", SYNCBN_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


def test_inspection_has_a_token_of_its_own(start: Callable[..., Any]) -> None:
    master = start(Master, env={"SYNCBN_TOKEN": TOKEN, "SYNCBN_INSPECTION_TOKEN": "for-operators"})
    assert grpcurl(master, "-H", f"authorization: Bearer {TOKEN}").returncode != 0
    assert grpcurl(master, "-H", "authorization: Bearer for-operators").returncode == 0


BAD: List[Dict[str, Any]] = [
    {"env": {"SYNCBN_TOKEN": "my secret"}, "texts": ["SYNCBN_TOKEN", "a space"]},
    {"flags": ["--token-file", "/no/such/token"], "texts": ["--token-file", "/no/such/token", "no such file"]},
    {"flags": ["--token-file", "/dev/null"], "texts": ["--token-file", "it is empty"]},
    {"flags": ["--identity-template", "URI:{rank}"], "texts": ["--client-cert-auth"]},
    {"flags": ["--auto-tls", "--cert-file", "/tmp/none.pem"], "texts": ["certificate", "key"]},
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["texts"][-1])
def test_what_cannot_be_used_is_refused(case: Dict[str, Any]) -> None:
    done = subprocess.run(
        [MASTER, *case.get("flags", [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        env={**os.environ, **case.get("env", {})},
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    for text in case["texts"]:
        assert text in done.stderr
    assert "my secret" not in done.stderr


def test_a_token_twice_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    done = subprocess.run(
        [MASTER, "--token-file", str(file)], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "SYNCBN_TOKEN": TOKEN},
    )
    assert done.returncode == 2 and "SYNCBN_TOKEN" in done.stderr and TOKEN not in done.stderr
