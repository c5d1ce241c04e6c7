#!/usr/bin/env python3
"""Times each kernel against a copy of the same tensor and against torch's own operation, in one process.

Every figure is a median over replays of a CUDA graph. "cold": calls rotate over at least four sets of tensors that
together are three times the second-level cache and more; "hot": statistics and normalization of one tensor in turn.
"of copy": the operation's least possible traffic over its time, relative to a device copy's traffic over its time.

    bench.py LIBRARY RESULTS.md [--quick]
"""

import argparse
import ctypes
import statistics
import sys

import torch

# Batch, channels, spatial extents.
SHAPES = [
    (32, 64, (112, 112)), (32, 256, (56, 56)), (32, 512, (28, 28)), (32, 1024, (14, 14)), (32, 2048, (7, 7)),
    (2, 256, (128, 256)), (128, 4, (224, 224)), (2, 32, (64, 64, 64)), (4096, 1024, ()),
]
TYPES = {torch.float32: (0, 4, "fp32"), torch.float16: (2, 2, "fp16"), torch.bfloat16: (3, 2, "bf16")}
# Tensors that each operation has to read or write.
FLOOR = {"stats": 1, "elemt": 2, "backward_reduce": 2, "backward_elemt": 3}
# Least share of the copy's bandwidth: from 50 MB on, and from 13 MB.
TARGET = {"stats": (0.92, 0.75), "elemt": (0.93, 0.85), "backward_reduce": (0.90, 0.75), "backward_elemt": (0.92, 0.85)}


class Shape(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64), ("channels", ctypes.c_int64), ("spatial", ctypes.c_int64),
                ("type", ctypes.c_int32), ("layout", ctypes.c_int32)]


class Kernels:
    """The library's functions, on torch tensors and torch's current stream."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.bench_workspace_bytes.restype = ctypes.c_size_t
        self.library.bench_error_string.restype = ctypes.c_char_p

    def prepare(self, shape):
        """Scratch memory for reductions over the shape, zeroed."""
        return torch.zeros(self.library.bench_workspace_bytes(ctypes.byref(shape)), dtype=torch.uint8, device="cuda")

    def call(self, name, shape, *arguments):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, "bench_" + name)(ctypes.byref(shape), stream, *map(as_c, arguments))
        if error:
            raise RuntimeError(f"{name}: {self.library.bench_error_string(error).decode()}")


def as_c(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else ctypes.c_size_t(argument)


class Set:
    """One set of a layer's tensors."""

    def __init__(self, batch, channels, extents, dtype, last):
        size = (batch, channels, *extents)
        memory = torch.contiguous_format
        if last and len(extents) == 2:
            memory = torch.channels_last
        elif last and len(extents) == 3:
            memory = torch.channels_last_3d

        def fresh(scale, shift):
            return (torch.randn(size, device="cuda") * scale + shift).to(dtype).contiguous(memory_format=memory)

        self.x, self.dy = fresh(1.5, 2.0), fresh(1.0, 0.1)
        self.y, self.dx = torch.empty_like(self.x), torch.empty_like(self.x)


