"""Runs the gallery's examples, each of which compares itself with one process on the whole batch."""

import pathlib
import re
import subprocess
import sys
from typing import Any, List

import pytest

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
sys.path[:0] = [str(HERE.parent / "tests"), str(EXAMPLES)]

import processes  # noqa: E402

LIMIT_SECONDS = 1200.0


class Examples:
    """Runs a script of client/examples. Returns: the relative differences that it has printed."""

    folder = EXAMPLES

    def __call__(self, script: str, *arguments: Any, launcher: List[str] = [], **variables: Any) -> List[float]:
        return self.run([sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)], **variables)

    def run(self, command: List[str], **variables: Any) -> List[float]:
        """Runs a command, such as a launcher of a script. Returns: as a script."""
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
            env=processes.environment(**variables),
        )
        print(done.stdout)
        assert done.returncode == 0, f"{command}: {done.returncode}"
        return [float(found) for found in re.findall(r" are (\S+) from one process on the whole batch", done.stdout)]

    def torchrun(self, script: str, *arguments: Any, workers: int = 2) -> List[float]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers)]
        return self(script, *arguments, launcher=launcher)


@pytest.fixture
def example() -> Examples:
    return Examples()
