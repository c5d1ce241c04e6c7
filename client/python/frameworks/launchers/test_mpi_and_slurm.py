"""MPI's launchers and Slurm, as Debian has them: openmpi-bin, mpich; slurmctld, slurmd, slurm-client."""

import ctypes.util
import os
import pathlib
import shutil
import sys
import sysconfig
import time

import pytest

import slurm as slurm_cluster
import syncbn

BOUND = 1e-9


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = slurm_cluster.missing()
    if missing:
        pytest.skip(f"Slurm is not installed: there is no {missing[0]}")
    with slurm_cluster.start(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.mark.parametrize("workers", [2, 3])
def test_open_mpi(example, workers):
    if shutil.which("mpirun.openmpi") is None:
        pytest.skip("Open MPI is not installed: there is no mpirun.openmpi")
    # Two cores are enough, and a container has no other user than root.
    launcher = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", str(workers)]
    (difference,) = example.run([*launcher, sys.executable, str(example.folder / "mpi/train.py")])
    assert difference < BOUND


@pytest.mark.parametrize("workers", [2, 3])
def test_mpich(example, tmp_path, workers):
    library = ctypes.util.find_library("mpich")
    if library is None or shutil.which("mpirun.mpich") is None:
        pytest.skip("MPICH is not installed: there is no mpirun.mpich")
    # mpi4py's wheel looks for MPICH's library by the name that it has everywhere but in Debian.
    os.symlink(pathlib.Path("/usr/lib", sysconfig.get_config_var("MULTIARCH"), library), tmp_path / "libmpi.so.12")
    command = ["mpirun.mpich", "-n", str(workers), sys.executable, str(example.folder / "mpi/train.py")]
    (difference,) = example.run(command, MPI4PY_MPIABI="mpich", LD_LIBRARY_PATH=tmp_path)
    assert difference < BOUND


def test_srun(example, slurm):
    command = ["srun", "--ntasks", "2", sys.executable, str(example.folder / "slurm/train.py")]
    (difference,) = example.run(command, **slurm.variables)
    assert difference < BOUND


_REQUEUED = """
import os, pathlib, subprocess, sys
import syncbn

folder = pathlib.Path(sys.argv[1])
restart = os.environ.get("SLURM_RESTART_COUNT")
with syncbn.Worker() as worker:
    worker.all_reduce("first", [1.0])
    if restart is None:
        if worker.rank == 0:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        while True:
            worker.all_reduce("endless", [1.0])  # Until Slurm ends it.
    total = worker.all_reduce("second", [worker.rank + 1.0])[0]
    part = folder / f"rank {worker.rank}.part"
    part.write_text(f"{total} {restart} {worker.run_id}")
    part.rename(folder / f"rank {worker.rank}")
"""


def test_a_requeued_job_takes_its_place_again(example, slurm, tmp_path):
    """One master for both lives of the job: the second, under the same job id, ends what is left of the first."""
    script = tmp_path / "job.py"
    script.write_text(_REQUEUED)
    with syncbn.Master() as master:
        batch = f"#!/bin/bash\nexec srun {sys.executable} {script} {tmp_path}\n"
        (tmp_path / "job.sh").write_text(batch)
        options = ["--requeue", "--ntasks", "2", "--open-mode", "append", "--output", str(tmp_path / "log")]
        command = ["sbatch", *options, str(tmp_path / "job.sh")]
        example.run(command, SYNCBN_TARGET=master.target, **slurm.variables)
        results = [tmp_path / f"rank {rank}" for rank in range(2)]
        deadline = time.monotonic() + 300
        while not all(result.exists() for result in results):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)  # Slurm's own commands ask again and again too.
    first, second = (result.read_text().split() for result in results)
    assert first == second and first[:2] == ["3.0", "1"]
