"""tools/gpu_check itself: what it says without a GPU, and how it takes passing, failing, skipping and hanging parts."""

import os
import pathlib
import shutil

import pytest
from conftest import ROOT, run

PARTS = ("kernels", "sanitizer", "worker", "training", "benchmarks")


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """The script with what it needs for itself, and no programs."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/gpu_check", tmp_path / "tools")
    (tmp_path / "tests/gpu").mkdir(parents=True)
    shutil.copy(ROOT / "tests/gpu/report.py", tmp_path / "tests/gpu")
    for folder in ("kernels", "client/cc", "client/c", "server", "proto", "tests/kernels/cuda", "tests/testing"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.h").touch()
    return tmp_path


def check(tree: pathlib.Path, *arguments: str, **environment: str):
    clean = {name: value for name, value in os.environ.items() if name not in ("SYNCBN_LIBRARY", "OUT", "PYTHONPATH")}
    return run(tree / "tools/gpu_check", *arguments, cwd=tree, env={**clean, **environment})


def play(tree: pathlib.Path, name: str, script: str) -> None:
    program = tree / "build/gpu_check" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


def outcomes(tree: pathlib.Path, folder: str = "gpu_rehearsal"):
    """What each part came to, and why: of a rehearsal, or of another folder."""
    lines = [line.split("\t") for line in (tree / "build" / folder / "stages.tsv").read_text().splitlines()]
    return {line[0]: (line[1], line[3]) for line in lines}


def test_without_a_gpu_every_stage_is_skipped_with_its_reason(tree):
    if pathlib.Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU")
    done = check(tree, *PARTS, OUT=str(tree / "out"))
    assert done.returncode == 0, done.stdout
    assert outcomes(tree, "gpu_results") == {part: ("skipped", "no NVIDIA GPU") for part in PARTS}
    assert "26 not measured" in done.stdout
    assert sorted(path.name for path in (tree / "out").iterdir()) == ["report.md", "results.json"]


def test_what_is_not_prepared_is_said(tree):
    done = check(tree, "--on-host", "kernels", "worker", "benchmarks", SYNCBN_PYTHON="/none", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stdout
    found = outcomes(tree)
    assert found["kernels"][0] == "skipped" and "gpu_check --prepare" in found["kernels"][1]
    assert found["worker"][0] == found["benchmarks phases"][0] == "skipped"


def test_no_torch_is_a_reason(tree):
    play(tree, "round_phases_on_host", "echo done")
    (tree / "bin").mkdir()
    for name in ("python3", "nvidia-smi"):
        (tree / "bin" / name).write_text("#!/bin/bash\necho No module named torch >&2\nexit 1\n")
        (tree / "bin" / name).chmod(0o755)
    script = tree / "tools/gpu_check"
    script.write_text(script.read_text().replace("/usr/bin/python3", "/nonexistent/python3"))
    path = f"{tree / 'bin'}:/usr/bin:/bin"
    done = check(tree, "--on-host", "worker", "benchmarks", PATH=path, SYNCBN_PYTHON="python3")
    assert outcomes(tree)["worker"] == outcomes(tree)["benchmarks"]
    assert outcomes(tree)["worker"][0] == "skipped" and "no python3 with torch" in outcomes(tree)["worker"][1]
    assert outcomes(tree)["benchmarks phases"] == ("passed", "done")
    assert "report" not in outcomes(tree), done.stdout


@pytest.mark.parametrize(
    "script, outcome, text, code",
    [
        ("echo 12 passed", "passed", "12 passed", 0),
        ("echo skipped: no such thing", "skipped", "no such thing", 0),
        ("echo 3 differ; exit 4", "failed", "exit 4; see log.txt: 3 differ", 1),
        ("kill -SEGV $$", "failed", "exit 139", 1),
        ("sleep 100", "failed", "not finished after ", 1),  # The rest of the 6 s.
    ],
)
def test_outcomes(tree, script, outcome, text, code):
    play(tree, "kernels_check_on_host", script)
    done = check(tree, "--on-host", "--seconds", "6", "kernels")
    assert done.returncode == code, done.stdout
    assert outcomes(tree)["kernels"][0] == outcome and text in outcomes(tree)["kernels"][1]
    assert f"gpu_check: {code} failed" in done.stdout


def test_a_stage_that_runs_again_replaces_what_it_said(tree):
    play(tree, "kernels_check_on_host", "echo wrong; exit 1")
    assert check(tree, "--on-host", "kernels").returncode == 1
    play(tree, "kernels_check_on_host", "echo right")
    done = check(tree, "--on-host", "kernels")
    assert done.returncode == 0 and "right" in done.stdout and "wrong" not in done.stdout
    assert outcomes(tree) == {"kernels": ("passed", "right")}


def test_when_the_time_is_up_the_rest_is_left_out(tree):
    play(tree, "kernels_check_on_host", "echo right")
    done = check(tree, "--on-host", "--seconds", "3", "kernels")
    assert done.returncode == 0 and outcomes(tree)["kernels"] == ("skipped", "no time was left"), done.stdout


def test_a_sanitizer_that_does_not_run_here_fails_nothing(tree):
    play(tree, "kernels_check_on_host", "echo right")
    (tree / "bin").mkdir()
    sanitizer = tree / "bin/compute-sanitizer"
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    for script, outcome in (
        ("echo Device not supported; exit 1", {"sanitizer": "skipped"}),
        ("echo 1 error; exit 9", {"sanitizer": "failed"}),
        ('if [[ "$*" == *--probe* || "$*" == *memcheck* ]]; then echo ok; exit; fi; echo 1 error; exit 9',
         {"sanitizer memcheck": "passed", "sanitizer racecheck": "failed", "sanitizer initcheck": "failed"}),
    ):
        sanitizer.write_text(f"#!/bin/bash\n{script}\n")
        sanitizer.chmod(0o755)
        done = check(tree, "--on-host", "sanitizer", PATH=path)
        assert {name: found[0] for name, found in outcomes(tree).items()} == outcome, done.stdout
        assert done.returncode == int("failed" in outcome.values())


def test_an_unknown_word_shows_the_usage(tree):
    done = check(tree, "kernel")
    assert done.returncode == 2 and "tools/gpu_check --prepare" in done.stdout and "log.txt" in done.stdout