def time_calls(calls, replays):
    """Median microseconds of one call, over replays of a graph of them all."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


class Layer:
    """What the operations on one shape share."""

    def __init__(self, kernels, batch, channels, extents, dtype, last):
        spatial = 1
        for extent in extents:
            spatial *= extent
        self.kernels = kernels
        self.shape = Shape(batch, channels, spatial, TYPES[dtype][0], 1 if last else 0)
        self.bytes = batch * channels * spatial * TYPES[dtype][1]
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(4, -(-3 * cache // (2 * self.bytes)))
        self.sets = [Set(batch, channels, extents, dtype, last) for _ in range(count)]
        self.workspace = kernels.prepare(self.shape)
        # Parameters and statistics, as torch's operations take them, and in float64 as ours do.
        self.weight = torch.rand(channels, device="cuda") + 0.5
        self.bias = torch.randn(channels, device="cuda")
        self.mean32, self.invstd32 = torch.batch_norm_stats(self.sets[0].x, 1e-5)
        self.mean, self.m2 = (torch.empty(channels, device="cuda", dtype=torch.float64) for _ in range(2))
        self.sum_dy, self.sum_xmu = (torch.empty(channels, device="cuda", dtype=torch.float64) for _ in range(2))
        self.scale, self.shift = (self.weight * self.invstd32).double(), self.bias.double()
        self.known_mean = self.mean32.double()
        self.count = batch * spatial
        self.counts = torch.tensor([self.count], dtype=torch.int32, device="cuda")
        sums = torch.batch_norm_backward_reduce(self.sets[0].dy, self.sets[0].x, self.mean32, self.invstd32,
                                                self.weight, True, True, True)
        self.sum32, self.sum_xmu32 = sums[0], sums[1]
        self.mean_dy = self.sum32.double() / self.count
        self.projection = self.invstd32.double() ** 2 * self.sum_xmu32.double() / self.count

    def ours(self, operation, s):
        k, shape, ws = self.kernels, self.shape, self.workspace
        if operation == "stats":
            k.call("stats", shape, ws, ws.numel(), s.x, self.mean, self.m2, None)
        elif operation == "elemt":
            k.call("elemt", shape, s.x, self.known_mean, self.scale, self.shift, None, 0, None, s.y)
        elif operation == "backward_reduce":
            k.call("backward_reduce", shape, ws, ws.numel(), s.dy, s.x, self.known_mean, self.sum_dy, self.sum_xmu)
        else:
            k.call("backward_elemt", shape, s.dy, s.x, self.known_mean, self.scale, self.mean_dy, self.projection, s.dx)

    def torchs(self, operation, s):
        if operation == "stats":
            return torch.batch_norm_stats(s.x, 1e-5)
        if operation == "elemt":
            return torch.batch_norm_elemt(s.x, self.weight, self.bias, self.mean32, self.invstd32, 1e-5)
        if operation == "backward_reduce":
            return torch.batch_norm_backward_reduce(s.dy, s.x, self.mean32, self.invstd32, self.weight, True, True, True)
        return torch.batch_norm_backward_elemt(s.dy, s.x, self.mean32, self.invstd32, self.weight, self.sum32,
                                               self.sum_xmu32, self.counts)

    def check(self):
        """That both compute the same thing, so that their times compare."""
        s = self.sets[0]
        for operation in FLOOR:
            self.ours(operation, s)
        torch.cuda.synchronize()
        torch.testing.assert_close(self.mean.float(), self.mean32, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(self.sum_dy.float(), self.sum32, rtol=1e-3, atol=1e-2 * self.count ** 0.5)
        loose = {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(s.y, self.torchs("elemt", s), **loose)
        torch.testing.assert_close(s.dx, self.torchs("backward_elemt", s), **loose)


def bench_layer(layer, replays):
    """Rows of (operation, cold us, torch us, share of copy, target or None) and the hot pair's time and copy's."""
    copy = time_calls([lambda s=s: s.y.copy_(s.x) for s in layer.sets], replays)
    rows = []
    for operation, tensors in FLOOR.items():
        ours = time_calls([lambda s=s: layer.ours(operation, s) for s in layer.sets], replays)
        theirs = time_calls([lambda s=s: layer.torchs(operation, s) for s in layer.sets], replays)
        share = (tensors / ours) / (2 / copy)
        large, medium = TARGET[operation]
        target = large if layer.bytes >= 50e6 else medium if layer.bytes >= 13e6 else None
        rows.append((operation, ours, theirs, share, target))
    first = layer.sets[0]
    hot = time_calls([lambda: (layer.ours("stats", first), layer.ours("elemt", first))] * 4, replays)
    hot_torch = time_calls([lambda: (layer.torchs("stats", first), layer.torchs("elemt", first))] * 4, replays)
    return copy, rows, hot, hot_torch


def small_latency(kernels, replays):
    """Microseconds of the statistics of a small tensor with the signal to the host."""
    shape = Shape(8, 64, 49, 0, 0)
    x = torch.randn(8, 64, 49, device="cuda")
    mean, m2 = (torch.empty(64, dtype=torch.float64).pin_memory() for _ in range(2))
    flag = torch.zeros(16, dtype=torch.int32).pin_memory()
    workspace = kernels.prepare(shape)
    return time_calls([lambda: kernels.call("stats", shape, workspace, workspace.numel(), x, mean, m2, flag)] * 16,
                      replays)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch has no NVIDIA GPU")
        return 0
    kernels = Kernels(options.library)
    torch.manual_seed(1)
    replays = 10 if options.quick else 50
    shapes = SHAPES[:2] if options.quick else SHAPES
    lines = [f"GPU: {torch.cuda.get_device_name(0)}; torch {torch.__version__}; CUDA {torch.version.cuda}", "",
             "| shape | layout | type | operation | us | GB/s | of copy | target | x torch |",
             "|---|---|---|---|---|---|---|---|---|"]
    missed, met, worst = 0, 0, {}
    for batch, channels, extents in shapes:
        for dtype, (_, _, type_name) in TYPES.items():
            for last in (False, True) if extents else (False,):
                layer = Layer(kernels, batch, channels, extents, dtype, last)
                layer.check()
                copy, rows, hot, hot_torch = bench_layer(layer, replays)
                name = "x".join(map(str, (batch, channels, *extents)))
                prefix = f"| {name} | {'NHWC' if last else 'NCHW'} | {type_name} |"
                lines.append(f"{prefix} copy | {copy:.1f} | {2e-3 * layer.bytes / copy:.0f} | | | |")
                for operation, ours, theirs, share, target in rows:
                    rate = FLOOR[operation] * layer.bytes / ours * 1e-3
                    goal = "" if target is None else f"{target:.0%}{'' if share >= target else ' missed'}"
                    lines.append(f"{prefix} {operation} | {ours:.1f} | {rate:.0f} | {share:.0%} | {goal} | "
                                 f"{theirs / ours:.2f} |")
                    if target is not None:
                        met, missed = met + (share >= target), missed + (share < target)
                        key = (operation, "NHWC" if last else "NCHW")
                        worst.setdefault(key, []).append((share, theirs / ours, name, type_name))
                lines.append(f"{prefix} stats, elemt (hot) | {hot:.1f} | | | | {hot_torch / hot:.2f} |")
                del layer
                torch.cuda.empty_cache()
    lines.append(f"\nstatistics of 8x64x49 with the signal to the host: {small_latency(kernels, replays):.1f} us")
    with open(options.results, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print(lines[0])
    print(f"{'operation':<16} {'layout':<6} {'of copy: least':>15} {'median':>7} {'x torch: least':>15} {'median':>7}")
    for (operation, layout), cells in worst.items():
        shares, ratios = [cell[0] for cell in cells], [cell[1] for cell in cells]
        print(f"{operation:<16} {layout:<6} {min(shares):>15.0%} {statistics.median(shares):>7.0%} "
              f"{min(ratios):>15.2f} {statistics.median(ratios):>7.2f}")
    print(lines[-1].strip())
    print(f"targets: {met} met, {missed} missed; the full table is in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
