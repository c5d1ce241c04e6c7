"""SyncBatchNorm with an activation and an addend, against torch's operations on the whole batch in float64."""

import copy

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync

SIZES = [3, 0, 5]
SEED = 733


def normal(*size, seed=SEED):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_batch(x, z, weight, bias, mean, var):
    """(y, its gradients of x, z, weight and bias); the running statistics are updated in place."""
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias) + (() if z is None else (z,))]
    y = torch.nn.functional.batch_norm(inputs[0], mean, var, inputs[1], inputs[2], True, 0.1, 1e-5)
    y = torch.relu(y if z is None else y + inputs[3])
    (y**2 + y).sum().backward()
    return [y.detach()] + [t.grad for t in inputs]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("form", ["2-D", "contiguous", "channels last", "strided"])
def test_training_is_that_of_the_whole_batch(group, added, form):
    x = normal(sum(SIZES), 5) if form == "2-D" else normal(sum(SIZES), 5, 3, 2)
    z = normal(*x.shape, seed=SEED + 1) if added else None
    weight, bias = normal(5, seed=2), normal(5, seed=3)
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    expected = whole_batch(x, z, weight, bias, mean, var)

    def laid_out(t):
        if form == "channels last":
            return t.contiguous(memory_format=torch.channels_last)
        return t.transpose(0, 1).contiguous().transpose(0, 1) if form == "strided" else t

    def run(worker):
        layer = sync.SyncBatchNorm(5, dtype=torch.float64, worker=worker, activation="relu")
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        part = laid_out(x.split(SIZES)[worker.rank].clone()).requires_grad_()
        # z's own layout is free.
        addend = z.split(SIZES)[worker.rank].clone().requires_grad_() if added else None
        y = layer(part, z=addend)
        assert y.stride() == part.stride() or form == "strided"
        (y**2 + y).sum().backward()
        found = [y.detach(), part.grad, layer.weight.grad, layer.bias.grad]
        return found + ([addend.grad] if added else []), layer.running_mean, layer.running_var

    results = group(len(SIZES), run)
    for rank, (found, own_mean, own_var) in enumerate(results):
        for actual, wanted in [(found[0], expected[0]), (found[1], expected[1])] + ([(found[4], expected[4])] if added else []):
            torch.testing.assert_close(actual, wanted.split(SIZES)[rank], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_var, var, rtol=1e-12, atol=1e-12)
    for index in (2, 3):  # Gradients of the parameters are a worker's own.
        total = sum(found[index] for found, _, _ in results)
        torch.testing.assert_close(total, expected[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("relu", [False, True])
def test_an_addend_alone_may_need_a_gradient(group, relu):
    x, z = normal(6, 3), normal(6, 3, seed=9)
    normalized = torch.nn.functional.batch_norm(x, None, None, None, None, True)
    wanted = z.clone().requires_grad_()
    y = torch.relu(normalized + wanted) if relu else normalized + wanted
    (y**3).sum().backward()

    def run(worker):
        layer = sync.SyncBatchNorm(
            3, affine=False, dtype=torch.float64, worker=worker, activation="relu" if relu else None
        )
        addend = z.split([2, 4])[worker.rank].clone().requires_grad_()
        (layer(x.split([2, 4])[worker.rank], z=addend) ** 3).sum().backward()
        return addend.grad

    for rank, gradient in enumerate(group(2, run)):
        torch.testing.assert_close(gradient, wanted.grad.split([2, 4])[rank], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_second_derivatives(group, channels_last):
    x, z = normal(5, 3, 2, 2), normal(5, 3, 2, 2, seed=9)

    def penalty(y, x, z):
        gradients = torch.autograd.grad((y**3).sum(), (x, z), create_graph=True)
        return sum((g**2).sum() for g in gradients)

    whole, addend = x.clone().requires_grad_(), z.clone().requires_grad_()
    y = torch.relu(torch.nn.functional.batch_norm(whole, None, None, None, None, True) + addend)
    expected = torch.autograd.grad(penalty(y, whole, addend), (whole, addend))

    def run(worker):
        layer = sync.SyncBatchNorm(3, dtype=torch.float64, worker=worker, activation="relu")
        memory = torch.channels_last if channels_last else torch.contiguous_format
        part, own = (
            t.split([2, 3])[worker.rank].clone().contiguous(memory_format=memory).requires_grad_() for t in (x, z)
        )
        return torch.autograd.grad(penalty(layer(part, z=own), part, own), (part, own))

    for rank, found in enumerate(group(2, run)):
        for actual, wanted in zip(found, expected):
            torch.testing.assert_close(actual, wanted.split([2, 3])[rank], rtol=1e-9, atol=1e-9)


def test_a_mask_goes_with_an_activation(group):
    x, z, mask = normal(6, 3, 4), normal(6, 3, 4, seed=9), normal(6, 4, seed=10) > 0
    wide = x.clone().requires_grad_()
    rows = wide.movedim(1, -1)[mask]
    mean, var = rows.mean(0), rows.var(0, unbiased=False)
    y = torch.relu((wide - mean[:, None]) / (var[:, None] + 1e-5).sqrt() + z)
    (y**3).sum().backward()

    def run(worker):
        layer = sync.SyncBatchNorm(3, dtype=torch.float64, worker=worker, activation="relu")
        part = x.split([2, 4])[worker.rank].clone().requires_grad_()
        out = layer(part, mask.split([2, 4])[worker.rank], z=z.split([2, 4])[worker.rank])
        (out**3).sum().backward()
        return out.detach(), part.grad

    for rank, (out, gradient) in enumerate(group(2, run)):
        torch.testing.assert_close(out, y.detach().split([2, 4])[rank], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, wide.grad.split([2, 4])[rank], rtol=1e-9, atol=1e-9)


def test_a_checkpointed_segment(group):
    from torch.utils.checkpoint import checkpoint

    x, z = normal(6, 3), normal(6, 3, seed=9)
    expected = whole_batch(x, z, torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), None, None)

    def run(worker):
        layer = sync.SyncBatchNorm(3, dtype=torch.float64, worker=worker, activation="relu")
        part, own = (t.split([2, 4])[worker.rank].clone().requires_grad_() for t in (x, z))
        y = checkpoint(lambda a, b: layer(a, z=b), part, own, use_reentrant=False)
        (y**2 + y).sum().backward()
        return part.grad, own.grad

    for rank, found in enumerate(group(2, run)):
        torch.testing.assert_close(found[0], expected[1].split([2, 4])[rank], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], expected[4].split([2, 4])[rank], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tracked", [True, False])
def test_evaluation(tracked):
    layer = sync.SyncBatchNorm(3, track_running_stats=tracked, dtype=torch.float64, activation="relu").eval()
    plain = torch.nn.BatchNorm1d(3, track_running_stats=tracked, dtype=torch.float64).eval()
    x, z = normal(6, 3), normal(6, 3, seed=9)
    torch.testing.assert_close(layer(x), torch.relu(plain(x)))
    torch.testing.assert_close(layer(x, z=z), torch.relu(plain(x) + z))
    assert "activation=relu" in repr(layer)


def test_half_types_round_once(group):
    """y + z is rounded after the addition alone, as in apex."""
    x, z = normal(64, 4).bfloat16(), normal(64, 4, seed=9).bfloat16()
    exact = torch.nn.functional.batch_norm(x.double(), None, None, None, None, True)
    exact = torch.relu(exact + z.double())

    def run(worker):
        layer = sync.SyncBatchNorm(4, worker=worker, activation="relu")
        return layer(x.split([30, 34])[worker.rank], z=z.split([30, 34])[worker.rank]).detach()

    y = torch.cat(group(2, run))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "z, error, words",
    [
        (torch.zeros(2, 4), RuntimeError, r"z is \(2, 4\).*the input \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.float64), RuntimeError, "torch.float64"),
        (3.0, TypeError, "z is a float"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_an_addend_of_another_form_is_refused_before_any_round(z, error, words, training):
    layer = sync.SyncBatchNorm(3, activation="relu").train(training)
    with pytest.raises(error, match=words):
        layer(torch.zeros(2, 3), z=z)


def test_the_activation_is_part_of_the_layer(group):
    with pytest.raises(ValueError, match="activation is None or \"relu\", not 'gelu'"):
        sync.SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="activation"):
        sync.LazySyncBatchNorm(activation=True)
    layer = sync.SyncBatchNorm(3, activation="relu")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
    with pytest.raises(ValueError, match="1 .*has the activation 'relu'"):
        sync.revert_sync_batchnorm(model)
    assert type(layer) is sync.SyncBatchNorm and copy.deepcopy(layer).activation == "relu"
    sync.convert_sync_batchnorm(model)
    assert layer.activation == "relu"
    traced = torch.fx.symbolic_trace(Residual(layer.eval()))
    torch.testing.assert_close(traced(torch.ones(2, 3)), Residual(layer)(torch.ones(2, 3)))

    def run(worker):
        lazy = sync.LazySyncBatchNorm(dtype=torch.float64, worker=worker, activation="relu")
        return lazy(normal(4, 3), z=normal(4, 3, seed=8)).detach()

    twice = torch.cat([normal(4, 3), normal(4, 3)])
    expected = torch.relu(torch.nn.functional.batch_norm(twice, None, None, None, None, True)[:4] + normal(4, 3, seed=8))
    for y in group(2, run):
        torch.testing.assert_close(y, expected)


class Residual(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, z=x)
