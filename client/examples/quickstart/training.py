"""One process of the quickstart: a worker with its part of each batch, or the reference with the whole of it.

It trains a small convolutional network on handwritten digits and writes what it saw to a .npz file. Lines "step" on
standard output tell the launcher how far it is.
"""

import argparse
import pathlib
import sys
import time
from typing import Any, Dict, Optional

import numpy as np
import torch

import syncbn
import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))
import digits  # noqa: E402

GLOBAL_BATCH = 16
SIZES = (1, 2, 5, 8)  # Each worker's part of a batch.
GROUP = "quickstart"
LATENCY_ROUNDS = 200
LATENCY_CHANNELS = 32

Record = Dict[str, Any]


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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
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


def measure_latency(worker: syncbn.Worker) -> np.ndarray:
    """Seconds of each of many rounds that all workers begin together."""
    mean, m2 = np.zeros(LATENCY_CHANNELS), np.ones(LATENCY_CHANNELS)
    seconds = np.zeros(LATENCY_ROUNDS)
    for index in range(LATENCY_ROUNDS):
        start = time.perf_counter()
        worker.synchronize("latency", 1, mean, m2)
        seconds[index] = time.perf_counter() - start
    return seconds


def run_whole(steps: int, dtype: torch.dtype, device: torch.device) -> Dict[str, Record]:
    data = digits.load()
    return {
        "main": train(make_model(dtype, device), data, steps, None, None),
        "float32": train(make_model(torch.float32, device), data, 1, None, None),
    }


def run_worker(worker: syncbn.Worker, steps: int, dtype: torch.dtype, device: torch.device) -> Dict[str, Record]:
    """With synchronization, in float32 for one step, and without."""
    data = digits.load()
    worker.wait_for_members(60.0)

    def synchronized(kind: torch.dtype, prefix: str) -> torch.nn.Module:
        return syncbn.torch.convert_sync_batchnorm(make_model(kind, device), worker, prefix=prefix)

    records = {
        "main": train(synchronized(dtype, "bn"), data, steps, worker.rank, worker),
        "float32": train(synchronized(torch.float32, "single.bn"), data, 1, worker.rank, worker),
        "unsynchronized": train(make_model(dtype, device), data, steps, worker.rank, worker),
    }
    records["main"]["latency"] = measure_latency(worker)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="the master; without it, this is the reference on the whole batch")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--group", default=GROUP)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1")
    parser.add_argument("--output", required=True, help="the .npz file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device.type == "cuda":
        # By default a GPU's convolutions of float32 numbers keep 11 of their 24 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, arguments.dtype)
    if arguments.target is None:
        records = run_whole(arguments.steps, dtype, arguments.device)
    else:
        with syncbn.Worker(arguments.target, arguments.group, arguments.rank, len(SIZES), timeout=60.0) as worker:
            records = run_worker(worker, arguments.steps, dtype, arguments.device)
    np.savez(arguments.output, **{f"{run}/{name}": v for run, record in records.items() for name, v in record.items()})


if __name__ == "__main__":
    main()
