"""The status page, metrics and probes of a `syncbn.Master`, where they are asked for."""

import base64
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import syncbn

TOKEN = "an-open-sesame-of-the-page"


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    for name in ("SYNCBN_HTTP_ADDRESS", "SYNCBN_TOKEN", "SYNCBN_INSPECTION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def get(address, path, password=None):
    """Returns status and body."""
    request = urllib.request.Request(f"http://{address}{path}")
    if password is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f":{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_nothing_is_served_by_default():
    with syncbn.Master() as master:
        assert master.http_address is None
    with syncbn.Master(http_address="off") as master:
        assert master.http_address is None


def test_the_page_metrics_and_probes_of_a_master():
    with syncbn.Master(http_address="127.0.0.1:0") as master:
        with syncbn.Worker(master.target, "seen", 0, 1, job="page") as worker:
            worker.all_reduce("sum", [1.0])
            assert get(master.http_address, "/readyz") == (200, "ready\n")
            assert 'syncbn_workers{job="page",group="seen",state="present"} 1' in get(master.http_address, "/metrics")[1]
            assert 'job "page", group "seen"' in get(master.http_address, "/statusz")[1]
            assert "<title>syncbn master</title>" in get(master.http_address, "/")[1]
    with pytest.raises(OSError):  # The process of the master may take a moment to end.
        while get(master.http_address, "/livez"):
            pass


def test_the_environment_names_the_address(monkeypatch, caplog):
    monkeypatch.setenv("SYNCBN_HTTP_ADDRESS", "127.0.0.1:0")
    with caplog.at_level("INFO", "syncbn"), syncbn.Master() as master:
        assert get(master.http_address, "/livez")[0] == 200
    assert f"http://{master.http_address}/" in caplog.text
    monkeypatch.setenv("SYNCBN_HTTP_ADDRESS", "off")
    with syncbn.Master() as master:
        assert master.http_address is None


def test_an_address_that_is_taken(monkeypatch, caplog):
    """One that was passed is an error. The environment is every process's, so there it is a warning."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        with pytest.raises(syncbn.Error, match="in use") as caught:
            syncbn.Master(http_address=address)
        assert caught.value.code == syncbn.Code.UNAVAILABLE and address in str(caught.value)
        monkeypatch.setenv("SYNCBN_HTTP_ADDRESS", address)
        with syncbn.Master() as master:
            assert master.http_address is None and master.workers() == 0
        assert f'no status page: cannot serve HTTP: cannot listen on "{address}"' in caplog.text


@pytest.mark.parametrize("address", ["8080", "127.0.0.1", "unix:page", "127.0.0.1:99999", ""])
def test_addresses_that_are_none(address, monkeypatch):
    with pytest.raises(syncbn.InvalidArgument):
        syncbn.Master(http_address=address)
    if address:
        monkeypatch.setenv("SYNCBN_HTTP_ADDRESS", address)
        with pytest.raises(syncbn.InvalidArgument):
            syncbn.Master()


def test_who_reads_the_page(monkeypatch):
    def statuses(**options):
        with syncbn.Master(http_address="127.0.0.1:0", **options) as master:
            assert get(master.http_address, "/metrics")[0] == 200
            return [get(master.http_address, "/statusz", password)[0] for password in (None, TOKEN, "another")]

    assert statuses() == [200, 200, 200]
    assert statuses(token=TOKEN) == [401, 200, 401]
    assert statuses(token=TOKEN, http_token="another") == [401, 401, 200]
    assert statuses(token=TOKEN, http_token="") == [200, 200, 200]
    monkeypatch.setenv("SYNCBN_INSPECTION_TOKEN", "another")
    assert statuses(token=TOKEN) == [401, 401, 200]
    with pytest.raises(syncbn.InvalidArgument):
        syncbn.Master(http_address="127.0.0.1:0", http_token="two words")


ALONE = """
import logging, sys, syncbn, urllib.request
logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
with syncbn.Worker() as worker:
    worker.all_reduce("sum", [1.0])
    print("joined", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_master_that_a_worker_starts_by_itself(token, monkeypatch):
    """Readers need no token where it was drawn at random, since nobody knows it."""
    monkeypatch.setenv("SYNCBN_HTTP_ADDRESS", "127.0.0.1:0")
    if token:
        monkeypatch.setenv("SYNCBN_TOKEN", token)
    for name in ("SYNCBN_TARGET", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        address = None
        for line in process.stdout:
            if "http://" in line:
                address = line.strip().rpartition("http://")[2].rstrip("/")
            if line == "joined\n":
                break
        assert get(address, "/statusz")[0] == (401 if token else 200)
        assert get(address, "/statusz", token or "")[0] == 200
        process.communicate("", timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(60)
