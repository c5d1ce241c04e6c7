"""A training whose master is killed again and again gives the same bits as one that nobody disturbs."""

import importlib.util
import pathlib
import sys

import pytest

pytest.importorskip("torch")

_FILE = pathlib.Path(__file__).resolve().parents[1] / "benchmarks/deaths/deaths.py"
_SPEC = importlib.util.spec_from_file_location("deaths", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
deaths = importlib.util.module_from_spec(_SPEC)
sys.modules["deaths"] = deaths
_SPEC.loader.exec_module(deaths)


def test_a_master_that_dies_ten_times_loses_nothing():
    result = deaths.compare(steps=40, deaths=10, seed=20261126)
    assert result["numbers"] > 50_000
    assert result["differences"] == 0
