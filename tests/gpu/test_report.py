"""The targets and the tables on made-up timings."""

import json

import pytest

import report

MB = 1_000_000


def row(operation, us, size=60 * MB, copy_us=100.0, **fields):
    """A row of bench.py; of the large kind, alike to none of the targets against torch unless it is said to be."""
    common = {"shape": "1x7x1", "channels": 7, "layout": "NCHW", "type": "fp16", "cache": "cold", "rivals": {}}
    return {**common, "operation": operation, "us": us, "bytes": size, "copy_us": copy_us, **fields}


def cell(rows, operation, name):
    found = [c for c in report.evaluate(rows) if (c.target.operation, c.target.name) == (operation, name)]
    assert len(found) == 1, name
    return found[0]


def test_every_target_of_the_table_is_there_once():
    names = [(target.operation, target.name) for target in report.TARGETS]
    assert len(names) == len(set(names)) == 26
    assert all(c.verdict == "not measured" for c in report.evaluate([]))


@pytest.mark.parametrize(
    "operation, floor, bound",
    [("stats", 1, 0.92), ("elemt", 2, 0.93), ("backward_reduce", 2, 0.90), ("backward_elemt", 3, 0.92)],
)
def test_a_share_of_the_copy_counts_the_bytes_that_each_has_to_move(operation, floor, bound):
    # A copy moves two tensors in 100 us.
    exact = floor * 50.0 / bound
    name = "X >= 50 MB: of copy bandwidth"
    assert cell([row(operation, exact * 0.999)], operation, name).verdict == "met"
    missed = cell([row(operation, exact * 0.999), row(operation, exact * 1.001, shape="worse")], operation, name)
    assert missed.verdict == "MISSED by 1 of 2"
    assert missed.worst["shape"] == "worse"


def test_sizes_and_hot_rows_are_kept_apart():
    name = {True: "X >= 50 MB: of copy bandwidth", False: "13 to 50 MB: of copy bandwidth"}
    rows = [row("stats", 60.0, size) for size in (12 * MB, 12_845_056, 49 * MB, 50 * MB, 103 * MB)]
    rows.append(row("stats", 1.0, 103 * MB, cache="hot"))
    assert len(cell(rows, "stats", name[True]).values) == 2
    assert len(cell(rows, "stats", name[False]).values) == 2


@pytest.mark.parametrize(
    "operation, name, bound, fields",
    [
        ("stats", "torch, NCHW fp32 C=64", 10, {"channels": 64, "type": "fp32"}),
        ("stats", "torch, NCHW fp32 C=256", 4, {"channels": 256, "type": "fp32"}),
        ("stats", "torch, NCHW fp32 C<=4", 50, {"channels": 3, "type": "fp32"}),
        ("stats", "torch, NHWC bf16", 2.5, {"layout": "NHWC", "type": "bf16"}),
        ("elemt", "torch, NCHW fp32", 1.1, {"channels": 3, "type": "fp32"}),
        ("backward_reduce", "torch, NCHW fp32 C=256", 1.5, {"channels": 256, "type": "fp32"}),
        ("backward_elemt", "torch, NHWC fp32", 1.05, {"layout": "NHWC", "type": "fp32"}),
    ],
)
def test_torch_is_a_rival_where_the_table_names_it(operation, name, bound, fields):
    for factor, verdict in ((1.01, "met"), (0.99, "MISSED by 1 of 1")):
        rows = [row(operation, 10.0, rivals={"torch": 10.0 * bound * factor}, **fields)]
        assert cell(rows, operation, name).verdict == verdict
        others = [c for c in report.evaluate(rows) if c.target.name.startswith("torch") and c.values]
        assert [c.target.name for c in others] == [name]


def test_a_rival_that_did_not_run_is_not_measured():
    rows = [row("forward", 10.0, rivals={"torch": 5.0})]
    assert cell(rows, "forward", "cudnn, NCHW").verdict == "not measured"
    rows = [row("forward", 10.0, rivals={"cudnn": 16.0}), row("forward", 10.0, layout="NHWC", rivals={"cudnn": 10.0})]
    assert cell(rows, "forward", "cudnn, NCHW").verdict == "MISSED by 1 of 1"
    assert cell(rows, "forward", "cudnn, NHWC").verdict == "met"


def test_latency_has_an_upper_bound():
    flag = {"operation": "stats with flag", "us": 4.2, "bytes": 100, "rivals": {}, "shape": "s", "layout": "NCHW",
            "type": "fp32", "channels": 64, "cache": "hot"}
    found = cell([flag, {**flag, "us": 3.0}], "stats with flag", "8x64x7x7")
    assert found.verdict == "MISSED by 1 of 2" and found.worst["us"] == 4.2


