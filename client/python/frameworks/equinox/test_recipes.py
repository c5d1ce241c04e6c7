"""Equinox and Haiku, for which the gallery has a layer of a few lines each."""

import pytest

BOUND = 1e-9


@pytest.mark.parametrize("framework", ["equinox", "haiku"])
def test_workers_train_as_one_process_on_the_whole_batch(example, framework):
    (difference,) = example(f"{framework}/train.py")
    assert difference < BOUND
