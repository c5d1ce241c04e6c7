"""Settings of a worker, from its arguments and from the environment, and those that it refuses."""

import fractions
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import syncbn
from syncbn import _environment, _variables

VARIABLES = """
SYNCBN_TARGET SYNCBN_GROUP SYNCBN_JOB SYNCBN_GENERATION SYNCBN_TIMEOUT SYNCBN_JOIN_TIMEOUT SYNCBN_REJOIN_GRACE
SYNCBN_MIN_WORKERS SYNCBN_ON_WORKER_LOST SYNCBN_DESCRIPTION SYNCBN_CLIENT_TRUSTED_CA_FILE SYNCBN_CLIENT_CERT_FILE
SYNCBN_CLIENT_KEY_FILE SYNCBN_STREAM_ORDERED RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
SLURM_JOB_ID SLURM_RESTART_COUNT RAY_JOB_ID OMPI_COMM_WORLD_SIZE PMI_SIZE MV2_COMM_WORLD_SIZE HOROVOD_SIZE SLURM_STEP_NUM_TASKS
""".split()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# ---- Names of jobs ----


@pytest.mark.parametrize(
    "variables, job",
    [
        ({}, "default"),
        ({"MASTER_ADDR": "node7"}, "default"),
        ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}, "node7:29500"),
        ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}, "node7:29500"),
        ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "RAY_JOB_ID": "ray"}, "ray"),
        ({"RAY_JOB_ID": "ray", "SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "none"}, "4711"),
        ({"SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "run"}, "run"),
        ({"SYNCBN_JOB": "mine", "TORCHELASTIC_RUN_ID": "run"}, "mine"),
        ({"SYNCBN_JOB": "", "TORCHELASTIC_RUN_ID": "run"}, "run"),
    ],
)
def test_a_jobs_name_tells_launches_apart(monkeypatch, variables, job):
    environment(monkeypatch, **variables)
    assert _environment.job() == job


@pytest.mark.parametrize("variables", [{}, {"RAY_JOB_ID": "ffffffff"}, {"RAY_JOB_ID": "02000000"}])
@pytest.mark.parametrize("connected", [True, False])
def test_ray_is_asked_for_its_job(monkeypatch, variables, connected):
    """One of two actors of a job may be in a process that has no job in its environment."""
    environment(monkeypatch, **variables)
    context = types.SimpleNamespace(get_job_id=lambda: "01000000")
    ray = types.SimpleNamespace(is_initialized=lambda: connected, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    unconnected = "02000000" if variables.get("RAY_JOB_ID") == "02000000" else "default"
    assert _environment.job() == ("01000000" if connected else unconnected)
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))  # A folder of that name is not Ray.
    assert _environment.job() == unconnected


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_a_loopback_address_is_that_of_this_host(monkeypatch, address):
    """Two hosts may have one launch each at localhost:29500."""
    environment(monkeypatch, MASTER_ADDR=address, MASTER_PORT="29500")
    assert _environment.job() == f"{os.uname().nodename}:29500"


@pytest.mark.parametrize(
    "variables, generation",
    [
        ({}, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "3"}, 3),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "1"}, 2**32),
        ({"TORCHELASTIC_RESTART_COUNT": "9", "SYNCBN_GENERATION": "2"}, 2),
    ],
)
def test_a_later_restart_has_a_greater_generation(monkeypatch, variables, generation):
    environment(monkeypatch, **variables)
    assert _environment.generation() == generation


# ---- Every option has its variable ----


def test_the_environment_is_where_arguments_are_absent(master, monkeypatch):
    environment(
        monkeypatch,
        SYNCBN_TARGET=master.target,
        SYNCBN_GROUP="group of environment",
        SYNCBN_JOB="job of environment",
        SYNCBN_TIMEOUT="7.5",
        RANK="1",
        WORLD_SIZE="2",
    )
    with syncbn.Worker() as worker:
        assert (worker.group, worker.job, worker.rank) == ("group of environment", "job of environment", 1)
        # The same for all of a group; otherwise the join is refused.
        with syncbn.Worker(rank=0, timeout=7.5):
            pass
        with pytest.raises(syncbn.Error, match="timeout"):
            syncbn.Worker(rank=0, timeout=8, join_timeout=0.5)
    with syncbn.Worker(group="argument", job="argument", rank=0, world_size=1) as worker:
        assert (worker.group, worker.job, worker.rank, worker.world_size) == ("argument", "argument", 0, 1)


