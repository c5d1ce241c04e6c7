"""One trainer: trainer.py RANK ROUNDS BATCH..., where BATCH is each rank's number of rows.

Prints a line for each round. Each merged result has to be NumPy's, over the whole batch in float64. It needs NumPy and
the package syncbn alone; the master is $SYNCBN_TARGET. $TRAINER_JOIN_TIMEOUT has the seconds that it tries to join, 60
by default. The rank $TRAINER_SLOW_RANK, if that is set, computes for $TRAINER_SLOWNESS seconds of CPU time in each step.
"""

import os
import sys
import time

import numpy

import syncbn

CHANNELS = 5


def compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def main() -> None:
    rank, rounds, batches = int(sys.argv[1]), int(sys.argv[2]), [int(rows) for rows in sys.argv[3:]]
    begins = numpy.cumsum([0, *batches])
    patience = float(os.environ.get("TRAINER_JOIN_TIMEOUT", "60"))
    slowness = float(os.environ.get("TRAINER_SLOWNESS", "0")) if os.environ.get("TRAINER_SLOW_RANK") == str(rank) else 0.0
    with syncbn.Worker(rank=rank, world_size=len(batches), join_timeout=patience) as worker:
        for step in range(rounds):
            compute(slowness)
            # The step is the seed.
            whole = numpy.random.default_rng(step).normal(3.0, 2.0, (begins[-1], CHANNELS))
            mine = whole[begins[rank] : begins[rank + 1]]
            mean = mine.mean(0)
            merged = worker.synchronize("layer", len(mine), mean, ((mine - mean) ** 2).sum(0))
            assert merged.count == len(whole), merged.count
            numpy.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-12)
            numpy.testing.assert_allclose(merged.var, whole.var(0), rtol=1e-12)
            print(step, flush=True)


if __name__ == "__main__":
    main()
