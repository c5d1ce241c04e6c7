"""One process of the quickstart: a worker with its part of each batch, or the reference with the whole of it.

It trains a small convolutional network on handwritten digits and writes what it saw to a .npz file. Lines "step" on
standard output tell the launcher how far it is.
"""

import argparse
from typing import Any, Dict, Optional

import numpy as np
import torch

import syncbn
import syncbn.torch
from task import GLOBAL_BATCH, LEARNING_RATE, MOMENTUM, SIZES, Record, run

import digits  # After `task`, which says where it is.


def make_model(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Three convolutions, a batch normalization after each; the same initial values in every process."""
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).to(device, dtype)  # Initialized on the CPU, so that the device does not matter.


def longest_sums() -> int:
    """Counts the numbers that are added up, one sum into the next, from an image to a gradient of the network above.

    Forward: a convolution's products, a channel's values, the pooling, the linear layer. Backward: the same, and each
    weight's gradient over the batch. It is the factor of the rounding unit in the error bound that the launcher prints.
    """
    forward = 9 + 144 + 288 + 16 * (64 + 16 + 16) + 16 + 32
    return 2 * forward + 16 * 64


def images_of(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values).to(dtype).reshape(-1, 1, 8, 8)


def snapshot(model: torch.nn.Module, outputs: torch.Tensor) -> Record:
    """Returns the values that are compared between runs; gradients are those of the mean over the global batch."""

    def join(tensors: Any) -> np.ndarray:
        return np.concatenate([t.detach().cpu().double().reshape(-1).numpy() for t in tensors]).copy()

    return {
        "outputs": outputs.detach().cpu().double().numpy().copy(),
        "gradients": join(p.grad for p in model.parameters()),
        "statistics": join(b for name, b in model.named_buffers() if "running" in name),
        "parameters": join(model.parameters()),
    }


def train(
    model: torch.nn.Module, data: digits.Digits, steps: int, rank: Optional[int], worker: Optional[syncbn.Worker]
) -> Record:
    """Trains on the rows of `rank` (None: all) of each batch; a worker's gradients are averaged with the others'."""
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, parameter.device
    images, labels = images_of(data.images, dtype).to(device), torch.from_numpy(data.labels).to(device)
    begin, end = (0, GLOBAL_BATCH) if rank is None else (sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    record: Record = {"losses": np.zeros(steps)}
    for step, batch in enumerate(digits.batches(len(images), GLOBAL_BATCH, steps)):
        rows = torch.from_numpy(batch[begin:end]).to(device)
        optimizer.zero_grad()
        outputs = model(images[rows])
        # Summed, not averaged: each example then weighs the same, whichever worker has it.
        loss = torch.nn.functional.cross_entropy(outputs, labels[rows], reduction="sum")
        if worker is None:
            (loss / GLOBAL_BATCH).backward()
        else:
            loss.backward()
            syncbn.torch.all_reduce_gradients(model, worker, weight=len(rows))
        optimizer.step()
        record["losses"][step] = loss.item()
        if step == 0:
            record.update({f"first/{name}": value for name, value in snapshot(model, outputs).items()})
        print("step", flush=True)
    record.update({f"last/{name}": value for name, value in snapshot(model, outputs).items()})
    model.eval()
    with torch.no_grad():
        predicted = model(images_of(data.test_images, dtype).to(device)).argmax(1).cpu().numpy()
    record["accuracy"] = float((predicted == data.test_labels).mean())
    return record


def prepare(arguments: argparse.Namespace) -> torch.device:
    """Returns: the device to train on."""
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    if device.type == "cuda":
        # By default a GPU's convolutions of float32 numbers keep 11 of their 24 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def run_whole(arguments: argparse.Namespace) -> Dict[str, Record]:
    data, device = digits.load(), prepare(arguments)
    single = train(make_model(torch.float32, device), data, 1, None, None)
    single["bound"] = 2.0**-24 * longest_sums()
    dtype = getattr(torch, arguments.dtype)
    return {"main": train(make_model(dtype, device), data, arguments.steps, None, None), "float32": single}


def run_worker(worker: syncbn.Worker, arguments: argparse.Namespace) -> Dict[str, Record]:
    """With synchronization, in float32 for one step, and without."""
    data, device = digits.load(), prepare(arguments)
    dtype, steps = getattr(torch, arguments.dtype), arguments.steps

    def synchronized(kind: torch.dtype, prefix: str) -> torch.nn.Module:
        return syncbn.torch.convert_sync_batchnorm(make_model(kind, device), worker, prefix=prefix)

    return {
        "main": train(synchronized(dtype, "bn"), data, steps, worker.rank, worker),
        "float32": train(synchronized(torch.float32, "single.bn"), data, 1, worker.rank, worker),
        "unsynchronized": train(make_model(dtype, device), data, steps, worker.rank, worker),
    }


if __name__ == "__main__":
    run(__doc__ or "", run_whole, run_worker)
