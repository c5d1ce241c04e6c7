"""Activation checkpointing of torch 2 beyond torch.utils.checkpoint.checkpoint: selective, and composed with a module."""

import functools

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from torch.utils import checkpoint as checkpoints

CHANNELS = 3
ROWS = 6
SIZES = (2, 4)

if not hasattr(checkpoints, "create_selective_checkpoint_contexts"):
    pytest.skip("before torch 2.4, which has no selective checkpointing", allow_module_level=True)

POLICIES = checkpoints.CheckpointPolicy


def values(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3


class Plain(torch.nn.BatchNorm1d):
    """A subclass that counts its batches by itself, with a forward of its own."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        return torch.nn.functional.batch_norm(x, *statistics, self.weight, self.bias, True, self.momentum, self.eps)


def block(kind):
    """Sums stand before and behind the layer, since it takes sums of its own that are not the segment's."""
    made = torch.nn.ModuleDict({"linear": torch.nn.Linear(CHANNELS, CHANNELS), "bn": kind(CHANNELS)})
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(values(parameter.shape, index).abs())
    return made.double()


def plain_call(layer, x):
    return layer(x)


def masked_call(layer, x):
    if isinstance(layer, sync.SyncBatchNorm):
        return layer(x, torch.ones(len(x)))
    return layer(x)


def moments_call(layer, x):
    """The layer by its moments; those of torch on the whole batch."""
    if isinstance(layer, sync.SyncBatchNorm):
        mean, var = sync.moments(x, 0, layer="moments", worker=layer.worker)
    else:
        mean, var = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) * torch.rsqrt(var + layer.eps) * layer.weight + layer.bias


def run(model, call, x, dy, policy):
    """The output, the input's gradient, and the running statistics of one step."""

    def segment(x):
        x = model["linear"](x)
        x = x + x.sum(1, keepdim=True)
        y = call(model["bn"], x)
        return y * y.sum(1, keepdim=True)

    x = x.clone().requires_grad_()
    if policy is None:
        y = segment(x)
    else:
        contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, policy)
        y = checkpoints.checkpoint(segment, x, use_reentrant=False, context_fn=contexts)
    y.backward(dy)
    return y.detach(), x.grad


def everything(ctx, function, *args, **kwargs):
    return POLICIES.MUST_SAVE


def sums_and_products(ctx, function, *args, **kwargs):
    names = ("aten::sum", "aten::mul", "aten::addmm")
    return POLICIES.MUST_SAVE if function.name().startswith(names) else POLICIES.PREFER_RECOMPUTE


def nothing(ctx, function, *args, **kwargs):
    return POLICIES.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [sums_and_products, everything, nothing])
@pytest.mark.parametrize(
    "kind, call",
    [
        (torch.nn.BatchNorm1d, plain_call),
        (torch.nn.BatchNorm1d, masked_call),
        (torch.nn.BatchNorm1d, moments_call),
        (Plain, plain_call),
    ],
)
def test_selective_checkpoints(group, kind, call, policy):
    x, dy = values((ROWS, CHANNELS), 10), values((ROWS, CHANNELS), 11)
    whole = block(kind)
    expected = run(whole, call, x, dy, None)

    def work(worker):
        model = sync.convert_sync_batchnorm(block(kind), worker)
        found = run(model, call, x.split(SIZES)[worker.rank], dy.split(SIZES)[worker.rank], policy)
        return found, model

    results = group(len(SIZES), work)
    for found, want in zip(zip(*(outputs for outputs, _ in results)), expected):
        torch.testing.assert_close(torch.cat(found), want, rtol=1e-9, atol=1e-9)
    for name, parameter in whole.named_parameters():
        gradients = [dict(model.named_parameters())[name].grad for _, model in results]
        torch.testing.assert_close(sum(gradients), parameter.grad, rtol=1e-9, atol=1e-9)
    for _, model in results:
        for name, want in whole["bn"].named_buffers():
            torch.testing.assert_close(dict(model["bn"].named_buffers())[name], want, rtol=1e-9, atol=1e-9)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = block(torch.nn.BatchNorm1d), torch.nn.BatchNorm1d(CHANNELS).double()
        self.within = torch.nn.Sequential(self.inner["linear"], self.inner["bn"], torch.nn.ReLU())

    def forward(self, x):
        return self.outer(self.within(self.outer(x)))


def by_itself(model):
    return [model]


def one_within_another(model):
    return [model, model.within]


def each_layer(model):
    return [model.outer, model.within]


@pytest.mark.parametrize("modules", [by_itself, one_within_another, each_layer])
def test_checkpoints_composed_with_modules(group, modules):
    composable = pytest.importorskip("torch.distributed._composable")
    x, dy = values((ROWS, CHANNELS), 20), values((ROWS, CHANNELS), 21)

    def step(model, x, dy):
        x = x.clone().requires_grad_()
        y = model(x)
        y.backward(dy)
        return y.detach(), x.grad

    whole = Net()
    expected = [step(whole, x, dy) for _ in range(2)]

    def work(worker):
        model = sync.convert_sync_batchnorm(Net(), worker)
        for module in modules(model):
            composable.checkpoint(module)
        x_part, dy_part = x.split(SIZES)[worker.rank], dy.split(SIZES)[worker.rank]
        return [step(model, x_part, dy_part) for _ in range(2)], model, worker.stats().rounds

    results = group(len(SIZES), work)
    for index, wanted in enumerate(expected):
        for found, want in zip(zip(*(steps[index] for steps, _, _ in results)), wanted):
            torch.testing.assert_close(torch.cat(found), want, rtol=1e-9, atol=1e-9)
    for _, model, rounds in results:
        assert rounds == 2 * 2 * 3  # Two steps of three calls, forward and backward.
        for name, want in whole.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[name], want, rtol=1e-9, atol=1e-9)
