"""A master, workers and grpcurl as processes."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

MASTER = os.environ["SYNCBN_MASTER"]
GRPCURL = os.environ["SYNCBN_GRPCURL"]
# Bounds every wait of a test. Nothing takes this long unless it hangs.
PATIENCE = 60.0


class Master:
    """syncbn-master, ready when made. `inside`: a command that runs it elsewhere, such as `network.Host.inside`."""

    def __init__(
        self,
        *flags: str,
        address: str = "127.0.0.1:0",
        env: Optional[Dict[str, str]] = None,
        stderr: Any = None,
        inside: Sequence[str] = (),
    ) -> None:
        command = [*inside, MASTER, "--max-lifetime", "300", *(["--address", address] if address else []), *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(env or {})}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("syncbn-master ready on "), line
        self.targets = line.split()[3:]
        self.target = self.targets[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE)


class WorkerProcess:
    """worker_process.py, which runs one command at a time. `inside`: as for the master."""

    def __init__(self, target: str, rank: int, world_size: int, *, inside: Sequence[str] = (), **options: Any) -> None:
        arguments = json.dumps({"target": target, "rank": rank, "world_size": world_size, **options})
        script = pathlib.Path(__file__).with_name("worker_process.py")
        self.process = subprocess.Popen(
            [*inside, sys.executable, str(script), arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended with {self.process.wait(PATIENCE)}"
        return json.loads(line)


def grpcurl(target: str, *arguments: str, data: Any = None) -> str:
    """Returns the output of grpcurl. Fails the test if grpcurl fails."""
    command = [GRPCURL, "-plaintext", *(["-d", json.dumps(data)] if data is not None else []), target, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inspect(target: str, method: str, **request: Any) -> Dict[str, Any]:
    return json.loads(grpcurl(target, f"syncbn.v1.InspectionService/{method}", data=request))


def await_present(target: str, number: int) -> None:
    """Waits until the master's only group has so many workers that are connected."""
    end = time.monotonic() + PATIENCE
    while [group.get("present") for group in inspect(target, "ListGroups").get("groups", [])] != [number]:
        assert time.monotonic() < end, f"not {number} workers are connected"


def await_arrival(target: str, layer: str, ranks: List[int]) -> None:
    """Waits until the master holds the contributions of these ranks to a pending round of the layer."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for group in inspect(target, "ListGroups").get("groups", []):
            view = inspect(target, "GetGroup", job=group["job"], group=group["group"])
            for pending in view.get("pending", []):
                if pending["key"]["layer"] == layer and set(ranks) <= set(pending["arrived_ranks"]):
                    return
    raise AssertionError(f"ranks {ranks} have not contributed to {layer}")