def test_a_round_waits_for_ten_minutes_by_default(master):
    with syncbn.Worker(master.target, "ten minutes", 0, 2):
        with syncbn.Worker(master.target, "ten minutes", 1, 2, timeout=600):
            pass


def test_rejoin_grace_and_min_workers_come_from_the_environment(master, monkeypatch):
    environment(monkeypatch, SYNCBN_MIN_WORKERS="1", SYNCBN_TIMEOUT="0.2", SYNCBN_REJOIN_GRACE="0")
    with syncbn.Worker(master.target, "minimum", 0, 2) as worker:
        assert worker.all_reduce("sum", [3.0])[0] == 3.0  # Proceeds without rank 1.


def test_the_join_timeout_comes_from_the_environment(monkeypatch, tmp_path):
    environment(monkeypatch, SYNCBN_JOIN_TIMEOUT="0.2", SYNCBN_TARGET=f"unix:{tmp_path}/nobody")
    with pytest.raises(syncbn.Unavailable):
        syncbn.Worker(rank=0, world_size=1)


@pytest.mark.parametrize("name", ["TRUSTED_CA_FILE", "CERT_FILE"])
def test_files_for_tls_come_from_the_environment(master, monkeypatch, name):
    names = [name] if name == "TRUSTED_CA_FILE" else ["CERT_FILE", "KEY_FILE"]  # They come together.
    environment(monkeypatch, **{f"SYNCBN_CLIENT_{each}": f"/nonexistent/{each}.pem" for each in names})
    with pytest.raises(syncbn.Error, match="/nonexistent/.*.pem"):
        syncbn.Worker(master.target, "tls", 0, 1, join_timeout=0.5)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SYNCBN_GENERATION", "TORCHELASTIC_RESTART_COUNT", "SYNCBN_MIN_WORKERS"])
