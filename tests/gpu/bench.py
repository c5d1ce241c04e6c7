#!/usr/bin/env python3
"""Times each kernel against a copy of the same tensor and against torch, cuDNN and torch.compile, in one process.

Every figure is a median over replays of a CUDA graph. "cold": calls rotate over four or more sets of tensors that
together are three times the second-level cache and 120 MB at least; "hot": one set again and again. "forward" is
statistics, coefficients, normalization; "backward" likewise. report.py holds the rows against the targets.

    bench.py LIBRARY RESULTS.json [--quick] [--seconds N] [--what all | sweep | once]

--what sweep: the kernels alone, on a few shapes, to compare libraries; once: each kernel once or twice, for a profiler.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
import traceback

import torch

# Batch, channels, spatial extents.
SHAPES = [
    (32, 64, (112, 112)), (32, 256, (56, 56)), (128, 4, (224, 224)), (32, 512, (28, 28)), (32, 1024, (14, 14)),
    (32, 2048, (7, 7)), (2, 256, (128, 256)), (2, 32, (64, 64, 64)), (4096, 1024, ()),
    # Small ones, whose time is that of the parts that no bandwidth shortens.
    (32, 256, (14, 14)), (2, 64, (56, 56)), (2, 2048, (7, 7)),
]
# The case that torch.compile is tried on; each compilation takes seconds.
COMPILED = [(shape, dtype) for shape in (SHAPES[1], SHAPES[4]) for dtype in (torch.float32, torch.bfloat16)]
# For a sweep over libraries, and for a profiler: places in SHAPES, types, and whether channels are last.
SWEPT = [(0, torch.bfloat16, False), (0, torch.bfloat16, True), (1, torch.float32, True), (3, torch.float32, False),
         (4, torch.bfloat16, False), (4, torch.bfloat16, True), (9, torch.bfloat16, True), (10, torch.float32, False)]
PROFILED = [SWEPT[0], SWEPT[5]]
TYPES = {torch.float32: (0, 4, "fp32"), torch.float16: (2, 2, "fp16"), torch.bfloat16: (3, 2, "bf16")}
OPERATIONS = ("stats", "elemt", "backward_reduce", "backward_elemt", "forward", "backward")
# With a residual before a ReLU, and its gradient; timed in float32 and bfloat16.
FUSED = ("elemt, residual", "backward_reduce, mask", "backward_elemt, residual")
EPS = 1e-5
ROTATED = 120e6  # Bytes.
CUDNN_BACKWARD = torch.ops.aten.cudnn_batch_norm_backward
DEVICE = "cuda"  # In a rehearsal "cpu", and host/fake_cuda.py plays the rest.


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
        return torch.zeros(self.library.bench_workspace_bytes(ctypes.byref(shape)), dtype=torch.uint8, device=DEVICE)

    def call(self, name, shape, *arguments):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, "bench_" + name)(ctypes.byref(shape), stream, *map(as_c, arguments))
        if error:
            raise RuntimeError(f"{name}: {self.library.bench_error_string(error).decode()}")


def as_c(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else ctypes.c_size_t(argument)


def doubles(channels):
    return torch.empty(channels, device=DEVICE, dtype=torch.float64)


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
            return (torch.randn(size, device=DEVICE) * scale + shift).to(dtype).contiguous(memory_format=memory)

        self.x, self.dy = fresh(1.5, 2.0), fresh(1.0, 0.1)
        self.y, self.dx = torch.empty_like(self.x), torch.empty_like(self.x)


def time_calls(calls, seconds=0.03):
    """Median microseconds of one call, over replays of a graph of them all; results are kept for one round of calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # Compiles, loads, tunes.
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        each = (time.perf_counter() - begin) / len(calls)
    torch.cuda.current_stream().wait_stream(side)
    # A graph takes some microseconds to start: it is to be much longer than that, but not longer than a replay's share.
    rounds = max(1, min(64, round(seconds / 20 / (each * len(calls)))))
    graph = torch.cuda.CUDAGraph()
    kept = [None] * len(calls)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for index, call in enumerate(calls):
                kept[index] = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - begin < seconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (len(calls) * rounds))
    return statistics.median(times)


