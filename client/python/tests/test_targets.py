"""Targets: several addresses, or a function that is called at each attempt to connect; and late workers."""

import logging
import os
import signal

import pytest

import syncbn

PATIENCE = 120.0


def sums(worker):
    return float(worker.all_reduce("sum", [3.0])[0])


@pytest.mark.parametrize("kind", [list, tuple, ",".join])
def test_the_address_that_answers_is_taken(master, tmp_path, kind):
    target = kind([f"unix:{tmp_path}/nobody", "127.0.0.1:1", master.target])
    with syncbn.Worker(target, f"several {kind}", 0, 1, join_timeout=PATIENCE) as worker:
        assert sums(worker) == 3.0


def test_several_addresses_of_the_environment(master, tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_TARGET", f"unix:{tmp_path}/nobody,{master.target}")
    with syncbn.Worker(group="several of the environment", rank=0, world_size=1, join_timeout=PATIENCE) as worker:
        assert sums(worker) == 3.0


@pytest.mark.parametrize("kind", [str, lambda target: [target]])
def test_a_function_says_where_the_master_is(master, kind):
    with syncbn.Worker(lambda: kind(master.target), f"function {kind}", 0, 1, join_timeout=PATIENCE) as worker:
        assert sums(worker) == 3.0


def test_a_function_that_fails_is_asked_again(master, caplog):
    answers = iter([KeyError("not registered yet"), 7, "", [], "a\0b", "x" * 10**6, master.target])

    def find():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING, "syncbn"):
        with syncbn.Worker(find, "fails at first", 0, 1, join_timeout=PATIENCE) as worker:
            assert sums(worker) == 3.0
    told = [record.getMessage() for record in caplog.records if "target function failed" in record.getMessage()]
    assert len(told) == 6 and "KeyError: 'not registered yet'" in told[0]


@pytest.mark.parametrize(
    "target, words",
    [
        ("localhost:99999", ["port 99999", "1 .. 65535"]),
        ("127.0.0.1:0", ["port 0", "1 .. 65535"]),
        ("[::1]:65536", ["port 65536"]),
        ("127.0.0.1:18446744073709551617", ["port 18446744073709551617"]),
        ("dns:///localhost:70000", ["port 70000"]),
        ("dns://127.0.0.1:53/localhost", ["no port"]),
        ("localhost", ["no port"]),
        ("[::1]", ["no port"]),
        ("localhost:", ['port ""']),
        ("localhost:http", ['port "http"']),
        ("127.0.0.1:-1", ['port "-1"']),
        ("127.0.0.1:50051/", ['port "50051/"']),
        ('"127.0.0.1:50051"', ["not a number"]),
        (":50051", ["no host"]),
        ("::1:50051", ["brackets"]),
        ("http://127.0.0.1:50051", ["URL", "HOST:PORT"]),
        ("grpc://master:50051", ["URL"]),
        ("tcp://master:50051", ["URL"]),
        ("127.0.0.1:50051,localhost", ['"localhost"', "no port"]),
    ],
)
def test_a_target_that_is_no_address_is_refused_before_it_is_tried(monkeypatch, target, words):
    """gRPC would take the port modulo 65536, or 443."""
    for arguments in (dict(target=target), dict(target=target.split(",")), {}):
        monkeypatch.setenv("SYNCBN_TARGET", target)
        with pytest.raises(syncbn.InvalidArgument) as caught:
            syncbn.Worker(group="no address", rank=0, world_size=1, join_timeout=PATIENCE, **arguments)
        for word in [target.split(",")[-1], *words]:
            assert word in caught.value.message


@pytest.mark.parametrize("form", ["{}", "dns:{}", "dns:///{}", "ipv4:{}", " {} ", "{}\n", "127.0.0.1:1, {}"])
def test_grpcs_other_names_of_an_address(master, form):
    with syncbn.Worker(form.format(master.target), f"form {form}", 0, 1, join_timeout=PATIENCE) as worker:
        assert sums(worker) == 3.0


def test_what_a_function_says_wrongly_is_named_at_the_end():
    with pytest.raises(syncbn.Unavailable, match="port 99999"):
        syncbn.Worker(lambda: "localhost:99999", "says wrongly", 0, 1, join_timeout=0.5)


def test_a_function_that_always_fails_ends_the_join():
    def find():
        raise LookupError("no master")

    with pytest.raises(syncbn.Unavailable):
        syncbn.Worker(find, "always fails", 0, 1, join_timeout=0.5)


def test_training_goes_on_where_the_master_has_gone():
    masters = [syncbn.Master()]
    asked = []

    def find():
        asked.append(masters[-1].target)
        return masters[-1].target

    with syncbn.Worker(find, "moves", 0, 1, join_timeout=PATIENCE) as worker:
        assert sums(worker) == 3.0
        masters.append(syncbn.Master())
        os.kill(masters[0].pid, signal.SIGKILL)
        assert sums(worker) == 3.0
        assert asked[0] != asked[-1] == masters[1].target
    for master in masters:
        master.shutdown()


def test_a_late_worker_is_named_in_a_warning_long_before_the_deadline(master, caplog):
    def told():
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return [text for text in texts if "late layer" in text]

    caplog.set_level(logging.WARNING, "syncbn")
    with syncbn.Worker(master.target, "late", 0, 3) as first, syncbn.Worker(master.target, "late", 2, 3) as other:
        begun = [worker.start_synchronize("late layer", 1, [1.0], [0.0]) for worker in (first, other)]
        other.flush()
        while not told():  # Ten minutes before the round's deadline, which would end this.
            assert not begun[0].wait(0.5)
        first.close()
    assert "rank 1" in told()[0]
