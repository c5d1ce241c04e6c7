"""Workers that nobody has configured: their place in a launch, and how they meet at a master that rank 0 starts."""

import os
import sys

import pytest

import syncbn
from syncbn import _environment, _meeting

import processes

JAX_PYTHON = os.environ.get("SYNCBN_JAX_PYTHON", "")
PREFIXES = ("RANK", "WORLD_SIZE", "SYNCBN_", "OMPI_", "MV2_", "PMI", "SLURM_", "HOROVOD_", "PET_", "MASTER_", "TORCHELASTIC_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PREFIXES) and name not in ("SYNCBN_LIBRARY", "SYNCBN_MASTER"):
            monkeypatch.delenv(name)


# ---- The place in a launch, from its variables ----


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "5"}, (2, 5)),
        ({"RANK": "2"}, (2, None)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, (0, 4)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "1"}, (1, 4)),
        ({"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, (6, 8)),
        ({"PMIX_RANK": "6", "SLURM_STEP_NUM_TASKS": "8"}, (6, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # In a batch script, outside of srun.
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),  # torchrun in srun.
        ({"PET_NODE_RANK": "1", "PET_NNODES": "4"}, (1, 4)),
        ({"PET_NODE_RANK": "1", "PET_NNODES": "4", "PET_NPROC_PER_NODE": "8"}, None),
        ({"PET_NODE_RANK": "1", "PET_NNODES": "1:4"}, None),
    ],
)
def test_the_place_in_a_launch(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _environment.place() == place


def test_a_launchers_variables_place_a_worker(master, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with syncbn.Worker(master.target, "open mpi") as worker:
        assert (worker.rank, worker.world_size) == (1, 2)


# ---- Where a master of a launch listens ----


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "192.0.2.7", "LOCAL_WORLD_SIZE": "4"},
        {"MASTER_ADDR": "192.0.2.7", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"MASTER_ADDR": "192.0.2.7", "SLURM_STEP_NUM_NODES": "1"},
    ],
)
def test_on_one_host_the_loopback_interface_is_enough(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _meeting._address(4) == (None, 0)


def test_over_several_hosts_the_master_listens_where_it_reaches_the_launchs_address(monkeypatch):
    routes = {"192.0.2.7": "10.5.0.1", _meeting._ANY_OTHER_HOST: "10.9.0.1"}
    monkeypatch.setattr(_meeting, "_source_address", routes.get)
    assert _meeting._address(4) == ("10.9.0.1", 0)  # No address of a launch: a file:// store, say.
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _meeting._address(4) == ("10.5.0.1", 0)
    routes["192.0.2.7"] = "127.0.1.1"  # As Debian's /etc/hosts has the host's own name.
    assert _meeting._address(4) == ("10.9.0.1", 0)
    monkeypatch.setenv("SYNCBN_ADDRESS", "[fd00::1]:50051")
    assert _meeting._address(4) == ("fd00::1", 50051)
    for bad in ("10.0.0.1", "10.0.0.1:http", ":1"):
        monkeypatch.setenv("SYNCBN_ADDRESS", bad)
        with pytest.raises(ValueError, match=f"SYNCBN_ADDRESS is '{bad}'"):
            _meeting._address(4)


def test_the_source_address_is_an_address_of_this_host():
    assert _meeting._source_address("127.0.0.1") == "127.0.0.1"
    assert _meeting._source_address("no-such-host.invalid") is None


def test_a_certificate_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(syncbn.InvalidArgument, match="two words"):
        _meeting.make_certificate("two words", str(tmp_path / "cert"), str(tmp_path / "key"))
    with pytest.raises(syncbn.InvalidArgument, match=str(tmp_path / "no/key")):
        _meeting.make_certificate("127.0.0.1", str(tmp_path / "cert"), str(tmp_path / "no/key"))


# ---- torch.distributed ----

_TORCH = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
import syncbn, syncbn.torch
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])

def initialize(name="store"):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world)

def check(layer):
    x = torch.arange(6.0 * world, dtype=torch.float64).reshape(3 * world, 2).exp() % 7
    y = layer(x[3 * rank : 3 * rank + 3])
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True)[3 * rank : 3 * rank + 3])

def layer():
    return syncbn.torch.convert_sync_batchnorm(torch.nn.BatchNorm1d(2, dtype=torch.float64))
