"""Accelerate, by its recipe."""

BOUND = 1e-9


def test_two_workers_train_as_one_process_on_the_whole_batch(example):
    (difference,) = example.torchrun("accelerate/train.py")
    assert difference < BOUND


def test_one_process(example):
    (difference,) = example("accelerate/train.py")
    assert difference < BOUND
