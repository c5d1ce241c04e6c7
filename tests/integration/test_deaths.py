"""A training whose master or workers are killed again and again gives the same bits as one that nobody disturbs."""

import pathlib
import sys

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks/deaths"))
import deaths

SEED = 20261126


def check(result):
    assert result["numbers"] > 50_000
    assert result["differences"] == 0


def test_a_master_that_dies_ten_times_loses_nothing():
    check(deaths.compare(steps=20, deaths=10, victims="masters", seed=SEED))


def test_workers_that_die_five_times_go_on_from_their_checkpoints():
    check(deaths.compare(steps=20, deaths=5, victims="workers", seed=SEED))


def test_masters_and_workers_may_die_together():
    check(deaths.compare(steps=20, deaths=5, victims="both", seed=SEED))
