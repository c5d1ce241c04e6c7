"""Under torch.distributed.run: torch's own cases for SyncBatchNorm, and a script without any configuration."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import uuid

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync

import ddp_cases

TESTS = pathlib.Path(__file__).resolve().parent
EXAMPLE = TESTS.parents[1] / "examples/torchrun/train.py"
WORLD = 4

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(processes, script, *arguments, launch=None, **environment):
    """Returns its output and code. Processes that it leaves running after a failure are ended."""
    # --standalone has a port of its own only in later versions: in torch 1.13 it is always 29400.
    launch = launch or ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", str(uuid.uuid4())]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "--nproc_per_node", str(processes)]
    # The default of these is broken in torch 1.13 under Python 3.11.
    command += ["--redirects", "1", "--tee", "1", str(script), *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_TARGET")}
    package = str(pathlib.Path(syncbn.__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [variables.get("PYTHONPATH")])])
    variables.update(environment, OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=400)
        return output, process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns the outcome of each case, by rank."""
    folder = tmp_path_factory.mktemp("ddp")
    output, code = torchrun(WORLD, TESTS / "ddp_cases.py", folder)
    assert code == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(ddp_cases.CASES))
def test_torchs_distributed_case(outcomes, name):
    failures = [f"rank {rank}:\n{outcome[name]}" for rank, outcome in enumerate(outcomes) if outcome[name]]
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
@pytest.mark.parametrize("who", ["rank 0", "SYNCBN_TARGET"])
def test_a_script_under_torchrun(master, who):
    output, code = torchrun(2, EXAMPLE, "--steps", 5, **({"SYNCBN_TARGET": master.target} if who != "rank 0" else {}))
    assert code == 0, output
    found = re.search(r"master of (.*): 5 steps end (\S+) from", output)
    assert found and found[1] == who and float(found[2]) < 1e-12, output


_PLAIN = """
import os, sys, torch, syncbn, syncbn.torch
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if rank == 0 and sys.argv[1] == "rank 0":
    master = syncbn.Master(os.environ["SYNCBN_TARGET"])
x = torch.arange(2.0 * world, dtype=torch.float64).reshape(world, 2).exp()
model = syncbn.torch.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(2, dtype=torch.float64)))
y = model(x[rank : rank + 1])
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True)[rank : rank + 1])
syncbn.default_worker().leave()
if rank == 0 and sys.argv[1] == "rank 0":
    master.shutdown(grace=10.0)
"""


@pytest.mark.parametrize("who", ["rank 0", "another process"])
def test_a_converted_model_and_one_variable_are_enough(master, tmp_path, who):
    """No worker is made, and torch.distributed is not used."""
    script = tmp_path / "plain.py"
    script.write_text(_PLAIN)
    target = f"unix:{tmp_path}/master" if who == "rank 0" else master.target
    output, code = torchrun(2, script, who, SYNCBN_TARGET=target)
    assert code == 0, output


_FAILS = """
import sys, torch.distributed, syncbn.torch
torch.distributed.init_process_group("gloo")
with syncbn.torch.join(timeout=600.0) as worker:
    worker.wait_for_members()
    if worker.rank == 1:
        raise SystemExit("rank 1 gives up")
    worker.all_reduce("sum", [1.0])
"""


def test_a_worker_that_fails_under_torchrun_holds_nobody_up(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(_FAILS)
    output, code = torchrun(2, script)
    assert code != 0 and "rank 1 gives up" in output


def test_join_without_a_launcher_says_what_it_needs(monkeypatch):
    for name in ("SYNCBN_TARGET", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK"):
        sync.join().__enter__()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="SYNCBN_TARGET.*MASTER_ADDR and MASTER_PORT"):
        sync.join().__enter__()


def test_join_over_several_hosts_needs_a_store(monkeypatch):
    for name in ("SYNCBN_TARGET", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="SYNCBN_TARGET.*MASTER_ADDR"):
        sync.join().__enter__()


def test_join_with_a_target_is_a_worker(master):
    with sync.join("joined", master.target, rank=0, world_size=1) as worker:
        assert worker.all_reduce("sum", [2.0])[0] == 2.0


_BOTH = """
import os, sys, syncbn
with syncbn.Worker() as worker:
    worker.wait_for_members(300)
    for step in range(20):
        assert worker.all_reduce("sum", [float(sys.argv[1])])[0] == 2 * float(sys.argv[1])
    print("job", worker.job, flush=True)
"""


def test_two_launches_without_an_id_share_a_master(master, tmp_path):
    """torchrun gives both the run id "none"."""
    script = tmp_path / "both.py"
    script.write_text(_BOTH)

    def launch(number):
        options = ["--nnodes", "1", "--master_addr", "127.0.0.1", "--master_port", free_port()]
        return torchrun(2, script, number, launch=map(str, options), SYNCBN_TARGET=master.target)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(launch, [1, 2]))
    for output, code in outcomes:
        assert code == 0, output
    first, second = (set(re.findall(r"job (\S+)", output)) for output, _ in outcomes)
    assert len(first) == len(second) == 1 and first != second


def test_join_before_a_process_group_says_so_at_once(monkeypatch):
    monkeypatch.delenv("SYNCBN_TARGET", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(syncbn.FailedPrecondition, match="init_process_group first.*SYNCBN_TARGET"):
        sync.join(join_timeout=100000.0).__enter__()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK is 'one'"):
        sync.join().__enter__()
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="RANK is not set.*init_process_group"):
        sync.join().__enter__()


def test_join_of_a_world_of_one_needs_no_store(monkeypatch):
    monkeypatch.delenv("SYNCBN_TARGET", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with sync.join() as worker:
        assert worker.all_reduce("sum", [2.0])[0] == 2.0


_SPAWNED = """
import os, sys, torch.distributed, torch.multiprocessing, syncbn.torch

def train(rank, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with syncbn.torch.join() as worker:
        assert worker.all_reduce("sum", [rank + 1.0])[0] == 3.0

if __name__ == "__main__":
    torch.multiprocessing.start_processes(train, (sys.argv[1],), 2, start_method=sys.argv[2])
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_join_in_processes_that_torch_starts(tmp_path, method):
    """The process group knows rank and world size, where the environment does not."""
    script = tmp_path / "spawned.py"
    script.write_text(_SPAWNED)
    package = str(pathlib.Path(syncbn.__file__).parents[1])
    variables = dict(os.environ, PYTHONPATH=os.pathsep.join([package, *sys.path]), OMP_NUM_THREADS="1")
    for name in ("RANK", "WORLD_SIZE", "SYNCBN_TARGET"):
        variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), str(free_port()), method], env=variables, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
