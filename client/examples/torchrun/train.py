"""A script for torchrun: DistributedDataParallel averages the gradients, the service synchronizes batch normalization.

    torchrun --nproc_per_node 4 client/examples/torchrun/train.py

In a checkout, `tools/python -m torch.distributed.run` stands for torchrun (torch 1.13 under Python 3.11 also needs
`--redirects 1 --tee 1`).

Every worker has its own batch, of its own size. Rank 0 trains a copy on the whole batch beside it, and prints how far
the two are apart.
"""

import argparse
import copy
import os

import torch
import torch.distributed

import syncbn.torch

FEATURES, CLASSES = 12, 3


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)  # The same start for all.
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 32, bias=False),
        torch.nn.BatchNorm1d(32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 16, bias=False),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, CLASSES),
    ).double()


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, scale: float) -> None:
    """Steps on the sum of the losses times `scale`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum") * scale
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sizes = [2 + 3 * r for r in range(world_size)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((sum(sizes), FEATURES), generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (sum(sizes),), generator=generator)

    with syncbn.torch.init_worker() as worker:
        plain = make_model()
        model = syncbn.torch.convert_sync_batchnorm(copy.deepcopy(plain), worker)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        # DistributedDataParallel divides by the number of workers; the loss is averaged over the whole batch.
        train(parallel, x.split(sizes)[rank], y.split(sizes)[rank], arguments.steps, world_size / sum(sizes))

    if rank == 0:
        train(plain, x, y, arguments.steps, 1 / sum(sizes))
        whole = plain.state_dict()
        difference = max(float((value - whole[name]).abs().max()) for name, value in model.state_dict().items())
        master = "SYNCBN_TARGET" if os.environ.get("SYNCBN_TARGET") else "rank 0"
        print(
            f"{world_size} workers, batches {sizes}, master of {master}: "
            f"{arguments.steps} steps end {difference:.1e} from one process on the whole batch",
            flush=True,
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
