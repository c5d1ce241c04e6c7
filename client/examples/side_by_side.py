"""Common part of the gallery's examples without a launcher: uneven workers beside one process on the whole batch.

An example calls `run` with its training: the same function for a worker, with its part of every batch, and for the whole.
"""

import os
import subprocess
import sys
from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np

import syncbn

SIZES = (2, 5)
"""The workers' parts of each batch."""
STEPS, FEATURES, LEARNING_RATE = 5, 6, 0.1
# The largest relative difference that rounding in float64 may amount to after these few steps. It is 1e-3 and more where
# workers normalize over their own batches.
BOUND = 1e-9

Arrays = List[np.ndarray]


def batches(rank: Optional[int]) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """x [n, FEATURES] and targets [n] of each step: the rows of a rank, or all (None)."""
    generator = np.random.default_rng(1)
    begin, end = (0, sum(SIZES)) if rank is None else (sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    for _ in range(STEPS):
        x, targets = generator.normal(2.0, 3.0, (sum(SIZES), FEATURES)), generator.normal(size=sum(SIZES))
        yield x[begin:end], targets[begin:end]


def sum_over_workers(worker: Optional[syncbn.Worker], gradients: Any) -> Arrays:
    """The sums of arrays over all workers; without a worker, the arrays."""
    arrays = [np.asarray(gradient, np.float64) for gradient in gradients]
    if worker is None:
        return arrays
    total = worker.all_reduce("gradients", np.concatenate([a.ravel() for a in arrays]))
    parts = np.split(total, np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays)]


def start_workers() -> int:
    """Runs this program as every worker, beside a master. Returns: an exit code."""
    with syncbn.Master() as master:
        settings = dict(os.environ, SYNCBN_TARGET=master.target, WORLD_SIZE=str(len(SIZES)))
        workers = [subprocess.Popen([sys.executable, *sys.argv], env=dict(settings, RANK=str(r))) for r in range(len(SIZES))]
        return max(abs(worker.wait()) for worker in workers)


def run(train: Callable[[Optional[syncbn.Worker], Any], Arrays], title: str, bound: float = BOUND) -> None:
    """Trains with workers and without, and prints how far the results are apart. Ends the program.

    Args:
      train: function(worker, batches), worker None for the whole batch by the framework alone. Returns: the parameters.
      bound: the largest relative difference; beyond it the program fails.
    """
    if "RANK" not in os.environ:
        sys.exit(start_workers())
    with syncbn.Worker() as worker:
        own = train(worker, batches(worker.rank))
        if worker.rank > 0:
            return
    whole = train(None, batches(None))
    assert len(own) == len(whole) > 0
    difference = max(float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max())) for a, b in zip(own, whole))
    print(
        f"{title}: {len(SIZES)} workers on batches of {list(SIZES)} are {difference:.1e} from one process on the whole batch "
        f"after {STEPS} steps (bound {bound:.0e})"
    )
    sys.exit(difference > bound)
