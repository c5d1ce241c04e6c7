"""tools/gpu_check itself: what it says without a GPU, and how it takes passing, failing, skipping and hanging parts."""

import os
import pathlib
import shutil

import pytest
from conftest import ROOT, run

PARTS = ("kernels", "worker", "training", "layers", "benchmarks", "variants", "profile", "sanitizer")


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """The script with what it needs for itself, and no programs."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/gpu_check", tmp_path / "tools")
    (tmp_path / "tests/gpu").mkdir(parents=True)
    for name in ("report.py", "predictions.json"):
        shutil.copy(ROOT / "tests/gpu" / name, tmp_path / "tests/gpu")
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
    """Returns the end that each part came to, and its reason: those of a rehearsal, or of another folder."""
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
    for words in (("kernel",), ("--call", "3"), ("--call",)):
        done = check(tree, *words)
        assert done.returncode == 2 and "tools/gpu_check --prepare" in done.stdout and "log.txt" in done.stdout
        assert "set -euo" not in done.stdout


def test_two_calls_have_one_report_and_the_sanitizer_comes_last(tree):
    play(tree, "kernels_check_on_host", "echo right")
    environment = {"SYNCBN_PYTHON": "/none", "PATH": "/usr/bin:/bin"}
    first = check(tree, "--on-host", "--call", "1", **environment)  # Its first stage has no sources here.
    assert outcomes(tree)["kernels"] == ("passed", "right")
    assert not {"benchmarks phases", "sanitizer"} & set(outcomes(tree))
    second = check(tree, "--on-host", "--call", "2", **environment)
    assert second.returncode == 0, second.stdout
    assert outcomes(tree)["kernels"] == ("passed", "right") and "right" in second.stdout
    ran = [line[3:] for line in (first.stdout + second.stdout).splitlines() if line.startswith("== ")]
    stages = [name for name in ran if name in PARTS]
    assert stages == list(PARTS)
    again = check(tree, "--on-host", "--call", "1", **environment)
    assert "== kernels" in again.stdout and "benchmarks phases" not in outcomes(tree)  # It begins anew.


def test_every_library_of_other_choices_is_timed_once(tree):
    (tree / "build/gpu_check/variants").mkdir(parents=True)
    for name in ("default", "other", "broken"):
        (tree / f"build/gpu_check/variants/{name}.so").touch()
    (tree / "tests/gpu/bench.py").write_text(
        "import json, sys\n"
        "if 'broken' in sys.argv[1]: sys.exit('no such kernel')\n"
        "row = {'shape': '1', 'layout': 'NCHW', 'type': 'fp32', 'operation': 'stats',\n"
        "       'us': 10.0 if 'default' in sys.argv[1] else 8.0}\n"
        "json.dump({'rows': [row], 'notes': []}, open(sys.argv[2], 'w'))\n"
        "print('timed')\n"
    )
    (tree / "bin").mkdir()
    (tree / "bin/python").write_text('#!/bin/bash\n[[ "$1" == -c ]] || exec python3 "$@"\n')  # Has torch, it says.
    (tree / "bin/python").chmod(0o755)
    done = check(tree, "--on-host", "variants", SYNCBN_PYTHON=str(tree / "bin/python"))
    assert done.returncode == 1, done.stdout
    found = {name: outcome for name, (outcome, _) in outcomes(tree).items()}
    assert found == {"variants sources": "warning", "variants default": "passed", "variants other": "passed",
                     "variants broken": "failed"}
    report = (tree / "build/gpu_rehearsal/report.md").read_text()
    assert "0.80" in report and "other" in report


def test_a_profiler_that_may_not_look_fails_nothing(tree):
    play(tree, "libsyncbn_bench_on_host.so", "")
    (tree / "bin").mkdir()
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    (tree / "bin/python").write_text("#!/bin/bash\n")
    (tree / "bin/python").chmod(0o755)
    for script, outcome in (
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", ("skipped", "ncu: exit 1: ==ERROR== ERR_NVGPUCTRPERM")),
        ('while [[ "$1" != --log-file ]]; do shift; done; echo StatsKernel > "$2"',
         ("passed", "1 lines in profile.csv")),
    ):
        (tree / "bin/ncu").write_text(f"#!/bin/bash\n{script}\n")
        (tree / "bin/ncu").chmod(0o755)
        done = check(tree, "--on-host", "profile", PATH=path, SYNCBN_PYTHON=str(tree / "bin/python"),
                     OUT=str(tree / "out"))
        assert done.returncode == 0 and outcomes(tree)["profile"] == outcome, done.stdout
    assert (tree / "out/profile.csv").read_text() == "StatsKernel\n"
