"""One process of the peer: torch gloo's all_gather of a layer's statistics, which torch's SyncBatchNorm calls.

gloo_worker.py STORE RANK WORLD_SIZE; speaks as worker_main.cc does. A layer's message is [mean, invstd, count] in
float32, as torch sends it: 2 * channels + 1 numbers.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

VARIANTS = 4


def statistics(rank: int, variant: int, channels: int) -> torch.Tensor:
    """The contribution of this rank: differs by rank, channel and variant; exact in float32."""
    return torch.arange(2 * channels + 1, dtype=torch.float32) + 10000.0 * rank + 5000.0 * variant


def run(rank: int, world_size: int, channels: int, warm_up: int, rounds: int) -> "list[float]":
    own = [statistics(rank, variant, channels) for variant in range(VARIANTS)]
    expected = [torch.stack([statistics(r, v, channels) for r in range(world_size)]) for v in range(VARIANTS)]
    gathered = torch.empty(world_size, 2 * channels + 1)
    rows = list(gathered)
    latencies = []
    for i in range(warm_up + rounds):
        begin = time.perf_counter()
        dist.all_gather(rows, own[i % VARIANTS])
        latencies.append(1e6 * (time.perf_counter() - begin))
        if not torch.equal(gathered, expected[i % VARIANTS]):
            raise SystemExit(f"rank {rank}, round {i}: wrong result")
    return latencies[warm_up:]


def main() -> None:
    store, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    print("ready", flush=True)
    for line in sys.stdin:
        _, channels, _, _, warm_up, rounds = line.split()
        print(*(f"{latency:.2f}" for latency in run(rank, world_size, int(channels), int(warm_up), int(rounds))), flush=True)


if __name__ == "__main__":
    main()
