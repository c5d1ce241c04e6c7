"""Converted models beside the original on the whole batch, and subclasses as programs write them.

At a module's level, so that pickles find the classes.
"""

import threading

import torch
import torch.utils.checkpoint

import syncbn.torch as sync

SEED = 5150
CHANNELS = 3
DOUBLE = torch.float64


def values(shape, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE) * 2 + 3


def filled(module):
    """Parameters and running statistics that are not those of a new layer."""
    with torch.no_grad():
        for index, (name, value) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            if value.is_floating_point():
                value.copy_(values(value.shape, index).abs() + 0.5)
    return module.double()


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected.detach(), rtol=tolerance, atol=tolerance, check_stride=False)


def step(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y.detach(), x.grad


def checkpointed(reentrant):
    """Returns a step that runs a converted model as one checkpointed segment, and any other as it is."""

    def call(model, x, dy):
        if not hasattr(model[0], "layer"):
            return step(model, x, dy)
        x = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.backward(dy)
        return y.detach(), x.grad

    return call


def converted(layer, worker):
    """A model of one converted layer, with the name "0"."""
    return sync.convert_sync_batchnorm(torch.nn.Sequential(filled(layer)), worker)


def as_on_the_whole_batch(group, make, shape=(6, CHANNELS), sizes=(2, 4), steps=2, call=step):
    """Compares converted models of two workers with the original model on the whole batch."""
    batches = [(values((sum(sizes),) + shape[1:], 10 + i), values((sum(sizes),) + shape[1:], 20 + i)) for i in range(steps)]
    whole = make()
    expected = [call(whole, *batch) for batch in batches]
    models = threading.Lock()

    def run(worker):
        with models:
            model = make()
        model = sync.convert_sync_batchnorm(model, worker)
        parts = [[v.split(list(sizes))[worker.rank].clone() for v in batch] for batch in batches]
        results = [call(model, *part) for part in parts]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return results, state, {n: p.grad for n, p in model.named_parameters()}, model

    results = group(len(sizes), run)
    for index, wanted in enumerate(expected):
        for actual, want in zip(zip(*[r[0][index] for r in results]), wanted):
            close(torch.cat(actual), want)
    for _, state, _, _ in results:
        assert list(state) == list(whole.state_dict())
        for name, want in whole.state_dict().items():
            close(state[name], want)
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            close(sum(r[2][name] for r in results), parameter.grad)
    return [r[3] for r in results]


class Activated(torch.nn.BatchNorm1d):
    """A layer as libraries write it: torch's forward pasted, and an activation behind it."""

    def __init__(self, channels, slope, **options):
        super().__init__(channels, **options)
        self.slope = slope
        self.act = torch.nn.LeakyReLU(slope)

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        x = torch.nn.functional.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        return self.act(x)


class AroundSuper(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.sin()) * 2


class OfTorch(torch.nn.BatchNorm1d):
    """Calls torch.batch_norm itself, with a scaled weight."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
        return torch.batch_norm(
            x, self.weight * 2, self.bias, self.running_mean, self.running_var, self.training, 0.3, 0.2, False
        )


class Frozen(torch.nn.BatchNorm1d):
    """Normalizes as in evaluation, whichever mode the model is in."""

    def train(self, mode=True):
        return super().train(False)


class FrozenHalfWay(torch.nn.BatchNorm1d):
    """Normalizes with its running statistics in training."""

    def forward(self, x):
        return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


class Slotted(torch.nn.BatchNorm1d):
    __slots__ = ("scale",)

    def forward(self, x):
        return super().forward(x) * self.scale


class Nested(torch.nn.BatchNorm1d):
    """Contains batch normalizations of the same size, and a helper that calls batch_norm itself."""

    class Helper(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.batch_norm(x, None, None, training=True)

    def __init__(self, channels):
        super().__init__(channels)
        self.inner = torch.nn.BatchNorm1d(channels)
        self.innermost = Activated(channels, 0.1)

    def forward(self, x):
        return self.innermost(super().forward(self.inner(x).sin() * 3))


class AroundTorchs(torch.nn.SyncBatchNorm):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class CustomPickle(torch.nn.BatchNorm1d):
    def __reduce__(self):
        return _custom, (self.num_features,), self.__dict__.copy()

    def forward(self, x):
        return super().forward(x) + 1


class OfAnOperation(torch.nn.BatchNorm1d):
    """Names torch's operation, and its overload."""

    overload = False

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        function = torch.ops.aten.batch_norm.default if self.overload else torch.ops.aten.batch_norm
        statistics = (self.running_mean, self.running_var)
        return function(x, self.weight, self.bias, *statistics, self.training, self.momentum, self.eps, False)


def of_an_overload():
    layer = OfAnOperation(CHANNELS)
    layer.overload = True
    return layer


def _custom(channels):
    return CustomPickle(channels)


def slotted():
    layer = Slotted(CHANNELS)
    layer.scale = 3.0
    return layer


KINDS = {
    "activated": lambda: Activated(CHANNELS, 0.2),
    "cumulative": lambda: Activated(CHANNELS, 0.2, momentum=None),
    "untracked": lambda: Activated(CHANNELS, 0.2, track_running_stats=False),
    "without parameters": lambda: Activated(CHANNELS, 0.2, affine=False),
    "around super": lambda: AroundSuper(CHANNELS),
    "torch.batch_norm": lambda: OfTorch(CHANNELS),
    "torch.ops.aten.batch_norm": lambda: OfAnOperation(CHANNELS),
    "torch.ops.aten.batch_norm.default": of_an_overload,
    "frozen": lambda: Frozen(CHANNELS),
    "frozen half way": lambda: FrozenHalfWay(CHANNELS),
    "slots": slotted,
    "nested": lambda: Nested(CHANNELS),
    "custom pickle": lambda: CustomPickle(CHANNELS),
}
