"""Worker.stats, the summary in the log, and what a notebook shows of a worker."""

import logging
import math
import threading
import time

import numpy as np
import pytest

import syncbn
import syncbn.numpy
from syncbn import _stats


def test_rounds_are_counted_by_layer(group):
    def run(worker):
        x = np.arange(12.0).reshape(4, 3) * (worker.rank + 1)
        for _ in range(3):
            _, state = syncbn.numpy.forward(worker, "normalized", x)
            state.backward(x**2)
        worker.synchronize("moments", 1, [1.0], [0.0])
        started = worker.start_all_reduce("sum", [1.0])
        while not started.wait(0.01):
            pass
        started.result()
        return worker.stats()

    for stats in group(2, run):
        assert {name: layer.rounds for name, layer in stats.layers.items()} == {"normalized": 6, "moments": 1, "sum": 1}
        assert (stats.rounds, stats.failed, stats.missing) == (8, 0, {})
        assert 0 < stats.p50 <= stats.p99 and stats.seconds_waited > 0
        waits = [layer.seconds_waited for layer in stats.layers.values()]
        assert waits == sorted(waits, reverse=True) and math.isclose(sum(waits), stats.seconds_waited, rel_tol=1e-9)


def test_the_time_that_a_late_worker_costs_the_others(group):
    late = threading.Event()
    waited = []

    def run(worker):
        if worker.rank == 0:
            started = worker.start_all_reduce("sum", [1.0])
            worker.flush()
            begun = time.monotonic()
            while not started.wait(0.05):  # At least one slice goes by before the other one comes.
                late.set()
            waited.append(time.monotonic() - begun)
        else:
            late.wait(120)
            worker.all_reduce("sum", [1.0])
        return worker.stats()

    stats = group(2, run)[0]
    assert 0.05 <= stats.layers["sum"].seconds_waited <= waited[0]
    assert stats.p50 == stats.p99 == pytest.approx(stats.seconds_waited, rel=0.05)


def test_rounds_that_fail_or_lack_a_rank_name_it(master):
    with syncbn.Worker(master.target, "fails", 0, 3, timeout=0.2) as worker:
        with pytest.raises(syncbn.DeadlineExceeded):
            worker.all_reduce("sum", [1.0])
        stats = worker.stats()
        assert (stats.rounds, stats.failed, stats.missing) == (1, 1, {1: 1, 2: 1})
    with syncbn.Worker(master.target, "proceeds", 0, 2, timeout=0.2, min_workers=1) as worker:
        worker.all_reduce("sum", [1.0])
        worker.synchronize("layer", 1, [1.0], [0.0])
        stats = worker.stats()
        assert (stats.rounds, stats.failed, stats.missing) == (2, 0, {1: 2})
        assert "missing: rank 1 in 2 rounds" in str(stats)


@pytest.mark.parametrize("sharing, transport", [("", "shared memory"), ("off", "gRPC")])
def test_the_way_to_the_master_is_told(master, monkeypatch, sharing, transport):
    monkeypatch.setenv("SYNCBN_SHARED_MEMORY", sharing)
    with syncbn.Worker(master.target, f"told {sharing}", 0, 1) as worker:
        assert worker.all_reduce("sum", [1.0]) == [1.0]
        assert worker.stats().transport == transport and f"by {transport}" in str(worker.stats())
    assert worker.stats().transport is None


def test_quantiles_are_those_of_the_times_to_within_5_percent():
    seed = 2611
    times = np.random.default_rng(seed).lognormal(-8, 2, 5000)
    recorder = _stats.Recorder()
    for index, seconds in enumerate(times):
        recorder.add(f"layer {index % 7}", int(seconds * 1e9), index % 100 == 0, ())
    found = recorder.stats()
    assert found.p50 == pytest.approx(np.quantile(times, 0.5, method="inverted_cdf"), rel=0.05), f"seed {seed}"
    assert found.p99 == pytest.approx(np.quantile(times, 0.99, method="inverted_cdf"), rel=0.05), f"seed {seed}"
    assert found.seconds_waited == pytest.approx(times.sum(), rel=1e-4)
    assert (found.rounds, found.failed) == (5000, 50)
    assert "and 2 layers more" in repr(found)


def test_no_round_has_no_quantile():
    found = _stats.Recorder().stats()
    assert found.rounds == 0 and math.isnan(found.p50) and "all" in str(found)


@pytest.mark.parametrize("level, lines", [(logging.INFO, 1), (logging.WARNING, 0)])
def test_the_end_of_a_worker_is_summed_up_in_the_log(master, caplog, level, lines):
    caplog.set_level(level, "syncbn")
    with syncbn.Worker(master.target, "summed up", 0, 1) as worker:
        worker.all_reduce("sum of everything", [1.0])
    found = [record.getMessage() for record in caplog.records if "rounds" in record.getMessage()]
    assert len(found) == lines and all("1 rounds (0 failed)" in line and "sum of everything" in line for line in found)


def test_what_a_notebook_shows_of_a_worker(master):
    worker = syncbn.Worker(master.target, "shown", 0, 1, job="a job")
    assert repr(worker) == f"<syncbn.Worker a job/shown, rank 0 of 1, at {master.target}>"
    worker.close()
    assert repr(worker) == "<syncbn.Worker a job/shown, rank 0 of 1, closed>"
    with syncbn.Worker(lambda: master.target, "shown", 0, 1) as worker:
        assert "at a function's target" in repr(worker)
