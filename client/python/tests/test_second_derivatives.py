"""Second derivatives of several workers, such as a gradient penalty needs, against torch's own layer in float64 on the
whole batch."""

import threading

import pytest

torch = pytest.importorskip("torch")

import second_derivatives
import syncbn.torch as sync
from second_derivatives import CHANNELS, TOLERANCE, close, random
from syncbn.torch import compat

SEED = 4242


def whole_normalize(x, mode, eps):
    """x normalized over the whole batch, without weight and bias, by operations that autograd differentiates twice."""
    if mode == "add":
        return torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps)
    dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
    mean, var = x.mean(dims).view(shape), x.var(dims, unbiased=False).view(shape)
    return (x - mean) / var.clamp(min=eps).sqrt()


def check(group, sizes, shape=(2,), *, mode="add", eps=1e-5, **options):
    print("seed", SEED)
    second_derivatives.check(
        group, sizes, shape, lambda x: whole_normalize(x, mode, eps), torch.Generator().manual_seed(SEED), mode=mode,
        eps=eps, **options,
    )


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 4, 2), (0, 4, 1), (3, 0)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_splits_of_the_batch(group, sizes, shape):
    check(group, sizes, shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dy_needs", [True, False])
@pytest.mark.parametrize("mode,eps", [("add", 1e-5), ("add", 2.0), ("clamp", 1e-5), ("clamp", 2.0), ("clamp", 1e3)])
def test_options(group, affine, dy_needs, mode, eps):
    check(group, (2, 3), affine=affine, mode=mode, eps=eps, dy_needs=dy_needs)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_types_and_layouts(group, dtype, layout):
    check(group, (2, 3), (3, 4), dtype=dtype, layout=layout)


@pytest.mark.parametrize("mode,eps", [("add", 1e-3), ("clamp", 1e-3), ("clamp", 100.0)])
def test_numerical_derivatives(group, mode, eps):
    def run(worker):
        torch.manual_seed(SEED)
        layer = sync.SyncBatchNorm(2, eps=eps, worker=worker, layer="bn", eps_mode=mode, dtype=torch.float64)
        x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

        def function(x, weight, bias):
            layer._parameters["weight"], layer._parameters["bias"] = weight, bias
            return layer(x)

        inputs = (x, torch.rand(2, dtype=torch.float64, requires_grad=True), layer.bias)
        return torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)

    assert group(1, run) == [True]


def make_critic():
    torch.manual_seed(SEED)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.Softplus(),
        torch.nn.Conv2d(4, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.Softplus(),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 1),
    ).double()


def penalty_step(model, x):
    """A critic's loss with a gradient penalty, summed over the batch."""
    x = x.clone().requires_grad_()
    score = model(x)
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    loss = score.sum() + 10.0 * (gradient.flatten(1).norm(dim=1) - 1.0).square().sum()
    loss.backward()
    return x.grad


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 3, 2)])
@pytest.mark.parametrize("replicas", [0, 2])
def test_a_gradient_penalty_is_that_of_the_whole_batch(group, sizes, replicas):
    generator = torch.Generator().manual_seed(SEED)
    x = random((sum(sizes), 1, 6, 6), generator)
    whole = make_critic()
    expected = penalty_step(whole, x)
    alone = threading.Lock()  # The random state is the process's.

    def run(worker):
        with alone:
            model = sync.convert_sync_batchnorm(make_critic(), worker)
        runner = compat.DataParallelWithCallback(model, replicas=replicas) if replicas else model
        gradient = penalty_step(runner, x.split(list(sizes))[worker.rank])
        sync.all_reduce_gradients(model, worker, weight=1.0 / len(sizes))
        return gradient, model

    results = group(len(sizes), run)
    close(torch.cat([gradient for gradient, _ in results]), expected)
    for _, model in results:
        for mine, wanted in zip(model.parameters(), whole.parameters()):
            close(mine.grad, wanted.grad)


