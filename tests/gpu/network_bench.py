#!/usr/bin/env python3
"""Times the 53 batch-norm layers of ResNet-50, one after the other, forward and back, on this machine's GPU.

Torch's own layers, which synchronize nothing; ours, host-driven and stream-ordered, in a group of one and with three
other workers. Those have no tensors: they contribute ahead of time, so that what is timed is the GPU's worker.

    network_bench.py RESULTS.json [--device cpu]        the CPU: a rehearsal, with few and small layers
"""

import argparse
import json
import statistics
import sys
import time
import traceback

import numpy as np
import torch

import syncbn
import syncbn.torch
import worker_check

BATCH = 32
MODES = ("torch, alone", "host-driven", "stream-ordered")
# Steps that are timed, and those before.
STEPS, WARM_UP = 15, 3


def resnet50(image=224):
    """The channels and the height of each layer's input, in order."""
    layers, height = [(64, image // 2)], image // 4
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            first = 2 * height if stage and not block else height  # The convolution after it has the stride.
            layers += [(width, first), (width, height), (4 * width, height)]
            if not block:
                layers.append((4 * width, height))  # Of the shortcut.
        height //= 2
    return layers


def time_network(norms, layers, device):
    """Median milliseconds of a step through the layers, each over an input of its own."""
    half = torch.bfloat16 if device == "cuda" else torch.float32
    xs, dys = [], []
    for channels, height in layers:
        x = torch.randn(BATCH if device == "cuda" else 2, channels, height, height, device=device, dtype=half)
        xs.append(x.contiguous(memory_format=torch.channels_last).requires_grad_())
        dys.append(torch.randn_like(x).contiguous(memory_format=torch.channels_last))
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = []
    for step in range(WARM_UP + STEPS):
        synchronize()
        begin = time.perf_counter()
        ys = [norm(x) for norm, x in zip(norms, xs)]
        for norm, x, y, dy in reversed(list(zip(norms, xs, ys, dys))):
            torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)
        synchronize()
        if step >= WARM_UP:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def contribute(worker, layers):
    """The part of a worker without tensors in every step."""
    names = [f"bn{index}" for index in range(len(layers))]
    ones = [np.ones(channels) for channels, _ in layers]
    for name, (channels, _) in zip(names, layers):
        worker.declare_layer(name, channels, eps=1e-5, momentum=0.1)
    for step in range(WARM_UP + STEPS):
        rounds = [worker.start_synchronize(name, 2, one, one, step, backward=True) for name, one in zip(names, ones)]
        for one in rounds:
            one.result()
        back = [worker.start_synchronize_backward(name, step, one, one)
                for name, one in reversed(list(zip(names, ones)))]
        for one in back:
            one.result()


def network_worker(rank, world, target, mode, layers, device, queue):
    """Puts the milliseconds of a step, at rank 0."""
    try:
        ordered = mode == "stream-ordered" and rank == 0
        with syncbn.Worker(target, f"{mode} {world}", rank, world, 60.0, stream_ordered=ordered) as worker:
            worker.wait_for_members(60.0)
            if rank > 0:
                contribute(worker, layers)
                queue.put((rank, 0.0))
                return
            norms = [syncbn.torch.SyncBatchNorm(channels, worker=worker, layer=f"bn{index}").to(device)
                     for index, (channels, _) in enumerate(layers)]
            measured = time_network(norms, layers, device)
            worker.settle()
            queue.put((rank, measured))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch has no NVIDIA GPU")
        return 0
    layers = resnet50() if device == "cuda" else [(4, 6), (8, 3), (8, 3)]
    rows, notes = [], []
    for mode in MODES:
        for world in (1, 4) if mode != MODES[0] else (1,):
            try:
                if mode == MODES[0]:
                    alone = [torch.nn.BatchNorm2d(channels).to(device) for channels, _ in layers]
                    milliseconds = time_network(alone, layers, device)
                else:
                    with syncbn.Master(address="127.0.0.1:0") as master:
                        arguments = (world, master.target, mode, layers, device)
                        milliseconds = worker_check.run_processes(network_worker, arguments, world)[0]
            except Exception as error:
                notes.append(f"{mode}, {world} workers: {str(error).strip().splitlines()[-1]}")
                print(f"FAILED {mode}, {world} workers\n{traceback.format_exc()}")
                continue
            peers = "none" if world == 1 else f"{world - 1}, without a GPU"
            rows.append({"mode": mode, "peers": peers, "layers": len(layers), "ms": milliseconds})
            print(rows[-1], flush=True)
            # Each as soon as it is known: whoever stops this keeps it.
            with open(options.results, "w", encoding="utf-8") as file:
                json.dump({"rows": rows, "notes": notes}, file)
    print(f"networks: {len(rows)} timed, {len(notes)} failed")
    return len(notes) > 0


if __name__ == "__main__":
    sys.exit(main())