"""


def torch_processes(source, world_size, tmp_path, **options):
    pytest.importorskip("torch")
    return processes.run(_TORCH + source, world_size, tmp_path, **options)


def test_a_process_group_is_enough(tmp_path):
    """No variable, no address, no worker; where the environment places all processes alike, the process group counts."""
    source = """
initialize()
check(layer())
worker = syncbn.default_worker()
assert (worker.rank, worker.world_size) == (rank, world), worker
dist.destroy_process_group()
"""
    torch_processes(source, 3, tmp_path, RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1")


def test_the_process_group_places_the_workers_of_a_master_that_is_named(tmp_path, master):
    source = """
initialize()
check(layer())
assert syncbn.default_worker().target == os.environ["SYNCBN_TARGET"]
dist.barrier()
"""
    torch_processes(source, 2, tmp_path, SYNCBN_TARGET=master.target, SYNCBN_JOB=tmp_path.name)


def test_across_hosts_the_master_speaks_tls(tmp_path):
    """A second loopback address stands for another host's."""
    source = """
initialize()
check(layer())
worker = syncbn.default_worker()
assert worker.target.startswith("127.0.0.2:"), worker.target
if rank == 1:
    try:
        syncbn.Worker(worker.target, "strangers", 0, 1, join_timeout=1.0)
    except syncbn.Unavailable as error:
        assert "TLS" in error.message, error
    else:
        raise SystemExit("a stranger without the certificate has joined")
dist.barrier()
"""
    torch_processes(source, 2, tmp_path, SYNCBN_ADDRESS="127.0.0.2:0")


def test_rank_0_keeps_the_master_until_the_others_have_left(tmp_path):
    source = """
initialize()
with syncbn.torch.init_worker() as worker:
    worker.all_reduce("sum", [1.0])
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("leaving", "")
    else:
        store.get("leaving")
    before = time.monotonic_ns()
print(before, time.monotonic_ns())
"""
    first, second = (list(map(int, output.split())) for output in torch_processes(
        source, 2, tmp_path, SYNCBN_ADDRESS="127.0.0.1:0"
    ))
    assert first[1] > second[0]


def test_a_rank_0_that_does_not_come_is_named(tmp_path):
    source = """
initialize()
if rank == 1:
    try:
        syncbn.torch.init_worker(timeout=0.5)
    except syncbn.Unavailable as error:
        assert "waited 0.5 seconds for rank 0" in error.message, error
    else:
        raise SystemExit("there is no master")
dist.barrier()
with syncbn.torch.init_worker(timeout=60) as worker:  # The failed call has not counted: the two meet.
    assert worker.all_reduce("sum", [rank + 1.0])[0] == 3.0
"""
    torch_processes(source, 2, tmp_path, MASTER_ADDR="127.0.0.1")


def test_a_master_that_cannot_start_is_an_error_everywhere(tmp_path):
    source = """
initialize()
try:
    syncbn.torch.init_worker()
except syncbn.Error as error:
    assert "203.0.113.9" in error.message, error
    assert rank == 0 or "rank 0 could not start the master" in error.message, error
else:
    raise SystemExit("there is no master")
os.environ["SYNCBN_ADDRESS"] = "127.0.0.1:0"
with syncbn.torch.init_worker() as worker:
    assert worker.all_reduce("sum", [rank + 1.0])[0] == 3.0
"""
    torch_processes(source, 2, tmp_path, SYNCBN_ADDRESS="203.0.113.9:0")  # No address of this host.


def test_a_rank_0_that_dies_ends_the_others(tmp_path):
    source = """
initialize()
worker = syncbn.default_worker()
worker.all_reduce("sum", [1.0])
if rank == 0:
    os.kill(os.getpid(), 9)
try:
    for step in range(1000):
        worker.all_reduce("sum", [1.0])
except syncbn.Unavailable:
    print("rank 0 is gone")
"""
    outputs = torch_processes(
        source, 2, tmp_path, MASTER_ADDR="127.0.0.1", SYNCBN_JOIN_TIMEOUT=1.0, codes=[-9, 0]
    )
    assert "rank 0 is gone" in outputs[1]


def test_a_process_group_that_is_initialized_anew(tmp_path):
    """The default worker goes over to the new group's processes; layers made before go on."""
    source = """
initialize("first")
normalization = layer()
check(normalization)
first = syncbn.default_worker()
dist.destroy_process_group()
assert syncbn.default_worker() is first
rank = world - 1 - rank
initialize("second")
check(normalization)
second = syncbn.default_worker()
assert first.closed and (second.rank, second.world_size) == (rank, world)
"""
    torch_processes(source, 2, tmp_path, MASTER_ADDR="127.0.0.1")


