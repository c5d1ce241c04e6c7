"""Workers that nobody has configured: their place in a launch, and how they meet at a master that rank 0 starts."""

import os
import pathlib
import sys

import pytest

import syncbn
from syncbn import _environment, _master, _meeting

import processes

JAX_PYTHON = os.environ.get("SYNCBN_JAX_PYTHON", "")
PREFIXES = tuple(
    "RANK WORLD_SIZE LOCAL_ MPI_LOCAL JSM_ FLUX_ PALS_ ALPS_ SYNCBN_ OMPI_ MV2_ PMI SLURM_ HOROVOD_ PET_ MASTER_ "
    "TORCHELASTIC_".split()
)


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
        ({"WORLD_SIZE": "8", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, (6, 8)),  # As many batch scripts set it.
        ({"WORLD_SIZE": "4", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, (None, 4)),
        ({"RANK": "6", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, (6, 8)),
        ({"RANK": "5", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, (5, None)),
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
        ({"JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "6", "PMIX_RANK": "5"}, (5, 6)),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "3"}, (1, 3)),
        # Open MPI 4 and 5, within a batch script, within a shell of srun's, and beside what an image exports.
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "RANK": "0", "WORLD_SIZE": "8"}, (0, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "RANK": "", "WORLD_SIZE": ""}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "RANK": "1"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": " 1 ", "OMPI_COMM_WORLD_SIZE": " 4"}, (1, 4)),
        # MPICH's and Intel's, by a hydra that Slurm has started, by srun --mpi=pmi2, and with a half of another's.
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, (2, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (2, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "8"}, (2, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MV2_COMM_WORLD_RANK": "two", "MV2_COMM_WORLD_SIZE": "8"}, (2, 4)),
        # torchrun by each of two tasks of srun, and by mpirun.
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (5, 8)),
        ({"RANK": "5", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (5, 8)),
        # Variables that SGE, PBS and LSF leave name no process.
        ({"JOB_ID": "7", "SGE_TASK_ID": "undefined", "NSLOTS": "8", "NHOSTS": "2", "PE_HOSTFILE": "/hosts"}, None),
        ({"SGE_TASK_ID": "3", "SGE_TASK_LAST": "9"}, None),
        ({"PBS_JOBID": "7", "PBS_NODEFILE": "/nodes", "PBS_TASKNUM": "1", "NCPUS": "8"}, None),
        ({"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "8", "LSB_HOSTS": "a a b b"}, None),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NTASKS_PER_NODE": "4(x2)"}, None),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4(x2)"}, None),
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


def test_a_launcher_on_each_node_of_another_ones_is_named_where_ranks_meet(master, monkeypatch):
    """mpirun by each of two tasks of srun has the variables of an mpirun over both, but for ranks that there are twice."""
    for name, value in {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with syncbn.Worker(master.target, "nested") as worker:
        assert (worker.rank, worker.world_size) == (1, 2)
        with pytest.raises(syncbn.RankTaken) as caught:
            syncbn.Worker(master.target, "nested")
        assert "launchers" not in caught.value.message
        monkeypatch.setenv("SLURM_PROCID", "1")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
        named = "OMPI_COMM_WORLD_RANK is 1, OMPI_COMM_WORLD_SIZE is 2, SLURM_PROCID is 1, SLURM_STEP_NUM_TASKS is 3"
        with pytest.raises(syncbn.RankTaken, match=named):
            syncbn.Worker(master.target, "nested")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},  # srun --mpi=pmi2.
        {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # mpirun in a shell of srun's.
        {"PMI_RANK": "0", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"},  # The place is an argument.
        {"RANK": "1", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"},
    ],
)
def test_one_launcher_alone_is_no_ambiguity(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _environment.launchers_around(1, 2) is None


# Variables of one launcher around another, or of a shell that exports some: what the error says. torchrun's own
# TORCHELASTIC_RUN_ID says that its one process is meant.
CONTRADICTIONS = [
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
     "SLURM_STEP_NUM_TASKS is 4.*OMPI_COMM_WORLD_SIZE is 1"),  # srun in a shell of mpirun's.
    ({"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
     "SLURM_STEP_NUM_TASKS is 4.*PMI_SIZE is 1"),
    ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
     "OMPI_COMM_WORLD_SIZE is 2.*HOROVOD_SIZE is 1"),
    ({"PMI_RANK": "0", "PMI_SIZE": "1", "JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "6"},
     "JSM_NAMESPACE_SIZE is 6.*PMI_SIZE is 1"),
    ({"RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_SIZE is 2.*WORLD_SIZE is 1"),
    ({"RANK": "0", "WORLD_SIZE": "1", "PALS_RANKID": "1"}, "PALS_RANKID is 1.*WORLD_SIZE is 1"),
    ({"WORLD_SIZE": "1", "FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE is 2.*WORLD_SIZE is 1"),
    # A rank without a size, which no process has that is alone.
    ({"PMIX_RANK": "1"}, "PMIX_RANK is 1"),
    ({"PALS_RANKID": "3"}, "PALS_RANKID is 3"),
    ({"ALPS_APP_PE": "3"}, "ALPS_APP_PE is 3"),
    ({"PMI_RANK": "2"}, "PMI_RANK is 2"),
    ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "four"}, "OMPI_COMM_WORLD_RANK is 2"),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "SLURM_PROCID is 3"),
    # Halves, and numbers that cannot be.
    ({"RANK": "3"}, "WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "3"}, "RANK is not set"),
    ({"RANK": "5", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, "WORLD_SIZE is not set"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "rank is 3; in a world of 2 it lies in 0 .. 1"),
    ({"OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_SIZE": "4"}, "rank is 4; in a world of 4"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE in the environment"),
    ({"RANK": "0.0", "WORLD_SIZE": "2"}, "RANK is '0.0' in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "2,2"}, "WORLD_SIZE is '2,2' in the environment"),
]


@pytest.mark.parametrize("variables, words", CONTRADICTIONS)
def test_contradictions_are_errors_and_no_process_takes_itself_for_all(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        syncbn.Worker()


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
        {"JOB_ID": "7", "SGE_TASK_ID": "3", "NSLOTS": "8"},
        {"PALS_RANKID": "0"},
    ],
)
def test_a_process_that_is_alone_by_all_variables_is_a_group_by_itself(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with syncbn.Worker() as worker:
        assert (worker.rank, worker.world_size, worker.all_reduce("sum", [2.0])[0]) == (0, 1, 2.0)


# ---- Where a master of a launch listens ----


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "192.0.2.7", "LOCAL_WORLD_SIZE": "4"},
        {"MASTER_ADDR": "192.0.2.7", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"MASTER_ADDR": "192.0.2.7", "SLURM_STEP_NUM_NODES": "1"},
        {"MASTER_ADDR": "192.0.2.7", "MPI_LOCALNRANKS": "4"},
        {"MASTER_ADDR": "192.0.2.7", "MV2_COMM_WORLD_LOCAL_SIZE": "4"},
        {"MASTER_ADDR": "192.0.2.7", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_STEP_NUM_NODES": "2"},
    ],
)
def test_on_one_host_the_loopback_interface_is_enough(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _meeting._address(4) == (None, 0)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_STEP_NUM_NODES": "1"},  # mpirun over two hosts, in a shell of srun's on one.
        {"LOCAL_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},  # An image's, and mpirun's.
        {"LOCAL_WORLD_SIZE": "8"},
        {"LOCAL_WORLD_SIZE": "many"},
        {"MPI_LOCALNRANKS": "2"},
    ],
)
def test_what_does_not_say_one_host_for_sure_is_several(monkeypatch, variables):
    """On loopback, workers of other hosts would not find the master."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not _environment.is_one_host(4)


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
        _master.make_certificate("two words", str(tmp_path / "cert"), str(tmp_path / "key"))
    with pytest.raises(syncbn.InvalidArgument, match=str(tmp_path / "no/key")):
        _master.make_certificate("127.0.0.1", str(tmp_path / "cert"), str(tmp_path / "no/key"))


# ---- torch.distributed ----

SCENARIOS = pathlib.Path(__file__).with_name("launch_scenarios.py")


@pytest.fixture(scope="module")
def passed(master, tmp_path_factory):
    """By rank, what that one of four processes has printed."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("scenarios")
    source = f"import runpy; runpy.run_path({str(SCENARIOS)!r}, run_name='__main__')"
    return [set(output.splitlines()) for output in processes.run(source, 4, folder, master.target, codes=[-9, 0, 0, 0])]


@pytest.mark.parametrize(
    "scenario",
    [
        "the_process_group_is_enough",
        "the_process_group_places_the_workers_of_a_master_that_is_named",
        "across_hosts_the_master_speaks_tls",
        "rank_0_keeps_the_master_until_the_others_have_left",
        "a_rank_0_that_does_not_come_is_named",
        "a_master_that_cannot_start_is_an_error_everywhere",
        "a_process_group_is_initialized_anew",
        "a_restart_of_the_launch_has_notes_of_its_own",
        "process_groups_of_a_part_of_the_processes",
    ],
)
def test_torch_distributed(passed, scenario):
    assert all(f"passed {scenario}" in lines for lines in passed)


def test_a_rank_0_that_dies_ends_the_others(passed):
    assert "passed a_rank_0_that_dies_ends_the_others" in passed[1]


def test_rank_0_does_not_wait_for_a_worker_that_has_ended(passed):
    assert "passed rank_0_does_not_wait_for_a_worker_that_has_ended" in passed[2]


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
import copy, faulthandler, os, pathlib, signal, sys
faulthandler.dump_traceback_later(1000, exit=True)  # Names the place of a hang, before the launcher's limit.
import torch, torch.distributed as dist
import syncbn.torch
torch.set_num_threads(1)
folder, target, steps, sizes = pathlib.Path(sys.argv[1]), sys.argv[2], 6, [1, 4, 2]
dist.init_process_group("gloo")
rank, killed = dist.get_rank(), folder / "killed"
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

# Rank 0 starts a master for the one, which ends with it; the other's outlives the restart.
workers = {"own": syncbn.torch.init_worker(), "named": syncbn.torch.init_worker("named", target)}
models = {
    name: syncbn.torch.convert_sync_batchnorm(copy.deepcopy(plain), worker) for name, worker in workers.items()
}
saved = folder / "checkpoint"
begun = 0
if saved.exists():
    begun, states = torch.load(saved)
    for name, model in models.items():
        model.load_state_dict(states[name])
parallel = [torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) for model in models.values()]
for number in range(begun, steps):
    if number == 3 and rank == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    for model in parallel:
        step(model, x[number].split(sizes)[rank], sum(sizes) / dist.get_world_size())
    if rank == 0 and number == 2:
        torch.save((number + 1, {name: model.state_dict() for name, model in models.items()}), saved)
    if number == 2:
        dist.barrier()
(folder / f"end {rank}").write_text(f"{begun} {workers['own'].run_id} {workers['named'].run_id}")
if rank == 0:
    torch.save({name: model.state_dict() for name, model in models.items()}, folder / "result")
dist.barrier()
"""


def test_the_variable_gives_each_restart_a_store_of_its_own(monkeypatch):
    """TORCH_DISABLE_SHARE_RDZV_TCP_STORE, which the README advises.

    Without it, torch 2.15's launcher keeps one store for all attempts, without a prefix for each: the processes of the second
    one find the keys of the first, and gloo and NCCL connect to addresses under them (pytorch#135712).
    """
    torch = pytest.importorskip("torch")
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launch = rendezvous.RendezvousParameters("c10d", "127.0.0.1:0", "restarts", 1, 1, local_addr="127.0.0.1", is_host=True)
    backend, store = c10d_rendezvous_backend.create_backend(launch)
    handler = dynamic_rendezvous.create_handler(store, backend, launch)
    try:
        for _ in range(2):
            place = handler.next_rendezvous()
            if isinstance(place, tuple):
                pytest.skip("this torch's launcher has no store for the workers")
            address = place.bootstrap_store_info
            workers_store = torch.distributed.TCPStore(address.master_addr, address.master_port, 1, True)
            assert not workers_store.check(["an address"])
            workers_store.set("an address", "of a process that ends with this attempt")
    finally:
        handler.shutdown()


@pytest.mark.parametrize("agents", [[3], [1, 2]], ids=["one_agent", "two_agents"])
def test_torchrun_restarts_after_a_worker_is_killed(tmp_path, master, agents):
    """Training goes on from the checkpoint, in a later generation, to the end of one process on the whole batches.

    With a master of rank 0's, and with one that is there before and afterwards. Of several agents, the one whose worker was
    killed counts the restart, and the others do not.

    Args:
      agents: the number of processes of each agent.
    """
    torch = pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(_ELASTIC)
    command = f"""
import subprocess, sys
agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint",
    "127.0.0.1:{processes.free_port()}", "--rdzv_id", {tmp_path.name!r}, "--nnodes", "{len(agents)}", "--nproc_per_node",
    str(count), "--max_restarts", "2", "--monitor_interval", "1", "--redirects", "1", "--tee", "1", {str(script)!r},
    {str(tmp_path)!r}, {master.target!r}]) for count in {agents}]
sys.exit(max([agent.wait() for agent in agents], key=abs))
"""
    # Else gloo may find addresses of processes that have ended; see the test before.
    processes.run(command, 1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    ends = {path.name: path.read_text().split() for path in tmp_path.glob("end *")}
    assert sorted(ends) == ["end 0", "end 1", "end 2"]
    assert {words[0] for words in ends.values()} == {"3"} and len(set(map(tuple, ends.values()))) == 1

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 7, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(4)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for batch in x:
        optimizer.zero_grad()
        (whole(batch).square().sum() / 7).backward()
        optimizer.step()
    results = torch.load(tmp_path / "result")
    assert sorted(results) == ["named", "own"]
    for result in results.values():
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10, msg=name)