@pytest.mark.parametrize("value", ["two", "1.5", "-1", "0x1", "1e3", str(2**70), "1 2"])
def test_a_bad_integer_in_the_environment_is_named(master, monkeypatch, name, value):
    environment(monkeypatch, SYNCBN_TARGET=master.target, RANK="0", WORLD_SIZE="1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        syncbn.Worker()
    assert isinstance(caught.value, syncbn.InvalidArgument)
    assert name in caught.value.message and value in caught.value.message
    with pytest.raises(syncbn.InvalidArgument, match=name):
        syncbn.default_worker()


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK and WORLD_SIZE are not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
def test_what_a_launch_has_left_out_is_named(master, monkeypatch, variables, said):
    environment(monkeypatch, SYNCBN_TARGET=master.target, **variables)
    with pytest.raises(syncbn.InvalidArgument, match=said):
        syncbn.Worker()


@pytest.mark.parametrize("name", ["SYNCBN_TIMEOUT", "SYNCBN_JOIN_TIMEOUT", "SYNCBN_REJOIN_GRACE"])
@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-1", "1e300", "10s"])
def test_a_bad_time_in_the_environment_is_named(master, monkeypatch, name, value):
    environment(monkeypatch, SYNCBN_TARGET=master.target, RANK="0", WORLD_SIZE="1")
    monkeypatch.setenv(name, value)
    with pytest.raises(syncbn.InvalidArgument, match=name) as caught:
        syncbn.Worker()
    assert value in caught.value.message


def test_a_bad_flag_in_the_environment_is_named(master, monkeypatch):
    environment(monkeypatch, SYNCBN_STREAM_ORDERED="perhaps")
    with pytest.raises(syncbn.InvalidArgument, match="SYNCBN_STREAM_ORDERED.*perhaps"):
        syncbn.Worker(master.target, rank=0, world_size=1)


@pytest.mark.parametrize(
    "value, expected",
    [(value, True) for value in ("1", "true", "On", "YES")] + [(value, False) for value in ("0", "False", "off", "no", "")],
)
def test_a_flag_in_the_environment_has_the_words_of_the_masters_switches(monkeypatch, value, expected):
    environment(monkeypatch, SYNCBN_STREAM_ORDERED=value)
    assert _environment.flag("SYNCBN_STREAM_ORDERED") is expected


# ---- Arguments ----

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("rank", True, TypeError),
        ("rank", np.True_, TypeError),
        ("rank", 0.0, TypeError),
        ("rank", "0", TypeError),
        ("rank", -1, ValueError),
        ("rank", 2**32, ValueError),
        ("rank", 2, ValueError),
        ("world_size", 0, ValueError),
        ("world_size", -1, ValueError),
        ("world_size", 2**32, ValueError),
        ("world_size", 2.0, TypeError),
        ("generation", -1, ValueError),
        ("generation", 2**64, ValueError),
        ("generation", 1.5, TypeError),
        ("timeout", 0, ValueError),
        ("timeout", -1, ValueError),
        ("timeout", NAN, ValueError),
        ("timeout", INFINITY, ValueError),
        ("timeout", 1e300, ValueError),
        ("timeout", "30", TypeError),
        ("timeout", True, TypeError),
        ("join_timeout", 0, ValueError),
        ("join_timeout", NAN, ValueError),
        ("join_timeout", -INFINITY, ValueError),
        ("rejoin_grace", -1, ValueError),
        ("rejoin_grace", NAN, ValueError),
        ("min_workers", 0, ValueError),
        ("min_workers", 3, ValueError),
        ("min_workers", True, TypeError),
        ("job", "a\0b", ValueError),
        ("job", "", ValueError),
        ("job", "j" * 256, ValueError),
        ("job", 5, TypeError),
        ("job", "\ud800", ValueError),
        ("group", "a\0b", ValueError),
        ("group", b"bytes", TypeError),
        ("description", "a\0b", ValueError),
        ("description", "d" * 1025, ValueError),
        ("trusted_ca_file", 3, TypeError),
        ("cert_file", "a\0b", ValueError),
        ("target", 50051, TypeError),
        ("target", "a\0b", ValueError),
        ("target", ["127.0.0.1:1", 2], TypeError),
        ("target", ["127.0.0.1:1,127.0.0.1:2"], ValueError),
    ],
)
def test_a_bad_argument_of_a_worker_is_named_before_anything_is_sent(name, value, error):
    arguments = dict(target="unix:/nonexistent/master", rank=1, world_size=2, join_timeout=0.2)
    arguments[name] = value
    with pytest.raises(error, match=name.replace("_", "[_ ]")) as caught:
        syncbn.Worker(**arguments)
    assert not isinstance(caught.value, syncbn.Unavailable)


def test_integers_and_numbers_of_numpy_are_as_good_as_pythons(master):
    arguments = dict(rank=np.int64(0), world_size=np.uint8(1), timeout=np.float32(20), generation=np.array(0))
    with syncbn.Worker(master.target, "numpy's", **arguments, rejoin_grace=fractions.Fraction(1, 4)) as worker:
        worker.declare_layer("layer", np.int32(2), eps=np.float32(1e-3), momentum=np.float64(0.5))
        merged = worker.synchronize("layer", np.int16(3), np.array([1, 2]), np.zeros(2, np.float16), np.uint64(7))
        assert (merged.count, merged.sequence) == (3, 7)
        np.testing.assert_array_equal(merged.mean, [1.0, 2.0])
        worker.resume_at(np.int64(9))
        assert worker.synchronize("layer", 1, [1.0, 2.0], [0.0, 0.0]).sequence == 9


@pytest.fixture(scope="module")
def worker():
    with syncbn.Master() as master, syncbn.Worker(master.target, rank=0, world_size=1, timeout=60) as made:
        yield made


COUNTS = [(2**70, ValueError), (-1, ValueError), (2**40 + 1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)]
SEQUENCES = [(-1, ValueError), (2**64, ValueError), (2**64 - 1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)]
NAMES = [("a\0b", ValueError), ("", ValueError), ("n" * 256, ValueError), ("é" * 128, ValueError), (b"a", TypeError), (7, TypeError)]
VECTORS = [([1j], TypeError), (np.zeros(1, complex), TypeError), (["1"], TypeError), ([None], TypeError), ([object()], TypeError)]
VECTORS += [(np.array(["2020-01-01"], "datetime64[D]"), TypeError), (np.ma.array([1.0], mask=[True]), TypeError)]