def test_workers_that_need_other_gradients(group):
    """One worker differentiates with respect to its input, the other with respect to parameters alone."""
    generator = torch.Generator().manual_seed(SEED)
    x, c = random((5, CHANNELS), generator), random((5, CHANNELS), generator)
    whole_x = x.clone().requires_grad_()
    weights = torch.full((2, CHANNELS), 1.5, dtype=torch.float64, requires_grad=True)
    y = whole_normalize(whole_x, "add", 1e-5) * weights[torch.tensor([0, 0, 1, 1, 1])]
    of_x, of_weights = torch.autograd.grad((y * c).sum(), (whole_x, weights), create_graph=True)
    (of_x[:2].sin().sum() + of_weights[1].sum()).backward()

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        torch.nn.init.constant_(layer.weight, 1.5)
        part = x.split([2, 3])[worker.rank].clone().requires_grad_(worker.rank == 0)
        wanted = part if worker.rank == 0 else layer.weight
        (g,) = torch.autograd.grad((layer(part) * c.split([2, 3])[worker.rank]).sum(), wanted, create_graph=True)
        (g.sin() if worker.rank == 0 else g).sum().backward()
        return part.grad, layer.weight.grad

    results = group(2, run)
    close(results[0][0], whole_x.grad[:2])
    # A worker's share of the weight's gradient depends on which mean is counted where; their sum does not.
    close(results[0][1] + results[1][1], weights.grad.sum(0))


def test_a_layer_called_twice_and_two_second_passes(group):
    generator = torch.Generator().manual_seed(SEED)
    x = random((5, CHANNELS), generator)

    def gradients(layer, x):
        (g,) = torch.autograd.grad(layer(layer(x).sin() * 2).pow(3).sum(), x, create_graph=True)
        results = [torch.autograd.grad(g.pow(power).sum(), x, retain_graph=True)[0] for power in (2, 3)]
        return [g.detach(), *results]

    expected = gradients(torch.nn.BatchNorm1d(CHANNELS).double(), x.clone().requires_grad_())

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        return gradients(layer, x.split([2, 3])[worker.rank].clone().requires_grad_())

    results = group(2, run)
    for index, wanted in enumerate(expected):
        close(torch.cat([r[index] for r in results]), wanted)


@pytest.mark.parametrize("replicas", [0, 2])
def test_third_derivatives_are_refused(group, replicas):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        runner = compat.DataParallelWithCallback(layer, replicas=replicas) if replicas else layer
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(SEED), requires_grad=True)
        (g,) = torch.autograd.grad(runner(x).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no third"):
            h.sum().backward()

    group(1, run)


def test_a_group_that_goes_on_without_some_refuses_second_derivatives(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(SEED), requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="min_workers"):
            g.sum().backward()

    group(1, run, min_workers=1)


def test_different_orders_of_one_layers_passes_are_refused(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn", dtype=torch.float64)
        x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
        firsts = [torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0] for _ in range(2)]
        with pytest.raises(RuntimeError, match="same order"):
            firsts[worker.rank].pow(2).sum().backward()

    group(2, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("replicas", [0, 2])
def test_every_pass_through_one_forward_gives_the_same_bits(group, dtype, replicas):
    def run(worker):
        layer = sync.SyncBatchNorm(4, worker=worker, layer="bn", dtype=dtype)
        runner = compat.DataParallelWithCallback(layer, replicas=replicas) if replicas else layer
        generator = torch.Generator().manual_seed(SEED + worker.rank)
        x = torch.randn((7, 4, 9), generator=generator, dtype=dtype).requires_grad_()
        dy = torch.randn((7, 4, 9), generator=generator, dtype=dtype)
        y = runner(x)
        runs = [torch.autograd.grad(y, (x, layer.weight, layer.bias), dy, retain_graph=True) for _ in range(4)]
        return all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))

    assert group(2, run) == [True, True]
