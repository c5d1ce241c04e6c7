"""A Python worker of the memory benchmark: python_worker.py TARGET RANK WORLD_SIZE LAYERS CHANNELS ROUNDS.

Prints the process's resident KiB with NumPy alone, and after rounds of all layers.
"""

import pathlib
import sys

import numpy as np


def resident() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    rank, world_size, layers, channels, rounds = map(int, sys.argv[2:])
    mean, m2 = np.full(channels, float(rank)), np.ones(channels)
    before = resident()

    import syncbn  # Imported here, since its size is part of the measurement.

    with syncbn.Worker(sys.argv[1], group="python", rank=rank, world_size=world_size) as worker:
        for _ in range(rounds):
            pending = [worker.start_synchronize(f"bn{i}", 1, mean, m2) for i in range(layers)]
            for round_ in pending:
                result = round_.result()
                if result.count != world_size or not np.allclose(result.mean, (world_size - 1) / 2):
                    raise SystemExit(f"rank {rank}: wrong result")
        print(before, resident(), flush=True)


if __name__ == "__main__":
    main()
