"""Lightning Fabric: convert the model before `fabric.setup`.

    python client/examples/lightning/fabric.py
"""

import pathlib
import sys

import torch
from lightning.fabric import Fabric

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch

WORKERS = 2


def main() -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=WORKERS, strategy="ddp")
    fabric.launch()
    model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model())
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE))
    syncbn.torch.weighted_ddp(wrapped)
    for x, y in whole_batch.batches(fabric.global_rank, WORKERS):
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.cross_entropy(wrapped(x), y))
        optimizer.step()
    if fabric.is_global_zero:
        whole_batch.compare(model, WORKERS, "Lightning Fabric")


if __name__ == "__main__":
    main()
