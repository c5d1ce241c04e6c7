"""The programs and scripts for a GPU, run without one: what the host can play of it."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gpu"))


@pytest.fixture
def built() -> pathlib.Path:
    """The folder in which Bazel leaves the programs of this one."""
    folder = ROOT / "bazel-bin/tests/gpu"
    if not (folder / "libsyncbn_bench_on_host.so").exists():
        pytest.skip("bazel build //tests/gpu:all has not run")
    return folder


def run(*command: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Output and errors together; the limit is for what hangs."""
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        **{"cwd": ROOT, "env": os.environ, **options},
    )
