"""The alerts for Prometheus: when they fire, and what they say."""

import pathlib
import shutil
import subprocess

import pytest

PROMTOOL = shutil.which("promtool")
PATIENCE = 600.0


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (tools/install_deps)")
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", "alerts_test.yml"], cwd=pathlib.Path(__file__).parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
