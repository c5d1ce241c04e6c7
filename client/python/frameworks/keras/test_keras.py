"""syncbn.keras on each of its backends, which a process can have one of, and syncbn.tensorflow."""

import pathlib
import subprocess
import sys

import processes
import pytest

BOUND = 1e-5
LIMIT_SECONDS = 1200.0


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_two_workers_are_as_one_process_on_the_whole_batch(backend):
    variables = {"KERAS_BACKEND": backend, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("scenario.py"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        env=processes.environment(**variables),
    )
    print(done.stdout)
    assert done.returncode == 0
    assert f"passed on {backend}" in done.stdout


def test_the_example(example):
    (difference,) = example("keras/train.py")
    assert difference < BOUND
