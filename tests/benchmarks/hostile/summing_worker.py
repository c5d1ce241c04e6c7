"""A worker of two that sum 10^6 doubles over and over, until its input ends. Prints the bytes that it has sent."""

import select
import sys

import numpy
import syncbn


def main() -> None:
    target, rank = sys.argv[1], int(sys.argv[2])
    vector, sums = numpy.ones(1_000_000), 0
    with syncbn.Worker(target, group="long sums", rank=rank, world_size=2) as worker:
        while not worker.all_reduce("end", [float(select.select([sys.stdin], [], [], 0) != ([], [], []))])[0].any():
            worker.all_reduce("vector", [vector])
            sums += 1
    print(sums * vector.nbytes)


if __name__ == "__main__":
    main()