@pytest.mark.parametrize("count, error", COUNTS)
def test_bad_counts(worker, count, error):
    with pytest.raises(error, match="count"):
        worker.synchronize("counts", count, [1.0], [0.0])


@pytest.mark.parametrize("sequence, error", SEQUENCES)
def test_bad_sequences(worker, sequence, error):
    with pytest.raises(error, match="sequence"):
        worker.synchronize("sequences", 1, [1.0], [0.0], sequence)
    with pytest.raises(error, match="sequence"):
        worker.synchronize_backward("sequences", sequence, [1.0], [0.0])
    with pytest.raises(error, match="sequence"):
        worker.all_reduce("sequences of sums", [1.0], sequence)
    with pytest.raises(error, match="sequence"):
        worker.resume_at(sequence)


def test_no_sequence_comes_after_the_greatest(master):
    with syncbn.Worker(master.target, "the greatest sequence", rank=0, world_size=1, timeout=60) as worker:
        worker.resume_at(2**64 - 2)
        assert worker.all_reduce("sum", [1.0]) == [1.0]
        with pytest.raises(syncbn.Error, match=f"has used sequence {2**64 - 2}") as caught:
            worker.all_reduce("sum", [1.0])
        assert caught.value.code == 11


@pytest.mark.parametrize("name, error", NAMES)
def test_bad_names(worker, name, error):
    for call in (
        lambda: worker.declare_layer(name, 1),
        lambda: worker.synchronize(name, 1, [1.0], [0.0]),
        lambda: worker.synchronize(name, 0),
        lambda: worker.synchronize_backward(name, 0, [1.0], [0.0]),
        lambda: worker.all_reduce(name, [1.0]),
    ):
        with pytest.raises(error, match="name"):
            call()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("vector, error", VECTORS)
def test_bad_vectors(worker, vector, error):
    with pytest.raises(error, match="mean"):
        worker.synchronize("vectors", 1, vector, [0.0])
    with pytest.raises(error, match="m2"):
        worker.synchronize("vectors", 1, [0.0], vector)
    with pytest.raises(error, match="sum_dy"):
        worker.synchronize_backward("vectors", 0, vector, [0.0])
    with pytest.raises(error, match="vector"):
        worker.all_reduce("sum of vectors", vector)


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        (dict(channels=0), ValueError, "channels"),
        (dict(channels=-1), ValueError, "channels"),
        (dict(channels=2**32 + 1), ValueError, "channels"),
        (dict(channels=1.0), TypeError, "channels"),
        (dict(eps=-1e-5), ValueError, "eps"),
        (dict(eps=NAN), ValueError, "eps"),
        (dict(eps=INFINITY), ValueError, "eps"),
        (dict(eps="small"), TypeError, "eps"),
        (dict(eps=1j), TypeError, "eps"),
        (dict(momentum=NAN), ValueError, "momentum"),
        (dict(momentum="0.1"), TypeError, "momentum"),
        (dict(eps_mode="maximum"), ValueError, "eps_mode.*'add', 'clamp'"),
        (dict(eps_mode=0), ValueError, "eps_mode"),
        (dict(numeric="ignore"), ValueError, "numeric.*'refuse', 'propagate'"),
    ],
)
def test_bad_layers(worker, arguments, error, name):
    with pytest.raises(error, match=name):
        worker.declare_layer("bad layer", **{"channels": 1, **arguments})


@pytest.mark.parametrize("timeout, error", [(NAN, ValueError), (-1, ValueError), (-INFINITY, ValueError), ("1", TypeError), (True, TypeError), (1e300, ValueError)])
def test_bad_waits(worker, timeout, error):
    started = worker.start_all_reduce("waits", [1.0])
    for wait in (started.wait, worker.settle, worker.wait_for_members):
        with pytest.raises(error, match="timeout"):
            wait(timeout)
    assert started.result()[0] == 1.0


def test_waits_without_a_limit(worker):
    for timeout in (None, INFINITY):
        assert worker.start_all_reduce("unlimited", [1.0]).wait(timeout)
        assert worker.settle(timeout)
        assert worker.wait_for_members(timeout)


