"""A Slurm of one node on this host, whose daemons live as long as the fixture: nothing of the host's is touched."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
from typing import Iterator, List

import processes

PROGRAMS = ["slurmctld", "slurmd", "srun", "sbatch", "scontrol"]
LIMIT_SECONDS = 300.0

_CONFIGURATION = """
ClusterName=syncbn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued job may start once the credentials of its first run have ended.
AuthInfo=cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=1
MpiDefault=pmi2
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE State=UP
"""


def missing() -> List[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Slurm:
    """A Slurm that runs. `variables`: with which its commands find it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def is_ready(self) -> bool:
        found = subprocess.run(
            ["sinfo", "--noheader", "--format", "%T"], env={**os.environ, **self.variables}, capture_output=True, text=True
        )
        return found.stdout.strip() == "idle"


@contextlib.contextmanager
def start(folder: pathlib.Path) -> Iterator[Slurm]:
    """Errors: AssertionError with the daemons' logs, where it does not come up."""
    slurm = Slurm(folder)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    configuration = _CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        controller=processes.free_port(),
        node=processes.free_port(),
        user=os.environ.get("USER") or "root",
        folder=folder,
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(configuration)
    logs = [folder / "slurmctld.log", folder / "slurmd.log"]
    daemons = [
        subprocess.Popen(
            [log.stem, "-D", "-f", str(folder / "slurm.conf")],
            stdout=open(log, "w"),
            stderr=subprocess.STDOUT,
            env=processes.environment(**slurm.variables),
        )
        for log in logs
    ]
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not slurm.is_ready():
            alive = all(daemon.poll() is None for daemon in daemons)
            assert alive and time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
            time.sleep(0.1)  # Slurm has no command that waits for a node.
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
