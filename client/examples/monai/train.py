"""MONAI: a network of its own whose normalizations come from the factory by name.

    torchrun --nproc_per_node 2 client/examples/monai/train.py
"""

import pathlib
import sys

import torch
import torch.distributed
from monai.networks.nets import BasicUNet

import syncbn.monai
import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


def make_model(norm: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return BasicUNet(
        spatial_dims=2, in_channels=3, out_channels=2, features=(4, 4, 8, 8, 8, 4), norm=(norm, {"affine": True})
    ).double()


def train(model: torch.nn.Module, batches: list) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE)
    for x, _ in batches:
        optimizer.zero_grad()
        # The mean over the images of a sum over each.
        model(torch.nn.functional.interpolate(x, 32)).square().sum((1, 2, 3)).mean().mul(1e-3).backward()
        optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = make_model("syncbn")
    train(syncbn.torch.weighted_ddp(torch.nn.parallel.DistributedDataParallel(model)), whole_batch.batches(rank, world_size))
    if rank == 0:
        plain = make_model("batch")
        train(plain, whole_batch.whole_batches(world_size))
        whole_batch.report(model, plain, world_size, "MONAI, BasicUNet")


if __name__ == "__main__":
    main()