def test_process_groups_of_a_part_of_the_processes(tmp_path):
    """Each has a worker, whose layers synchronize among its members alone; beside them, one for all."""
    source = """
initialize()
groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
mine, other = groups[rank % 2], groups[1 - rank % 2]
with syncbn.torch.init_worker() as everybody, syncbn.torch.init_worker(process_group=mine) as part:
    assert (part.rank, part.world_size) == (rank // 2, 2)
    assert part.all_reduce("sum", [rank])[0] == (2.0 if rank % 2 == 0 else 4.0)
    assert everybody.all_reduce("sum", [rank])[0] == 6.0
    try:
        syncbn.torch.init_worker(process_group=other)
    except ValueError as error:
        assert "no member" in str(error)
    else:
        raise SystemExit("a worker of a foreign group")
"""
    torch_processes(source, 4, tmp_path, MASTER_ADDR="127.0.0.1")


# ---- jax.distributed ----

_JAX = """
import sys, jax
import numpy as np
import syncbn, syncbn.numpy
rank, world = int(sys.argv[1]), int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", world, rank)
x = np.random.default_rng(5).normal(2.0, 3.0, (3 * world, 4))
y, _ = syncbn.numpy.forward(syncbn.default_worker(), "layer", x[3 * rank : 3 * rank + 3])
expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
np.testing.assert_allclose(y, expected[3 * rank : 3 * rank + 3], rtol=1e-12)
with syncbn.Worker(group="second") as worker:
    assert worker.all_reduce("sum", [rank + 1.0])[0] == 6.0
"""


def test_jax_distributed_is_enough():
    if not os.path.exists(JAX_PYTHON):
        pytest.importorskip("jax")
    interpreter = JAX_PYTHON if os.path.exists(JAX_PYTHON) else sys.executable
    port = processes.free_port()
    processes.run(_JAX, 3, port, interpreter=interpreter, JAX_PLATFORMS="cpu", MASTER_ADDR="127.0.0.1")


# ---- torchrun's elastic restarts ----

_ELASTIC = """
import os, pathlib, signal, sys
import torch, torch.distributed as dist
import syncbn.torch
folder, steps, sizes = pathlib.Path(sys.argv[1]), 6, [1, 4, 2]
dist.init_process_group("gloo")
rank, restart = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
generator = torch.Generator().manual_seed(3)
x = torch.randn(steps, sum(sizes), 3, generator=generator, dtype=torch.float64)
torch.manual_seed(4)
plain = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()

def step(model, batch, divisor):
    model.zero_grad()
    (model(batch).square().sum() / divisor).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad

model = syncbn.torch.convert_sync_batchnorm(torch.nn.Sequential(*plain))
saved = folder / "checkpoint"
begun = 0
if saved.exists():
    begun, state = torch.load(saved)
    model.load_state_dict(state)
parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
for number in range(begun, steps):
    if number == 3 and restart == 0 and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step(parallel, x[number].split(sizes)[rank], sum(sizes) / dist.get_world_size())
    if rank == 0 and number == 2:
        torch.save((number + 1, model.state_dict()), saved)
    if number == 2:
        dist.barrier()
worker = syncbn.default_worker()
(folder / f"end {restart} {rank}").write_text(f"{begun} {worker.run_id}")
if rank == 0:
    torch.save(model.state_dict(), folder / "result")
dist.barrier()
"""


def test_torchrun_restarts_after_a_worker_is_killed(tmp_path):
    """Training goes on from the checkpoint, in a later generation, to the end of one process on the whole batches."""
    torch = pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(_ELASTIC)
    command = f"""
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint",
    "127.0.0.1:0", "--rdzv_id", {tmp_path.name!r}, "--nproc_per_node", "3", "--max_restarts", "2", "--redirects", "1", "--tee",
    "1", {str(script)!r}, {str(tmp_path)!r}]))
"""
    processes.run(command, 1)
    ends = {path.name: path.read_text().split() for path in tmp_path.glob("end *")}
    assert sorted(ends) == ["end 1 0", "end 1 1", "end 1 2"]
    assert {words[0] for words in ends.values()} == {"3"} and len({words[1] for words in ends.values()}) == 1

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 7, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(4)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for batch in x:
        optimizer.zero_grad()
        (whole(batch).square().sum() / 7).backward()
        optimizer.step()
    result = torch.load(tmp_path / "result")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10, msg=name)
