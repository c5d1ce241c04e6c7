"""A member of a group that may run on machines of several kinds: trains layers on tensors that a seed determines, and
prints a line for each result, with a hash of its bits.

    member.py TARGET GROUP RANK WORLD_SIZE SEED
"""

import hashlib
import itertools
import sys
from typing import Any, Iterator, Tuple

import torch

import syncbn
import syncbn.torch

CHANNELS = 5
EXTENT = 7
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ORDERS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
FUSED = ("plain", "relu", "residual")
STEPS = 3


def numbers(shape: Tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Multiples of a power of 2, around a mean of each channel: no machine rounds them."""
    values = torch.randint(-(1 << 12), 1 << 12, shape, generator=generator).double() / (1 << 10)
    if len(shape) == 4:
        values += torch.arange(CHANNELS).double().reshape(1, CHANNELS, 1, 1) * 3 - 6
    return values


def bits(tensor: Any) -> str:
    """A hash of the elements in the order of their indices. NumPy knows no bfloat16, and takes the bytes."""
    elements = tensor.detach().reshape(-1)
    return hashlib.sha256(elements.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def results(worker: syncbn.Worker, seed: int) -> Iterator[Tuple[str, torch.Tensor]]:
    for dtype, order, fused in itertools.product(TYPES, ORDERS, FUSED):
        name = f"{dtype} {order} {fused}".replace("torch.", "")
        generator = torch.Generator().manual_seed(seed + 1000 * worker.rank)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        layer = syncbn.torch.SyncBatchNorm(
            CHANNELS, dtype=wide, worker=worker, layer=name, activation=None if fused == "plain" else "relu"
        )
        for step in range(STEPS):
            # Batches differ by worker and step, and one is empty.
            shape = ((worker.rank + step) % 3, CHANNELS, EXTENT, EXTENT)
            x, z, dy = (
                numbers(shape, generator).to(dtype).contiguous(memory_format=ORDERS[order]) for _ in range(3)
            )
            x.requires_grad_()
            y = layer(x, z=z) if fused == "residual" else layer(x)
            layer.zero_grad()
            y.backward(dy)
            for what, tensor in (
                ("y", y),
                ("dx", x.grad),
                ("d_weight", layer.weight.grad),
                ("d_bias", layer.bias.grad),
                ("running_mean", layer.running_mean),
                ("running_var", layer.running_var),
            ):
                yield f"{name} step {step} {what}", tensor


def main() -> None:
    target, group, rank, world_size, seed = sys.argv[1:]
    with syncbn.Worker(target, group, int(rank), int(world_size), timeout=300.0) as worker:
        for name, tensor in results(worker, int(seed)):
            print(f"{name}: {bits(tensor)}")


if __name__ == "__main__":
    main()
