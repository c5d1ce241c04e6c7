"""The examples, shortened. They need the master's binary: $SYNCBN_MASTER."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    not os.path.exists(os.environ.get("SYNCBN_MASTER", "")), reason="SYNCBN_MASTER does not name the master's binary"
)


def run(script, *options):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, options)], capture_output=True, text=True, timeout=700
    )


@pytest.mark.parametrize("front", ["torch", "numpy"])
def test_quickstart(tmp_path, front):
    done = run(
        "quickstart/quickstart.py",
        "--front",
        front,
        "--steps",
        "5",
        "--json",
        str(tmp_path / "out.json"),
        "--plot",
        str(tmp_path / "p.png"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    for when in ("first", "last"):
        for quantity in ("outputs", "gradients", "statistics", "parameters"):
            assert summary["differences"]["synchronized"][when][quantity] < 1e-12
            assert summary["differences"]["unsynchronized"][when][quantity] > 1e-5
    single = summary["float32_first_step"]
    assert 0 < max(single["outputs"], single["gradients"]) < single["bound"]
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "client/python/README.md" in done.stdout


def test_a_quickstart_of_a_wheel_names_no_file_of_the_source_tree_and_goes_without_a_picture(tmp_path):
    for folder in ("quickstart", "data"):
        shutil.copytree(EXAMPLES / folder, tmp_path / "_examples" / folder)
    options = ("--front", "numpy", "--steps", "5", "--plot", "/proc/folder/p.png")
    done = run(tmp_path / "_examples/quickstart/quickstart.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "help(syncbn.numpy)" in done.stdout
    assert "No loss curves: /proc/folder/p.png cannot be written" in done.stdout.replace("\n", " ")
    assert not re.search(r"client/|tools/", done.stdout)


def test_an_interrupted_quickstart_stops_what_it_started(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            str(EXAMPLES / "quickstart/quickstart.py"),
            "--steps",
            "100000",
            "--plot",
            str(tmp_path / "p"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().startswith("Master on ")
        process.send_signal(signal.SIGTERM)
        # The pipe ends only when every process that inherited it has ended.
        assert "interrupted" in process.communicate(timeout=120)[0]
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()


def test_heterogeneous():
    done = run("heterogeneous/heterogeneous.py", "--steps", "5")
    assert done.returncode == 0, done.stdout + done.stderr


def test_resnet18():
    done = run("resnet18/compare.py", "--steps", "1", "--batch", "4", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_digits():
    sys.path.insert(0, str(EXAMPLES / "data"))
    import digits

    data = digits.load()
    assert data.images.shape == (1437, 64) and data.test_images.shape == (360, 64)
    assert data.images.min() == 0.0 and data.images.max() == 1.0
    assert set(data.labels) == set(data.test_labels) == set(range(10))
    batches = digits.batches(1437, 16, 200)
    assert batches.shape == (200, 16) and sorted(batches.reshape(-1)[:1437]) == list(range(1437))
