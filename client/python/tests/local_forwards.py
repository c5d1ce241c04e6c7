"""Forwards that take statistics of the local batch by means that no list of operations is complete in."""

import threading

import torch
import torch.nn.functional as F

CHANNELS = 3


class _Formula(torch.nn.BatchNorm1d):
    """Normalizes with the statistics of `sums`, a function from [N, C] to the sums [C]."""

    def forward(self, x):
        mean = self.sums(x) / len(x)
        var = self.sums((x - mean) ** 2) / len(x)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


def ones(x):
    return torch.ones(len(x), dtype=x.dtype)


def added_by_index(x):
    return torch.zeros(1, CHANNELS, dtype=x.dtype).index_add(0, torch.zeros(len(x), dtype=torch.long), x)[0]


def added_in_a_loop(x):
    total = 0.0
    for row in x:
        total = total + row
    return total


SUMS = {
    "einsum": lambda x: torch.einsum("nc->c", x),
    "tensordot": lambda x: torch.tensordot(ones(x), x, 1),
    "product with ones": lambda x: ones(x) @ x,
    "linear": lambda x: F.linear(ones(x), x.t()),
    "cumsum": lambda x: x.cumsum(0)[-1],
    "pooling": lambda x: F.avg_pool1d(x.t()[None], len(x))[0, :, 0] * len(x),
    "adaptive pooling": lambda x: F.adaptive_avg_pool1d(x.t()[None], 1)[0, :, 0] * len(x),
    "index_add": added_by_index,
    "loop": added_in_a_loop,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().sum(0)),
}


def formula(sums):
    layer = _Formula(CHANNELS)
    layer.sums = sums
    return layer


def rows_as_channels(x):
    return x.t()[None]


WHOLE = {
    "covariance": lambda layer, x: x / torch.sqrt(torch.cov(x.t()).diagonal()),
    "instance_norm": lambda layer, x: F.instance_norm(rows_as_channels(x))[0].t(),
    "layer_norm": lambda layer, x: F.layer_norm(x.t(), (len(x),)).t(),
    "group_norm": lambda layer, x: F.group_norm(rows_as_channels(x), CHANNELS)[0].t(),
    "vector_norm": lambda layer, x: x / torch.linalg.vector_norm(x, dim=0),
    "normalize": lambda layer, x: F.normalize(x, dim=0),
    "median": lambda layer, x: x - torch.median(x, 0).values,
    "largest": lambda layer, x: x / torch.amax(x.abs(), 0),
    "first row": lambda layer, x: x - x[0],
    "as in evaluation": lambda layer, x: F.batch_norm(x, x.mean(0), x.var(0), layer.weight, layer.bias, False),
    "hidden layer": lambda layer, x: layer.hidden[0](x),
    "thread": lambda layer, x: on_a_thread(lambda: F.batch_norm(x, None, None, layer.weight, layer.bias, True)),
    "super on a thread": lambda layer, x: on_a_thread(lambda: torch.nn.BatchNorm1d.forward(layer, x)),
    "child module": lambda layer, x: layer.child(x),
    "library": lambda layer, x: torch.ops.syncbn_tests.normalize(x),
}


def on_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


# An operation of a program's own: what it calls is not seen from Python.
_library = torch.library.Library("syncbn_tests", "DEF")
_library.define("normalize(Tensor x) -> Tensor")
_library.impl(
    "normalize",
    lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
    "CompositeImplicitAutograd",
)


class Child(torch.nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Whole(torch.nn.BatchNorm1d):
    def __init__(self, name):
        super().__init__(CHANNELS)
        self.function, self.child = WHOLE[name], Child()
        self.hidden = [torch.nn.BatchNorm1d(CHANNELS, dtype=torch.float64)]

    def forward(self, x):
        return self.function(self, x)


class RunningAlone(torch.nn.BatchNorm1d):
    """Normalizes nothing; its running mean is the local one."""

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * torch.einsum("nc->c", x.detach()) / len(x)
        return x * self.weight


class OwnCall(torch.nn.BatchNorm1d):
    """Normalizes without its forward."""

    def __call__(self, x):
        return x - torch.einsum("nc->c", x) / len(x)


LOCAL = {
    **{name: lambda sums=sums: formula(sums) for name, sums in SUMS.items()},
    **{name: lambda name=name: Whole(name) for name in WHOLE},
    "running mean": lambda: RunningAlone(CHANNELS),
    "own __call__": lambda: OwnCall(CHANNELS),
}