@pytest.mark.parametrize("grace, error", [(NAN, ValueError), (-1, ValueError), ("1", TypeError)])
def test_bad_graces_end_nothing(grace, error):
    with syncbn.Master() as master:
        with pytest.raises(error, match="grace"):
            master.shutdown(grace)
        with syncbn.Worker(master.target, rank=0, world_size=1):
            pass


def test_a_role_is_true_false_or_none(worker):
    with pytest.raises(TypeError, match="backward"):
        worker.synchronize("roles", 1, [1.0], [0.0], backward="yes")


def test_a_reason_for_leaving_is_a_text(master):
    with syncbn.Worker(master.target, "reasons", 0, 1) as worker:
        with pytest.raises(ValueError, match="reason"):
            worker.leave("a\0b")
        assert not worker.closed


# ---- A world of one worker ----

_ALONE = """
import json, logging, sys
import numpy as np
import syncbn, syncbn.numpy

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("syncbn").addHandler(Keep())

x = np.random.default_rng(7).normal(3.0, 2.0, (6, 4, 5))
worker = syncbn.default_worker()
y, state = syncbn.numpy.forward(worker, "layer", x)
dx = state.backward(x**2).dx
mean, var = x.mean((0, 2)), x.var((0, 2))
xhat = (x - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
dy = x**2
expected = (dy - dy.mean((0, 2))[:, None] - xhat * (dy * xhat).mean((0, 2))[:, None]) / np.sqrt(var + 1e-5)[:, None]
np.testing.assert_allclose(y, xhat, rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(dx, expected, rtol=1e-10, atol=1e-10)
merged = worker.synchronize("moments", 2, [4.0], [6.0])
assert (merged.count, merged.mean[0], merged.var[0]) == (2, 4.0, 3.0)
assert worker.all_reduce("sum", [5.0])[0] == 5.0
assert worker.wait_for_members(0) and (worker.rank, worker.world_size) == (0, 1)
assert syncbn.default_worker() is worker
with syncbn.Worker() as second:
    assert second.all_reduce("sum", [6.0])[0] == 6.0
print(json.dumps(records))
"""


def python(source, *flags, **variables):
    package = str(pathlib.Path(syncbn.__file__).parents[1])
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([package, *sys.path]), **variables)
    done = subprocess.run([sys.executable, *flags, "-c", source], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SYNCBN_CLIENT_TRUSTED_CA_FILE": "/etc/of/the/cluster.pem"}]
)
def test_one_worker_without_a_target_is_a_group_by_itself(variables):
    (record,) = json.loads(python(_ALONE, **variables).stdout)
    assert "SYNCBN_TARGET" in record and "its own batches" in record


_ALONE_IN_TORCH = """
import torch, syncbn, syncbn.torch
torch.manual_seed(3)
ours = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).double()
theirs = __import__("copy").deepcopy(ours)
ours = syncbn.torch.convert_sync_batchnorm(ours)
for _ in range(3):
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    for model in (ours, theirs):
        model.zero_grad()
        (model(x) ** 2).sum().backward()
    syncbn.torch.all_reduce_gradients(ours, weight=1)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
for name, buffer in theirs.named_buffers():
    torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-12, atol=0)
"""


def test_a_converted_model_without_a_launcher():
    pytest.importorskip("torch")
    python(_ALONE_IN_TORCH)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_processes_does_not_take_itself_for_all(monkeypatch, name):
    """Otherwise each would normalize over its own batches, and nobody would notice."""
    environment(monkeypatch, **{name: "4"})
    with pytest.raises(ValueError, match=f"{name} is 4.*SYNCBN_TARGET"):
        syncbn.Worker()
    environment(monkeypatch, RANK="0", WORLD_SIZE="1")  # Of the shell that started the launcher.
    with pytest.raises(ValueError, match=f"{name} is 4.*WORLD_SIZE is 1"):
        syncbn.Worker()
    environment(monkeypatch, TORCHELASTIC_RUN_ID="run")  # Each process of the launcher's is a torchrun.
    with syncbn.Worker() as worker:
        assert worker.world_size == 1


