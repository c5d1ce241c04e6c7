"""bench.py, worker_check.py and round_phases where the host plays the GPU: they run, and write what report.py reads."""

import json
import sys

import pytest
from conftest import ROOT, run

import report

pytest.importorskip("torch")


def test_the_benchmarks_write_every_row(built, tmp_path):
    done = run(sys.executable, ROOT / "tests/gpu/bench.py", built / "libsyncbn_bench_on_host.so",
               tmp_path / "kernels.json", "--quick", "--on-host")
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    # Two shapes, three types, two layouts: a copy, four operations, two passes, cold and hot; in two types three
    # operations with a residual or its mask; and the small statistics.
    assert len(rows) == 2 * 3 * 2 * (1 + 4 + 2 + 2) + 2 * 2 * 2 * 3 + 1
    for row in rows:
        assert row["us"] > 0, row
        rivals = {"copy": set(), "elemt, residual": set(), "backward_reduce, mask": set(),
                  "backward_elemt, residual": set(), "forward": {"torch", "cudnn"}, "backward": {"torch", "cudnn"}}
        assert rivals.get(row["operation"], {"torch"}) <= set(row["rivals"]) <= {"torch", "cudnn", "compile"}, row
    assert "stats with flag" in report.kernel_table(rows)
    assert report.evaluate(rows)[-1].values


def test_libraries_are_compared_on_few_shapes(built, tmp_path):
    for what, count in (("sweep", 8 * 4), ("once", 2)):
        done = run(sys.executable, ROOT / "tests/gpu/bench.py", built / "libsyncbn_bench_on_host.so",
                   tmp_path / "kernels.json", "--what", what, "--on-host")
        assert done.returncode == 0, done.stdout
        rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
        assert len(rows) == count
        if what == "sweep":
            assert "1.00" in report.variant_table({"default": {"rows": rows}, "same": {"rows": rows}})


def test_the_layers_of_a_network_in_each_mode(tmp_path):
    sys.path.insert(0, str(ROOT / "client/python"))
    import network_bench

    layers = network_bench.resnet50()
    assert len(layers) == 53 and layers[0] == (64, 112) and layers[-1] == (2048, 7)
    assert sum(channels * height * height for channels, height in layers) == 11113984
    done = run(sys.executable, ROOT / "tests/gpu/network_bench.py", tmp_path / "layers.json", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert [(row["mode"], row["peers"]) for row in rows] == [
        ("torch, alone", "none"), ("host-driven", "none"), ("host-driven", "3, without a GPU"),
        ("stream-ordered", "none"), ("stream-ordered", "3, without a GPU"),
    ]
    assert all(row["ms"] > 0 for row in rows)


def test_the_benchmarks_stop_when_there_is_no_time(built, tmp_path):
    done = run(sys.executable, ROOT / "tests/gpu/bench.py", built / "libsyncbn_bench_on_host.so",
               tmp_path / "kernels.json", "--on-host", "--seconds", "0")
    assert done.returncode == 0, done.stdout
    assert "kernels: no time for the last 27 of 27" in done.stdout


def test_the_benchmarks_fail_with_a_library_that_fails(built, tmp_path):
    """The library that needs a GPU, here: its calls give errors, and these are not taken for times."""
    done = run(sys.executable, ROOT / "tests/gpu/bench.py", built / "libsyncbn_bench.so", tmp_path / "kernels.json",
               "--quick", "--on-host")
    assert done.returncode == 1, done.stdout
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == []


def test_without_a_gpu_the_scripts_say_so(built, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in (["bench.py", "none.so", tmp_path / "a.json"], ["worker_check.py", "check"]):
        done = run(sys.executable, ROOT / "tests/gpu" / command[0], *command[1:])
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("skipped: "), done.stdout


def test_the_worker_checks_on_the_cpu():
    done = run(sys.executable, ROOT / "tests/gpu/worker_check.py", "check", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped ")]
    assert skipped and all(line.endswith(": it needs a GPU") for line in skipped), done.stdout
    assert done.stdout.count("passed check_") + len(skipped) >= 11
    assert "passed check_training" in done.stdout


def test_the_worker_is_timed_beside_gloo(tmp_path):
    done = run(sys.executable, ROOT / "tests/gpu/worker_check.py", "bench", tmp_path / "worker.json", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "worker.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2, 4]
    assert all(row["syncbn_ms"] > 0 for row in rows) and all(row["torch_ms"] > 0 for row in rows[1:]), rows
    assert "one process exchanges nothing" in report.step_table({"rows": rows})


def test_a_process_that_dies_is_not_waited_for():
    script = ("import os, sys, worker_check\n"
              "def die(rank, queue):\n"
              "    os._exit(3)\n"
              "if __name__ == '__main__':\n"
              "    worker_check.run_processes(die, (), 2)\n")
    path = ROOT / "build" / "die_check.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests/gpu')!r})\n{script}")
    try:
        done = run(sys.executable, path)
    finally:
        path.unlink()
    assert "exit codes [3" in done.stdout, done.stdout


def test_the_phases_of_a_round(built, tmp_path):
    done = run(built / "round_phases_on_host", tmp_path / "phases.json", "--quick")
    assert done.returncode == 0, done.stdout
    phases = json.loads((tmp_path / "phases.json").read_text())
    names = [row["phase"] for row in phases["rows"]]
    assert names == ["kernel's end to host", "host to next kernel's start", "gap between the kernels"] * 3 + [
        "statistics' launch to host"
    ]
    assert all(row["median_us"] > 0 for row in phases["rows"] if "gap" in row["phase"])
    assert "stream waits for a value" in report.phase_table(phases)
