"""Accelerate: convert the model before `prepare`.

    torchrun --nproc_per_node 2 client/examples/accelerate/train.py     # With GPUs: accelerate launch ...
"""

import pathlib
import sys

import torch
from accelerate import Accelerator

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model())
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE))
    if accelerator.num_processes > 1:
        syncbn.torch.weighted_ddp(wrapped)
    for x, y in whole_batch.batches(accelerator.process_index, accelerator.num_processes):
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(wrapped(x), y))
        optimizer.step()
    if accelerator.is_main_process:
        whole_batch.compare(model, accelerator.num_processes, "Accelerate")
    accelerator.end_training()


if __name__ == "__main__":
    main()