def test_predictions_are_of_rows_that_are_measured():
    import re

    shapes = (report.PREDICTIONS.parent / "bench.py").read_text()
    for shape, layout, kind, operation in report.read_predictions():
        batch, channels, *extents = shape.split("x")
        inside = ", ".join(extents)
        assert f"({batch}, {channels}, ({inside}))" in shapes or operation == "stats with flag", shape
        assert layout in ("NCHW", "NHWC") and re.fullmatch("fp32|bf16", kind)
        assert operation in report.FLOOR or operation == "stats with flag"


def test_a_prediction_stands_beside_its_measurement():
    # Predicted: 86 to 95 % of the copy, which moves two tensors in 100 us.
    named = {"shape": "32x64x112x112", "layout": "NCHW", "type": "fp32"}
    text = report.prediction_table([row("stats", us, **named) for us in (50 / 0.9, 50 / 0.5)])
    assert "86%-95%" in text and text.count("as predicted") == 1 and text.count("worse") == 1
    hot = row("stats with flag", 4.0, cache="hot", shape="8x64x7x7", layout="NCHW", type="fp32")
    text = report.prediction_table([hot, row("stats", 1.0, shape="no such")])
    assert "6.5 us-7.0 us" in text and "better" in text and "no such" not in text


def test_layers_are_compared_with_those_that_synchronize_nothing():
    rows = [{"mode": "torch, alone", "peers": "none", "layers": 50, "ms": 5.0},
            {"mode": "host-driven", "peers": "3, without a GPU", "layers": 50, "ms": 15.0}]
    assert "200" in report.layer_table({"rows": rows})
    assert "15.00" in report.layer_table({"rows": rows[1:]})


def write_parts(folder):
    (folder / "stages.tsv").write_text(
        "kernels\tfailed\t3\texit 1\nworker\tskipped\t0\tno torch\nkernels\tpassed\t9\tall good\n"
    )
    rows = [row("stats", 54.0), row("copy", 100.0), row("forward", 9.0, cache="hot")]
    kernels = {"machine": "GPU: made up", "rows": rows,
               "notes": ["cuDNN does not run: made up"]}
    (folder / "kernels.json").write_text(json.dumps(kernels))
    phase = {"phase": "gap", "how": "launch", "median_us": 7.25, "p90_us": 8.0}
    (folder / "phases.json").write_text(json.dumps({"rows": [phase, {**phase, "uncertainty_us": 0.4}], "notes": []}))
    steps = [{"processes": 1, "shape": "8x64x7x7", "syncbn_ms": 0.5, "why": "alone"},
             {"processes": 2, "shape": "8x64x7x7", "syncbn_ms": 0.5, "torch_ms": 1.0}]
    (folder / "worker.json").write_text(json.dumps({"rows": steps, "notes": []}))
    training = {"steps": 60, "devices": "cuda:0,cpu", "differences": {"synchronized": {"last": {"parameters": 2e-14}}},
                "float32_first_step": {"outputs": 1e-7, "gradients": 2e-7, "bound": 3e-4}}
    (folder / "training.json").write_text(json.dumps(training))


def test_the_report_has_every_part(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    short = "\n".join(report.write(tmp_path))
    full = (tmp_path / "report.md").read_text()
    for text in (short, full):
        assert "all good" in text and "exit 1" not in text  # The last run of a stage counts.
        assert "1 targets met, 0 missed, 25 not measured" in text
        assert "92.6%" in text and "7.25" in text and "2.0e-14" in text and "2.00" in text and "alone" in text
        assert "cuDNN does not run: made up" in text and "broken.json cannot be read" in text
    assert "## Kernels" in full and "## Kernels" not in short
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["kernels"]["rows"][0]["us"] == 54.0
    assert [t["verdict"] for t in results["targets"]].count("met") == 1
    # Its own output is no input.
    assert report.write(tmp_path) == report.write(tmp_path)


def test_a_report_of_nothing(tmp_path):
    assert "26 not measured" in "\n".join(report.write(tmp_path))
    assert (tmp_path / "report.md").exists()


def test_a_rehearsal_judges_nothing(tmp_path):
    write_parts(tmp_path)
    short = "\n".join(report.write(tmp_path, rehearsal=True))
    assert "no time means anything" in short and "targets met" not in short and "92.6%" not in short
    assert json.loads((tmp_path / "results.json").read_text())["targets"] == []
