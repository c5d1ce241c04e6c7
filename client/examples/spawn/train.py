"""Plain PyTorch whose script starts its own processes (torch.multiprocessing.spawn), as detectron2 and nnU-Net do.

    python client/examples/spawn/train.py [--workers 2]
"""

import argparse
import pathlib
import sys
import tempfile

import torch
import torch.distributed

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


def train(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model())
    parallel = syncbn.torch.weighted_ddp(torch.nn.parallel.DistributedDataParallel(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE)
    for x, y in whole_batch.batches(rank, workers):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    if rank == 0:
        whole_batch.compare(model, workers, "multiprocessing.spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (workers, folder), nprocs=workers)


if __name__ == "__main__":
    main()
