"""Slurm: `srun` starts the processes, and torch.distributed connects them. Nothing else is configured.

    srun --ntasks 2 python client/examples/slurm/train.py

In a job on several hosts, the batch script first tells where rank 0 is:

    export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
"""

import os
import pathlib
import sys

import torch
import torch.distributed

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


def initialize() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))  # The jobs of a host differ.
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)


def main() -> None:
    torch.set_num_threads(1)
    initialize()
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model())
    parallel = syncbn.torch.weighted_ddp(torch.nn.parallel.DistributedDataParallel(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE)
    for x, y in whole_batch.batches(rank, workers):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    if rank == 0:
        whole_batch.compare(model, workers, "Slurm")


if __name__ == "__main__":
    main()
