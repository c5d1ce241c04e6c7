"""One rank of OpenMPI's allreduce, over shared memory: mpirun -n W mpi_worker.py CHANNELS WARM_UP ROUNDS.

A round sums 2 * channels + 1 doubles, as many as a layer's statistics are. The first rank prints the CPU microseconds
of a rank and round, then the microseconds of each round, warm-up left out, of all ranks. The library is called by
ctypes, so that no compiler and no header is needed; a call takes a microsecond more than from C.
"""

import ctypes
import ctypes.util
import sys
import time
from typing import List

VARIANTS = 4


class Mpi:
    """The few functions that are needed, by OpenMPI's names of its constants."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("mpi")
        if name is None:
            raise SystemExit("there is no libmpi")
        self._library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        self._world, self._double, self._sum = (
            ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol)))
            for symbol in ("ompi_mpi_comm_world", "ompi_mpi_double", "ompi_mpi_op_sum")
        )
        self._check(self._library.MPI_Init(None, None))
        rank, size = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.MPI_Comm_rank(self._world, ctypes.byref(rank)))
        self._check(self._library.MPI_Comm_size(self._world, ctypes.byref(size)))
        self.rank, self.size = rank.value, size.value

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise SystemExit(f"MPI failed with code {code}")

    def allreduce(self, own: "ctypes.Array[ctypes.c_double]", result: "ctypes.Array[ctypes.c_double]") -> None:
        self._check(self._library.MPI_Allreduce(own, result, len(own), self._double, self._sum, self._world))

    def gather(self, values: List[float]) -> List[float]:
        """Returns the values of all ranks at the first one."""
        count = len(values)
        own, all_values = (ctypes.c_double * count)(*values), (ctypes.c_double * (count * self.size))()
        self._check(
            self._library.MPI_Gather(own, count, self._double, all_values, count, self._double, 0, self._world)
        )
        return list(all_values)

    def finalize(self) -> None:
        self._check(self._library.MPI_Finalize())


def main() -> None:
    channels, warm_up, rounds = map(int, sys.argv[1:])
    mpi = Mpi()
    numbers = 2 * channels + 1
    own = [(ctypes.c_double * numbers)(*(i + 1000.0 * mpi.rank + v for i in range(numbers))) for v in range(VARIANTS)]
    ranks = mpi.size * (mpi.size - 1) / 2
    expected = [[mpi.size * (i + v) + 1000.0 * ranks for i in range(numbers)] for v in range(VARIANTS)]
    result = (ctypes.c_double * numbers)()
    latencies = []
    cpu = 0.0
    for i in range(warm_up + rounds):
        cpu_begin, begin = time.thread_time(), time.perf_counter()
        mpi.allreduce(own[i % VARIANTS], result)
        latencies.append(1e6 * (time.perf_counter() - begin))
        cpu += 1e6 * (time.thread_time() - cpu_begin)
        if list(result) != expected[i % VARIANTS]:
            raise SystemExit(f"rank {mpi.rank}, round {i}: wrong result")
    gathered = mpi.gather(latencies[warm_up:])
    cpus = mpi.gather([cpu / (warm_up + rounds)])
    if mpi.rank == 0:
        print(f"{sum(cpus) / mpi.size:.2f}", *(f"{latency:.2f}" for latency in gathered), flush=True)
    mpi.finalize()


if __name__ == "__main__":
    main()
