"""Ray: Ray Train by its recipe, and trainers as actors whose master is moved to another node."""

BOUND = 1e-9
# Ray gives its workers what others leave of a processor, which may be nothing for minutes.
NICENESS = {"RAY_worker_niceness": "0"}


def test_ray_train(example):
    (difference,) = example("ray/train.py", **NICENESS)
    assert difference < BOUND


def test_the_master_moves_to_another_node(example):
    (difference,) = example("ray/actors.py", **NICENESS)
    assert difference < BOUND