class Layer:
    """The state that the operations on one shape share."""

    def __init__(self, kernels, batch, channels, extents, dtype, last):
        spatial = 1
        for extent in extents:
            spatial *= extent
        self.kernels = kernels
        self.shape = Shape(batch, channels, spatial, TYPES[dtype][0], 1 if last else 0)
        self.bytes = batch * channels * spatial * TYPES[dtype][1]
        together = max(ROTATED, 3 * cache_bytes())
        count = max(4, int(-(-together // (2 * self.bytes))))
        self.sets = [Set(batch, channels, extents, dtype, last) for _ in range(count)]
        self.workspace = kernels.prepare(self.shape)
        # Parameters and statistics, as torch's operations take them, and in float64 as ours do.
        self.weight = torch.rand(channels, device=DEVICE) + 0.5
        self.bias = torch.randn(channels, device=DEVICE)
        self.running = [torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)]
        self.mean32, self.invstd32 = torch.batch_norm_stats(self.sets[0].x, EPS)
        self.mean, self.m2, self.sum_dy, self.sum_xmu = (doubles(channels) for _ in range(4))
        self.made_mean, self.made_scale, self.made_shift, self.made_mean_dy, self.made_projection = (
            doubles(channels) for _ in range(5))
        self.weight_gradient, self.bias_gradient = torch.empty_like(self.weight), torch.empty_like(self.bias)
        self.scale, self.shift = (self.weight * self.invstd32).double(), self.bias.double()
        self.known_mean = self.mean32.double()
        self.count = batch * spatial
        self.known_var = 1 / self.invstd32.double() ** 2 - EPS
        self.counts = torch.tensor([self.count], dtype=torch.int32, device=DEVICE)
        sums = torch.batch_norm_backward_reduce(self.sets[0].dy, self.sets[0].x, self.mean32, self.invstd32,
                                                self.weight, True, True, True)
        self.sum32, self.sum_xmu32 = sums[0], sums[1]
        # By torch's sums in float64, since those of 16 bits may have overflowed.
        self.others = [axis for axis in range(self.sets[0].x.dim()) if axis != 1]
        sum_dy, products = self.exact_sums(self.known_mean)
        self.mean_dy = sum_dy / self.count
        self.projection = products * self.invstd32.double() ** 2 / self.count
        self.compiled = {}
        # Every other element is let through.
        self.mask = torch.full(((self.sets[0].x.numel() + 7) // 8,), 0x55, dtype=torch.uint8, device=DEVICE)

    def of_channels(self, vector):
        """A number for each channel, in a form that goes with the tensors."""
        return vector.view([1, -1] + [1] * (len(self.others) - 1))

    def exact_sums(self, mean):
        """Those of the first set's dy, and of dy * (x - mean), in float64."""
        dy, x = self.sets[0].dy.double(), self.sets[0].x.double()
        return dy.sum(self.others), (dy * (x - self.of_channels(mean))).sum(self.others)

    def ours(self, operation, s):
        k, shape, ws = self.kernels, self.shape, self.workspace
        if operation == "stats":
            k.call("stats", shape, ws, ws.numel(), s.x, self.mean, self.m2, None)
        elif operation == "elemt":
            k.call("elemt", shape, s.x, self.known_mean, self.scale, self.shift, None, 0, None, s.y)
        elif operation == "backward_reduce":
            k.call("backward_reduce", shape, ws, ws.numel(), s.dy, s.x, self.known_mean, None, self.sum_dy,
                   self.sum_xmu)
        elif operation == "backward_elemt":
            k.call("backward_elemt", shape, s.dy, s.x, self.known_mean, self.scale, self.mean_dy, self.projection, None,
                   s.dx, None)
        elif operation == "elemt, residual":  # dy has the residual's form.
            k.call("elemt", shape, s.x, self.known_mean, self.scale, self.shift, s.dy, 1, self.mask, s.y)
        elif operation == "backward_reduce, mask":
            k.call("backward_reduce", shape, ws, ws.numel(), s.dy, s.x, self.known_mean, self.mask, self.sum_dy,
                   self.sum_xmu)
        elif operation == "backward_elemt, residual":
            k.call("backward_elemt", shape, s.dy, s.x, self.known_mean, self.scale, self.mean_dy, self.projection,
                   self.mask, s.dx, s.y)
        elif operation == "forward":
            self.ours("stats", s)
            made = (self.made_mean, self.made_scale, self.made_shift)
            k.call("finalize_forward", shape, self.count, self.mean, self.known_var, self.weight, self.bias, *made)
            k.call("elemt", shape, s.x, *made, None, 0, None, s.y)
        else:
            self.ours("backward_reduce", s)
            made = (self.made_scale, self.made_mean_dy, self.made_projection)
            k.call("finalize_backward", shape, self.count, self.known_var, self.sum_dy, self.sum_xmu, self.weight, *made,
                   self.weight_gradient, self.bias_gradient)
            k.call("backward_elemt", shape, s.dy, s.x, self.known_mean, *made, None, s.dx, None)

    def torchs(self, operation, s):
        if operation == "stats":
            return torch.batch_norm_stats(s.x, EPS)
        if operation == "elemt":
            return torch.batch_norm_elemt(s.x, self.weight, self.bias, self.mean32, self.invstd32, EPS)
        if operation == "backward_reduce":
            return torch.batch_norm_backward_reduce(s.dy, s.x, self.mean32, self.invstd32, self.weight, True, True,
                                                    True)
        if operation == "backward_elemt":
            return torch.batch_norm_backward_elemt(s.dy, s.x, self.mean32, self.invstd32, self.weight, self.sum32,
                                                   self.sum_xmu32, self.counts)
        if operation == "forward":
            mean, invstd = torch.batch_norm_stats(s.x, EPS)
            return torch.batch_norm_elemt(s.x, self.weight, self.bias, mean, invstd, EPS)
        sums = self.torchs("backward_reduce", s)
        return torch.batch_norm_backward_elemt(s.dy, s.x, self.mean32, self.invstd32, self.weight, sums[0], sums[1],
                                               self.counts)

    def cudnns(self, operation, s):
        if operation == "forward":
            return torch.cudnn_batch_norm(s.x, self.weight, self.bias, *self.running, True, 0.1, EPS)
        if not hasattr(s, "reserve"):
            s.reserve = torch.cudnn_batch_norm(s.x, self.weight, self.bias, *self.running, True, 0.1, EPS)[1:]
        mean, invstd, reserve = s.reserve
        return CUDNN_BACKWARD(s.x, s.dy, self.weight, *self.running, mean, invstd, EPS, reserve)

    def compiles(self, operation, s):
        if operation not in self.compiled:
            self.compiled[operation] = torch.compile(FORWARD if operation == "forward" else BACKWARD, dynamic=False)
        if operation == "forward":
            return self.compiled[operation](s.x, self.weight, self.bias)
        return self.compiled[operation](s.dy, s.x, self.weight, self.mean32, self.invstd32)

    def check(self):
        """Checks the results by torch's arithmetic in float64. Its own batch normalization in 16 bits is off by a
        thousandth in long sums, and overflows in the longest.
        """
        s = self.sets[0]
        x, dy = s.x.double(), s.dy.double()
        var, mean = torch.var_mean(x, self.others, unbiased=False)
        centred, scale = x - self.of_channels(mean), self.weight.double() / (var + EPS).sqrt()
        sums = self.exact_sums(mean)
        slope = sums[1] / (var + EPS) / self.count
        y = centred * self.of_channels(scale) + self.of_channels(self.bias.double())
        dx = dy - self.of_channels(sums[0] / self.count) - centred * self.of_channels(slope)
        dx *= self.of_channels(scale)
        loose = {"rtol": 2e-2, "atol": 2e-2}
        for operation in OPERATIONS:
            self.ours(operation, s)
            if operation in ("elemt", "forward"):
                torch.testing.assert_close(s.y.double(), y, **loose)
            if operation in ("backward_elemt", "backward"):
                torch.testing.assert_close(s.dx.double(), dx, **loose)
        torch.testing.assert_close(self.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(self.m2 / self.count, var, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(self.sum_dy, sums[0], rtol=1e-5, atol=1e-5 * self.count**0.5)
        products = self.exact_sums(self.known_mean)[1]
        torch.testing.assert_close(self.sum_xmu, products, rtol=1e-5, atol=1e-5 * self.count**0.5)


def FORWARD(x, weight, bias):
    return torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def BACKWARD(dy, x, weight, mean, invstd):
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dy, x, weight, None, None, mean, invstd, True, EPS, [True, True, True])


class Bench:
    """The rows measured so far, written to a file after each layer, and the time that is left."""

    def __init__(self, kernels, path, seconds):
        self.kernels, self.path = kernels, path
        self.give_up = time.monotonic() + seconds
        self.rows, self.notes, self.failures = [], [], 0
        self.machine = (f"GPU: {torch.cuda.get_device_name(0)}; torch {torch.__version__}; CUDA {torch.version.cuda}; "
                        f"cuDNN {cudnn_version()}")

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", flush=True)

    def write(self):
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            json.dump({"machine": self.machine, "rows": self.rows, "notes": self.notes}, file)
        os.replace(self.path + ".part", self.path)

    def rival(self, name, calls):
        """A rival's time; None, and a note, if it does not run."""
        try:
            return time_calls(calls)
        except Exception as error:  # Another library may raise anything.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.note(f"{name} does not run: {first[:200]}")
            return None

    def row(self, layer, fields, operation, copy, sets, cache):
        rivals = {}
        if operation not in FUSED:
            rivals["torch"] = self.rival("torch", [lambda s=s: layer.torchs(operation, s) for s in sets])
        if operation in ("forward", "backward") and "x" in fields["shape"].partition("x")[2]:
            rivals["cudnn"] = self.rival("cuDNN", [lambda s=s: layer.cudnns(operation, s) for s in sets])
        ours = time_calls([lambda s=s: layer.ours(operation, s) for s in sets])
        self.rows.append({**fields, "operation": operation, "cache": cache, "us": ours, "copy_us": copy,
                          "rivals": {name: us for name, us in rivals.items() if us}})

    def layer(self, batch, channels, extents, dtype, last):
        layer = Layer(self.kernels, batch, channels, extents, dtype, last)
        layer.check()
        # A copy engine or a kernel, whichever is faster.
        copy = min(time_calls([lambda s=s: s.y.copy_(s.x) for s in layer.sets]),
                   time_calls([lambda s=s: torch.neg(s.x, out=s.y) for s in layer.sets]))
        fields = {"shape": "x".join(map(str, (batch, channels, *extents))), "channels": channels,
                  "layout": "NHWC" if last else "NCHW", "type": TYPES[dtype][2], "bytes": layer.bytes}
        self.rows.append({**fields, "operation": "copy", "cache": "cold", "us": copy, "copy_us": copy, "rivals": {}})
        for operation in OPERATIONS:
            self.row(layer, fields, operation, copy, layer.sets, "cold")
        for operation in FUSED if dtype != torch.float16 else ():
            self.row(layer, fields, operation, copy, layer.sets, "cold")
        for operation in ("forward", "backward"):
            self.row(layer, fields, operation, copy, [layer.sets[0]] * 4, "hot")

    def compiled(self, batch, channels, extents, dtype, last):
        """Adds torch.compile's times to the rows of a layer that was timed."""
        if hasattr(torch, "compiler"):
            torch.compiler.reset()  # It keeps no more than a few variants of a function.
        name = "x".join(map(str, (batch, channels, *extents)))
        rows = [row for row in self.rows
                if (row["shape"], row["layout"], row["type"]) == (name, "NHWC" if last else "NCHW", TYPES[dtype][2])
                and row["operation"] in ("forward", "backward") and row["cache"] == "cold"]
        layer = Layer(self.kernels, batch, channels, extents, dtype, last) if rows else None
        for row in rows:
            calls = [lambda s=s: layer.compiles(row["operation"], s) for s in layer.sets]
            us = self.rival("torch.compile", calls)
            if us:
                row["rivals"]["compile"] = us

    def swept(self, batch, channels, extents, dtype, last):
        """The kernels alone, without a rival."""
        layer = Layer(self.kernels, batch, channels, extents, dtype, last)
        name = "x".join(map(str, (batch, channels, *extents)))
        fields = {"shape": name, "layout": "NHWC" if last else "NCHW", "type": TYPES[dtype][2]}
        for operation in OPERATIONS[:4]:
            us = time_calls([lambda s=s: layer.ours(operation, s) for s in layer.sets])
            self.rows.append({**fields, "operation": operation, "us": us})

    def once(self, batch, channels, extents, dtype, last):
        """Each operation once, outside of a graph."""
        layer = Layer(self.kernels, batch, channels, extents, dtype, last)
        for operation in OPERATIONS:
            layer.ours(operation, layer.sets[0])
        torch.cuda.synchronize()
        self.rows.append({"shape": "x".join(map(str, (batch, channels, *extents)))})

    def each(self, what, function, cases, reserve):
        """Calls function(*case) for all cases, as long as `reserve` seconds are left."""
        for index, case in enumerate(cases):
            if time.monotonic() + reserve > self.give_up:
                self.note(f"{what}: no time for the last {len(cases) - index} of {len(cases)}")
                return
            try:
                function(*case)
            except torch.cuda.OutOfMemoryError:
                self.note(f"{what}: not enough memory for {case}")
            except Exception:
                self.failures += 1
                self.note(f"{what}: {case} failed")
                traceback.print_exc()
            self.write()
            torch.cuda.empty_cache()

    def small(self):
        """The statistics of a small tensor with the signal to the host."""
        shape = Shape(8, 64, 49, 0, 0)
        x = torch.randn(8, 64, 7, 7, device=DEVICE)
        mean, m2 = (pinned(torch.empty(64, dtype=torch.float64)) for _ in range(2))
        flag = pinned(torch.zeros(16, dtype=torch.int32))
        workspace = self.kernels.prepare(shape)
        arguments = (workspace, workspace.numel(), x, mean, m2, flag)
        us = time_calls([lambda: self.kernels.call("stats", shape, *arguments)] * 16)
        theirs = self.rival("torch", [lambda: torch.batch_norm_stats(x, EPS)] * 16)
        self.rows.append({"shape": "8x64x7x7", "channels": 64, "layout": "NCHW", "type": "fp32", "bytes": x.numel() * 4,
                          "operation": "stats with flag", "cache": "hot", "us": us,
                          "rivals": {"torch": theirs} if theirs else {}})


def cache_bytes():
    """Returns the size of the second level's cache. Older torches do not know it: 50 MiB then."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)


def cudnn_version():
    return torch.backends.cudnn.version() if DEVICE == "cuda" else None


def pinned(tensor):
    return tensor.pin_memory() if DEVICE == "cuda" else tensor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0, help="what does not fit is left out, with a note")
    parser.add_argument("--what", choices=["all", "sweep", "once"], default="all")
    parser.add_argument("--on-host", action="store_true", help="a rehearsal, with the library for it")
    options = parser.parse_args()
    if not options.on_host and not torch.cuda.is_available():
        print("skipped: torch has no NVIDIA GPU")
        return 0
    if options.on_host:
        sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "host"))
        import fake_cuda

        fake_cuda.install(sys.modules[__name__])
    torch.manual_seed(1)
    bench = Bench(Kernels(options.library), options.results, options.seconds)
    if options.what != "all":
        picked = SWEPT if options.what == "sweep" else PROFILED
        bench.each("kernels", bench.swept if options.what == "sweep" else bench.once,
                   # A rehearsal has fewer shapes.
                   [(*SHAPES[index % len(SHAPES)], dtype, last) for index, dtype, last in picked], 1)
        print(f"{options.what}: {len(bench.rows)} rows, {bench.failures} failed, {len(bench.notes)} notes")
        return bench.failures > 0
    bench.each("small statistics", bench.small, [()], 0)
    shapes = SHAPES[:2] if options.quick else SHAPES
    cases = [(*shape, dtype, last) for shape in shapes for dtype in TYPES for last in (False, True)
             if shape[2] or not last]
    bench.each("kernels", bench.layer, cases, 2)
    compiled = [(*shape, dtype, last) for shape, dtype in COMPILED if shape in shapes for last in (False, True)]
    bench.each("torch.compile", bench.compiled, compiled, 20)
    print(f"kernels timed: {len(bench.rows)} rows, {bench.failures} failed, {len(bench.notes)} notes")
    return bench.failures > 0


if __name__ == "__main__":
    sys.exit(main())
