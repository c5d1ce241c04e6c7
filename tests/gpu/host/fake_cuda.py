"""As much of torch.cuda as bench.py uses, played by the CPU: a rehearsal of the script, not of speed.

What stands in for a class or a function of torch is held against the original, where this build of torch has it: a
method that the original lacks, or arguments that the original operation does not take, are errors here too.
"""

import contextlib
import time
import types

import torch

_small_shapes = [(2, 64, (5, 4)), (3, 256, (3, 3)), (4, 4, (6, 6)), (2, 8, (3, 2, 2)), (40, 24, ())]


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Event:
    def __init__(self, enable_timing=False):
        self.enable_timing, self.time = enable_timing, None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, end):
        assert self.enable_timing and end.enable_timing
        return max(1e-6, (end.time - self.time) * 1e3)


class CUDAGraph:
    """Replays nothing: the calls were made while it was captured."""

    captured = False

    def replay(self):
        assert self.captured


@contextlib.contextmanager
def graph(cuda_graph):
    yield
    cuda_graph.captured = True


def _per_channel(vector, x):
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def _others(x):
    return [dim for dim in range(x.dim()) if dim != 1]


def batch_norm_stats(x, eps):
    wide = x.double()
    var, mean = torch.var_mean(wide, _others(x), unbiased=False)
    return mean.float(), (var + eps).rsqrt().float()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    w, b, m, i = (_per_channel(v, x) for v in (weight, bias, mean, invstd))
    return ((x.float() - m) * i * w + b).to(x.dtype)


def batch_norm_backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    sum_dy = dy.float().sum(_others(x))
    sum_xmu = (dy.float() * (x.float() - _per_channel(mean, x))).sum(_others(x))
    return sum_dy, sum_xmu, sum_xmu * invstd, sum_dy


def batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    m, i, w, a, b = (_per_channel(v, x) for v in (mean, invstd, weight, sum_dy / count, sum_dy_xmu / count))
    return ((dy.float() - a - (x.float() - m) * i * i * b) * i * w).to(x.dtype)


def cudnn_batch_norm(x, weight, bias, running_mean, running_var, training, factor, eps):
    mean, invstd = batch_norm_stats(x, eps)
    return batch_norm_elemt(x, weight, bias, mean, invstd, eps), mean, invstd, torch.empty(0, dtype=torch.uint8)


def cudnn_batch_norm_backward(x, dy, weight, running_mean, running_var, mean, invstd, eps, reserve):
    sums = batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
    return batch_norm_backward_elemt(dy, x, mean, invstd, weight, sums[0], sums[1], x.numel() / x.size(1)), *sums[2:]


def _operation(replacement):
    """The replacement, behind a call of the original that must get as far as finding that the CPU has no such kernel."""
    original = getattr(torch.ops.aten, replacement.__name__)

    def call(*arguments):
        try:
            original(*arguments)
        except NotImplementedError:
            pass  # The arguments are in order.
        return replacement(*arguments)

    return call


def install(bench):
    """Puts all of it in torch's place, for bench.py as a module; its shapes become small."""
    cuda_build = torch.version.cuda is not None
    for fake, real in ((Stream, torch.cuda.Stream), (Event, torch.cuda.Event), (CUDAGraph, torch.cuda.CUDAGraph)):
        # A torch without CUDA has these classes without their methods.
        names = [name for name in vars(fake) if name[0] != "_" and name != "captured"]
        missing = [name for name in names if not hasattr(real, name)]
        assert not (cuda_build and missing), (real, missing)
        setattr(torch.cuda, fake.__name__, fake)
    properties = types.SimpleNamespace(L2_cache_size=1000)
    for name, replacement in {
        "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda index: "none, the host plays one",
        "get_device_properties": lambda index: properties,
    }.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, replacement)
    for replacement in (batch_norm_stats, batch_norm_elemt, batch_norm_backward_reduce, batch_norm_backward_elemt,
                        cudnn_batch_norm):
        assert hasattr(torch, replacement.__name__), replacement
        setattr(torch, replacement.__name__, _operation(replacement))
    backward = _operation(cudnn_batch_norm_backward)
    torch.ops.aten.cudnn_batch_norm_backward = backward
    bench.DEVICE = "cpu"
    bench.SHAPES, bench.ROTATED = _small_shapes, 1000
    bench.COMPILED = [(_small_shapes[0], torch.float32)]
    if not hasattr(torch.cuda, "OutOfMemoryError"):
        torch.cuda.OutOfMemoryError = MemoryError
