"""The 1,797 handwritten digits of optdigits.csv.gz (see README.md beside it)."""

import gzip
import pathlib
from typing import NamedTuple

import numpy as np

_FILE = pathlib.Path(__file__).with_name("optdigits.csv.gz")

TRAINING = 1437  # The first of a fixed permutation; the other 360 are for testing.


class Digits(NamedTuple):
    images: np.ndarray
    """float64 [n, 64], in 0 .. 1."""
    labels: np.ndarray
    """int64 [n], 0 .. 9."""
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    with gzip.open(_FILE, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    images, labels = table[:, :64] / 16.0, table[:, 64].astype(np.int64)
    return Digits(images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:])


def batches(count: int, size: int, steps: int) -> np.ndarray:
    """int64 [steps, size]: which of `count` examples each global batch holds; every epoch has its own order."""
    generator = np.random.default_rng(1)
    epochs = -(-steps * size // count)
    order = np.concatenate([generator.permutation(count) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)
