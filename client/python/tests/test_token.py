"""The job's token: who may join, and where the token is not shown."""

import pathlib
import subprocess
import sys

import pytest

import syncbn
from syncbn import _meeting

TOKEN = "an-open-sesame-of-the-test"


@pytest.fixture(scope="module")
def guarded():
    with syncbn.Master(token=TOKEN) as master:
        yield master


def join(master, group, token=None, rank=0, world_size=1):
    return syncbn.Worker(master.target, group, rank, world_size, token=token, job="token")


def refusal(master, group, token, **place):
    with pytest.raises(syncbn.Unauthenticated) as caught:
        join(master, group, token, **place)
    assert caught.value.reason == "TOKEN_MISMATCH"
    return caught.value


def test_a_worker_needs_the_masters_token(guarded):
    with join(guarded, "right", TOKEN) as worker:
        assert worker.all_reduce("sum", [2.0]) == [2.0]
    absent, wrong = refusal(guarded, "wrong", None), refusal(guarded, "wrong", TOKEN + "x")
    assert absent.message == wrong.message
    assert TOKEN not in str(wrong)


def test_without_a_masters_token_the_first_worker_decides(master):
    with syncbn.Worker(master.target, "first", 0, 2, job="decides", token="a"):
        with pytest.raises(syncbn.Unauthenticated):
            syncbn.Worker(master.target, "first", 1, 2, job="decides", token="b")
        with syncbn.Worker(master.target, "first", 1, 2, job="decides", token="a"):
            pass


def test_the_environment_has_it(monkeypatch):
    monkeypatch.setenv("SYNCBN_TOKEN", TOKEN)
    with syncbn.Master() as master:
        join(master, "environment").close()
        refusal(master, "argument", "another")
        monkeypatch.delenv("SYNCBN_TOKEN")
        refusal(master, "none", None)


def test_it_is_shown_nowhere(guarded):
    arguments = pathlib.Path(f"/proc/{guarded.pid}/cmdline").read_bytes()
    with join(guarded, "shown", TOKEN) as worker:
        shown = [repr(worker), repr(guarded), repr(worker.__dict__), repr(guarded.__dict__), str(arguments)]
    assert not [text for text in shown if TOKEN in text]


@pytest.mark.parametrize("token, kind", [("", ValueError), ("my secret", ValueError), ("x" * 1025, ValueError),
                                         ("secr\u00e9t", ValueError), ("secret\n", ValueError), (b"secret", TypeError)])
def test_what_is_no_token_is_refused_and_not_quoted(token, kind):
    for make in (lambda: syncbn.Worker("127.0.0.1:1", "g", 0, 1, token=token), lambda: syncbn.Master(token=token)):
        with pytest.raises(kind) as caught:
            make()
        assert "secr" not in str(caught.value)


def test_the_master_of_a_worker_without_a_target_refuses_others():
    with syncbn.Worker(rank=0, world_size=1) as worker:
        assert worker.all_reduce("sum", [1.0]) == [1.0]
        with pytest.raises(syncbn.Unauthenticated) as caught:
            syncbn.Worker(worker.target, "strangers", 0, 1, token="a-guess")
        assert caught.value.reason == "TOKEN_MISMATCH"
        # Another process knows the target at most.
        source = f"import syncbn; syncbn.Worker({worker.target!r}, 'strangers', 0, 1)"
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
        assert done.returncode != 0 and "TOKEN_MISMATCH" in done.stderr
        # A further worker of this process may name it.
        with syncbn.Worker(worker.target, "sub-group", 0, 1) as further:
            assert further.all_reduce("sum", [1.0]) == [1.0]


class Board:
    """A board within this process."""

    def __init__(self):
        self.posts, self.counts = {}, {}

    def post(self, topic, text):
        self.posts[topic] = text

    def read(self, topic, seconds, what):
        return self.posts.get(topic)

    def count(self, topic, by=1):
        self.counts[topic] = self.counts.get(topic, 0) + by
        return self.counts[topic]


@pytest.mark.parametrize("given", [None, TOKEN])
def test_rank_0_hands_out_a_token_of_its_own_alone(given, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    board = Board()
    first = _meeting.meet(board, "g", 0, 2, 60.0, given)
    try:
        second = _meeting.meet(board, "g", 1, 2, 60.0, given)
        assert first.token and first.token == second.token
        assert (first.token == TOKEN) == (given is not None)
        assert not [text for text in board.posts.values() if TOKEN in text], "the store has the user's token"
        with syncbn.Worker(second.target, "g", 0, 1, token=second.token) as worker:
            assert worker.rank == 0
    finally:
        first.end(wait=False)


def test_auto_tls(tmp_path):
    with syncbn.Master(auto_tls=True, token=TOKEN) as master:
        trusted = tmp_path / "master.pem"
        trusted.write_text(master.certificate)
        with syncbn.Worker(master.target, "tls", 0, 1, trusted_ca_file=trusted, token=TOKEN) as worker:
            assert worker.all_reduce("sum", [2.0]) == [2.0]
        with pytest.raises(syncbn.Unavailable, match="TLS"):
            syncbn.Worker(master.target, "tls", 0, 1, token=TOKEN, join_timeout=1.0)
    with syncbn.Master() as plain:
        assert plain.certificate is None
    with pytest.raises(syncbn.InvalidArgument, match="auto_tls"):
        syncbn.Master(auto_tls=True, cert_file="cert.pem", key_file="key.pem")