# ---- Two layers of one name ----


def test_a_name_for_two_layers_is_told_to_use_a_prefix(group):
    """The workers run them in different orders, so that their rounds fail."""

    def run(worker):
        worker.wait_for_members()
        worker.declare_layer("layer", 2 + worker.rank)
        worker.declare_layer("layer", 3 - worker.rank)
        with pytest.raises(syncbn.LayerMismatch) as caught:
            channels = 3 - worker.rank
            worker.synchronize("layer", 1, np.zeros(channels), np.zeros(channels))
        worker.all_reduce("end", [0.0])
        return caught.value

    for error in group(2, run):
        assert "prefix=" in str(error) and "channels" in error.message
        assert error.message in error.args


def test_a_mismatch_of_other_making_says_nothing_of_prefixes(group):
    def run(worker):
        channels = 2 + worker.rank
        with pytest.raises(syncbn.LayerMismatch) as caught:
            worker.synchronize("layer", 1, np.zeros(channels), np.zeros(channels))
        worker.all_reduce("end", [0.0])
        return "prefix" in str(caught.value)

    assert group(2, run) == [False, False]


# ---- The end of a program ----

_ENDS = """
import sys, syncbn, syncbn.numpy, numpy as np
master = syncbn.Master()
worker = syncbn.Worker(master.target, rank=0, world_size=1)
y, state = syncbn.numpy.forward(worker, "layer", np.arange(6.0).reshape(3, 2))
started = worker.start_all_reduce("sum", [1.0])
cycle = [state, started, worker, master]
cycle.append(cycle)
sys.modules["kept"] = cycle  # Goes last, when modules have lost their names.
class Late:
    def __init__(self, *kept):
        self.kept = kept
    def __del__(self):
        pass
import builtins
builtins.kept = Late(state, started)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "worker.close()", "worker.leave(); master.shutdown()", "master.shutdown()"])
def test_the_interpreters_end_is_silent_in_any_order(end):
    done = python(f"{_ENDS}\n{end}\n", "-X", "dev", "-W", "error")
    assert (done.stdout, done.stderr) == ("", "")


# ---- Names that are almost right ----


@pytest.mark.parametrize(
    "name, meant",
    [
        ("SYNCBN_TRAGET", "SYNCBN_TARGET"),
        ("SYNCBN_TARGETS", "SYNCBN_TARGET"),
        ("SYNCBN_TIME_OUT", "SYNCBN_TIMEOUT"),
        ("SYNCBN_JOIN-TIMEOUT", "SYNCBN_JOIN_TIMEOUT"),
        ("SYNCBN_STREAM_ORDER", "SYNCBN_STREAM_ORDERED"),
        ("SYNCBN_CLIENT_TRUSTED_CA", "SYNCBN_CLIENT_TRUSTED_CA_FILE"),
        ("SYNCBN_SHARED_MEM_DIR", "SYNCBN_SHARED_MEMORY_DIR"),
        ("SYNCBNTOKEN", "SYNCBN_TOKEN"),
    ],
)
def test_a_variable_that_is_almost_known_is_told_once(master, monkeypatch, caplog, name, meant):
    monkeypatch.setattr(_variables, "_told", set())
    environment(monkeypatch, **{name: "a secret"})
    with caplog.at_level("WARNING", "syncbn"):
        for number in range(2):
            syncbn.Worker(master.target, f"misspelled {name} {number}", 0, 1).leave()
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"the variable {name} is not known, and changes nothing; {meant} is"]


def test_variables_of_others_are_no_misspelled_ones(master, monkeypatch, caplog):
    """Kubernetes sets some for a service that is called syncbn; masters and tools of this project have their own."""
    monkeypatch.setattr(_variables, "_told", set())
    others = "PORT SERVICE_HOST SERVICE_PORT PORT_50051_TCP MASTER_PORT MASTER_SERVICE_HOST MAX_WORKERS NO_BUILD CUDA".split()
    environment(monkeypatch, **{f"SYNCBN_{name}": "1" for name in others})
    with caplog.at_level("WARNING", "syncbn"):
        syncbn.Worker(master.target, "variables of others", 0, 1).leave()
    assert not caplog.records
