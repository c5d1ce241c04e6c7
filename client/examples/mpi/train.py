"""MPI, by mpi4py: gradients are added up by MPI, and batches are normalized by syncbn, without torch.distributed.

    mpirun -n 2 python client/examples/mpi/train.py                              # One host: rank 0 runs the master.
    SYNCBN_TARGET=host:50051 mpirun -n 2 python client/examples/mpi/train.py     # A master that is there already.

Rank and number of processes are the launcher's: Open MPI, MPICH and those that descend from it.
"""

import contextlib
import os
import pathlib
import sys
from typing import Iterator

import torch
from mpi4py import MPI

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch

COMM = MPI.COMM_WORLD


@contextlib.contextmanager
def shared_master() -> Iterator[str]:
    """The address of a master for all processes: that of SYNCBN_TARGET, or of one that rank 0 runs meanwhile."""
    if "SYNCBN_TARGET" in os.environ:
        yield os.environ["SYNCBN_TARGET"]
        return
    with syncbn.Master() if COMM.rank == 0 else contextlib.nullcontext() as master:
        yield COMM.bcast(master.target if master else None)
        COMM.Barrier()  # Nobody needs it any more.


def sum_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        COMM.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())


def main() -> None:
    torch.set_num_threads(1)
    rows_of_all = sum(whole_batch.sizes(COMM.size))
    with shared_master() as target, syncbn.Worker(target) as worker:
        model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model(), worker)
        optimizer = torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE)
        for x, y in whole_batch.batches(COMM.rank, COMM.size):
            optimizer.zero_grad()
            # Each process's part of the mean over the global batch: scaled before the backward pass, which all share.
            (torch.nn.functional.cross_entropy(model(x), y, reduction="sum") / rows_of_all).backward()
            sum_gradients(model)
            optimizer.step()
    if COMM.rank == 0:
        whole_batch.compare(model, COMM.size, "MPI")


if __name__ == "__main__":
    main()
