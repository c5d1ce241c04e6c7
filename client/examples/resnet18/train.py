"""One training process of the comparison: ResNet-18 on random small images; prints its step times as JSON.

    --mode whole     the whole global batch, torch's BatchNorm
    --mode ddp       its part of the batch, torch's DistributedDataParallel over gloo, BatchNorm unsynchronized
    --mode lockstep  the same, but the workers wait for each other where synchronized layers would, exchanging nothing
    --mode syncbn    its part of the batch, DistributedDataParallel too, BatchNorm synchronized by the service
"""

import argparse
import json
import time

import torch
import torch.distributed

from lockstep import Barrier, wait_at_batch_norms
from resnet18 import ResNet18

IMAGE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("whole", "ddp", "lockstep", "syncbn"), required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="of all workers together")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--rendezvous", help="a file for gloo's rendezvous")
    parser.add_argument("--barrier", help="a file of 64 zeros for each worker, for lockstep")
    parser.add_argument("--target", help="the master")
    parser.add_argument("--group", default="resnet18")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_dtype(torch.float64 if arguments.double else torch.float32)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn((arguments.batch, 3, IMAGE, IMAGE), generator=generator)
    labels = torch.randint(10, (arguments.batch,), generator=generator)
    torch.manual_seed(6)
    model: torch.nn.Module = ResNet18()
    worker = None
    if arguments.mode == "syncbn":
        import syncbn
        import syncbn.torch

        worker = syncbn.Worker(arguments.target, arguments.group, arguments.rank, arguments.world_size, timeout=120.0)
        model = syncbn.torch.convert_sync_batchnorm(model, worker)
    if arguments.mode == "lockstep":
        model = wait_at_batch_norms(model, Barrier(arguments.barrier, arguments.rank, arguments.world_size))
    if arguments.mode != "whole":
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{arguments.rendezvous}", rank=arguments.rank, world_size=arguments.world_size
        )
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    images, labels = (v.chunk(arguments.world_size)[arguments.rank] for v in (images, labels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(arguments.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        losses.append(loss.item())
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}), flush=True)
    if worker is not None:
        worker.leave()


if __name__ == "__main__":
    main()
