"""Second derivatives with a mask, of several workers, against torch's own operations in float64 on the whole batch."""

import pytest

torch = pytest.importorskip("torch")

import second_derivatives
import syncbn.torch as sync
from second_derivatives import CHANNELS, close, random

SEED = 6161


def whole_normalize(x, mask, mode, eps):
    """x normalized with the moments of the positions that count, by operations that autograd differentiates twice."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean = (x * mask).sum(dims, keepdim=True) / mask.sum()
    var = ((x - mean).square() * mask).sum(dims, keepdim=True) / mask.sum()
    return (x - mean) / (var.clamp(min=eps) if mode == "clamp" else var + eps).sqrt()


def check(group, sizes, shape=(4,), *, mode="add", eps=1e-5, full=False, **options):
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.rand((sum(sizes), 1) + shape, generator=generator) < (2.0 if full else 0.6)
    second_derivatives.check(
        group, sizes, shape, lambda x: whole_normalize(x, mask.double(), mode, eps), generator, mask=mask, mode=mode,
        eps=eps, **options,
    )


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 4, 2), (0, 4, 1)])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=str)
def test_splits_of_the_batch(group, sizes, shape):
    check(group, sizes, shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dy_needs", [True, False])
@pytest.mark.parametrize("mode,eps", [("add", 2.0), ("clamp", 1e-5), ("clamp", 2.0), ("clamp", 1e3)])
def test_options(group, affine, dy_needs, mode, eps):
    check(group, (2, 3), affine=affine, mode=mode, eps=eps, dy_needs=dy_needs)


def test_single_precision(group):
    check(group, (2, 3), dtype=torch.float32)


def test_a_mask_of_all_positions(group):
    check(group, (2, 3), full=True)


@pytest.mark.parametrize("layers,padding", [(1, float("nan")), (2, 1e3)])
def test_a_gradient_penalty_on_padded_sequences(group, layers, padding):
    """No loss reads the padding."""
    generator = torch.Generator().manual_seed(SEED)
    print("seed", SEED)
    x, c = (random((5, CHANNELS, 6), generator) for _ in range(2))
    lengths = torch.tensor([6, 2, 5, 3, 4])
    mask = torch.arange(6) < lengths[:, None]

    def penalty(model, x, c, mask):
        y = model(x)
        read = torch.where(mask[:, None], y, torch.zeros_like(y))
        (gradient,) = torch.autograd.grad((read.sin() * c).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach(), x.grad

    def whole(x):
        x = whole_normalize(x, mask[:, None].double(), "add", 1e-5)
        return x if layers == 1 else whole_normalize(x.tanh(), mask[:, None].double(), "add", 1e-5)

    wanted = penalty(whole, x.clone().requires_grad_(), c, mask)

    def run(worker):
        norms = [sync.SyncBatchNorm(CHANNELS, worker=worker, layer=str(i), dtype=torch.float64) for i in range(layers)]

        def model(v):
            v = norms[0](v, seen)
            return v if layers == 1 else norms[1](v.tanh(), seen)

        part, own, seen = (v.split([2, 3])[worker.rank] for v in (x, c, mask))
        part = torch.where(seen[:, None], part, torch.full_like(part, padding)).requires_grad_()
        return penalty(model, part, own, seen)

    results = group(2, run)
    for actual, expected in zip(zip(*results), wanted):
        counted = mask[:, None].expand_as(expected)
        close(torch.cat(actual)[counted], expected[counted])


def test_there_is_no_third_derivative(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        x = random((2, CHANNELS, 4), torch.Generator().manual_seed(SEED)).requires_grad_()
        y = layer(x, torch.tensor([[True, True, False, True]]))
        for _ in range(2):
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no third"):
            y.sum().backward()

    group(1, run)
