"""The functions below the layers, against one process on the whole batch in float64."""

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync

import processes

SIZES = [3, 5, 1]
SEED = 417


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64) * 2.0 + 5.0


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- batch_norm ----


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_is_that_of_the_whole_batch(group, affine, tracked):
    x = normal(sum(SIZES), 4, 3).requires_grad_()
    weight, bias = (normal(4) if affine else None for _ in range(2))
    mean, var = (normal(4).abs() if tracked else None for _ in range(2))
    expected_mean, expected_var = (v.clone() if tracked else None for v in (mean, var))
    expected = torch.nn.functional.batch_norm(x, expected_mean, expected_var, weight, bias, True, 0.3, 1e-3)
    (gradient,) = torch.autograd.grad((expected**3).sum(), x)

    def run(worker):
        part = x.detach().split(SIZES)[worker.rank].clone().requires_grad_()
        own_mean, own_var = (v.clone() if tracked else None for v in (mean, var))
        y = syncbn.functional.batch_norm(
            part, own_mean, own_var, weight, bias, True, 0.3, 1e-3, layer="layer", worker=worker
        )
        (y**3).sum().backward()
        return y.detach(), part.grad, own_mean, own_var

    for rank, (y, dx, own_mean, own_var) in enumerate(group(len(SIZES), run)):
        check(y, expected.detach().split(SIZES)[rank])
        check(dx, gradient.split(SIZES)[rank])
        if tracked:
            check(own_mean, expected_mean)
            check(own_var, expected_var)


def test_evaluation_is_torchs_own_and_needs_neither_a_worker_nor_a_name():
    x, mean, var, weight = normal(5, 4), normal(4), normal(4).abs(), normal(4)
    check(syncbn.functional.batch_norm(x, mean, var, weight), torch.nn.functional.batch_norm(x, mean, var, weight))
    with pytest.raises(ValueError, match="running_mean and running_var"):
        syncbn.functional.batch_norm(x, None, None)


def test_a_name_is_needed_in_training():
    for layer in (None, "", 3):
        with pytest.raises(ValueError, match="layer is .*the same at every worker"):
            syncbn.functional.batch_norm(normal(5, 4), None, None, training=True, layer=layer)


def test_batch_norm_in_a_checkpointed_segment_has_one_round(group):
    from torch.utils.checkpoint import checkpoint

    x = normal(sum(SIZES), 4)

    def run(worker):
        running = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)

        def segment(part):
            return syncbn.functional.batch_norm(part, *running, training=True, layer="layer", worker=worker)

        part = x.split(SIZES)[worker.rank].clone().requires_grad_()
        (checkpoint(segment, part, use_reentrant=False) ** 3).sum().backward()
        return part.grad, running[0], worker.synchronize("layer", 0).sequence

    whole = x.clone().requires_grad_()
    mean = torch.zeros(4, dtype=torch.float64)
    (torch.nn.functional.batch_norm(whole, mean, torch.ones_like(mean), training=True) ** 3).sum().backward()
    for rank, (gradient, running_mean, sequence) in enumerate(group(len(SIZES), run)):
        check(gradient, whole.grad.split(SIZES)[rank])
        check(running_mean, mean)
        assert sequence == 1


# ---- moments ----

CASES = {
    "channels in second place": ((9, 4, 3), (0, 2)),
    "channels last": ((9, 3, 4), (0, 1)),
    "all but two dimensions": ((9, 2, 3, 2), (-4, 2)),
    "one dimension": ((9, 5), 0),
    "all": ((9, 4, 3), (0, 1, 2)),
}


def loss(mean, var, x, rank):
    """Differs by rank, as losses do."""
    return ((x - mean) * torch.rsqrt(var + 0.1)).pow(3).sum() + (rank + 1) * (mean.sin().sum() + (var * mean).sum())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_moments_and_their_gradient(group, name, keepdim):
    shape, dims = CASES[name]
    whole = normal(*shape).requires_grad_()
    reduced = (dims,) if isinstance(dims, int) else dims
    mean, var = whole.mean(reduced, keepdim), whole.var(reduced, unbiased=False, keepdim=keepdim)

    def spread(v):
        return v if keepdim else v.reshape([1 if d in [r % whole.dim() for r in reduced] else n for d, n in enumerate(shape)])

    parts = whole.split(SIZES)
    sum(loss(spread(mean), spread(var), part, rank) for rank, part in enumerate(parts)).backward()

    def run(worker):
        part = parts[worker.rank].detach().requires_grad_()
        found = sync.moments(part, dims, layer="moments", worker=worker, keepdim=keepdim)
        loss(*map(spread, found), part, worker.rank).backward()
        return found[0].detach(), found[1].detach(), part.grad

    for rank, (own_mean, own_var, gradient) in enumerate(group(len(SIZES), run)):
        check(own_mean, mean.detach())
        check(own_var, var.detach())
        check(gradient, whole.grad.split(SIZES)[rank])


def test_derivatives_of_derivatives_of_moments(group):
    whole = normal(sum(SIZES), 2).requires_grad_()

    def third(x, mean, var, rank):
        """The sum of squares of a gradient of a gradient."""
        value = loss(mean, var, x, rank)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
        return (second**2).sum() * 1e-6

    parts = whole.split(SIZES)
    total = torch.zeros((), dtype=torch.float64)
    mean, var = whole.mean(0), whole.var(0, unbiased=False)
    value = sum(loss(mean, var, part, rank) for rank, part in enumerate(parts))
    (first,) = torch.autograd.grad(value, whole, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), whole, create_graph=True)
    total = (second**2).sum() * 1e-6
    (expected,) = torch.autograd.grad(total, whole)

    def run(worker):
        part = parts[worker.rank].detach().requires_grad_()
        found = sync.moments(part, 0, layer="moments", worker=worker)
        (gradient,) = torch.autograd.grad(third(part, *found, worker.rank), part)
        return gradient

    for rank, gradient in enumerate(group(len(SIZES), run)):
        torch.testing.assert_close(gradient, expected.split(SIZES)[rank], rtol=1e-8, atol=1e-8)


def test_moments_where_one_worker_has_no_value_and_one_no_gradient(group):
    whole = normal(6, 2).requires_grad_()
    mean, var = whole.mean(0), whole.var(0, unbiased=False)
    sizes = [4, 0, 2]
    frozen = whole.detach()
    (gradient,) = torch.autograd.grad((mean * torch.tensor([1.0, 2.0])).sum() * 6 + 6 * (var**2).sum(), whole)

    def run(worker):
        part = frozen.split(sizes)[worker.rank].clone().requires_grad_(worker.rank < 2)
        own_mean, own_var = sync.moments(part, 0, layer="moments", worker=worker)
        factor = worker.rank + 1
        ((own_mean * torch.tensor([1.0, 2.0])).sum() * factor + factor * (own_var**2).sum()).backward()
        return own_mean.detach(), part.grad

    results = group(3, run)
    for own_mean, _ in results:
        check(own_mean, mean.detach())
    check(results[0][1], gradient[:4])
    assert results[1][1].shape == (0, 2) and results[2][1] is None


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_moments(group, kind):
    x = normal(6, 2).to(kind)

    def run(worker):
        part = x.split([2, 4])[worker.rank].clone().requires_grad_()
        mean, var = sync.moments(part, 0, layer="moments", worker=worker)
        (mean.sum() + var.sum()).backward()
        return mean.detach(), var.detach(), part.grad.dtype

    for mean, var, gradient in group(2, run):
        assert mean.dtype == var.dtype == torch.float32 and gradient == kind
        torch.testing.assert_close(mean, x.double().mean(0).float())
        torch.testing.assert_close(var, x.double().var(0, unbiased=False).float())


def test_moments_of_nothing_are_nan(group):
    def run(worker):
        return sync.moments(torch.empty(0, 3), 0, layer="moments", worker=worker)

    for mean, var in group(2, run):
        assert mean.isnan().all() and var.isnan().all() and mean.shape == (3,)


@pytest.mark.parametrize("dims", [None, 1.0, "a", (0, None)])
def test_dimensions_that_are_no_numbers(dims):
    with pytest.raises(TypeError, match="dims is .*; it is the number of a dimension, or several"):
        sync.moments(torch.ones(4, 3), dims, layer="moments")


@pytest.mark.parametrize("dims", [{0, 1}, range(2), torch.Size([1, 0]), iter([0, 1])])
def test_dimensions_in_any_collection(group, dims):
    def run(worker):
        return sync.moments(torch.arange(6.0).reshape(2, 3), dims, layer="moments", worker=worker)[0]

    assert group(1, run) == [2.5]


def test_an_input_without_dimensions():
    with pytest.raises(ValueError, match="no dimensions to take moments over"):
        sync.moments(torch.tensor(1.0), 0, layer="moments")


@pytest.mark.parametrize(
    "dims, words", [(2, "dims has 2"), ((0, -3), "dims has -3"), ((), "at least one"), ((0, 0), "each once"), ((0, -2), "each once")]
)
def test_dimensions_that_an_input_has_not(dims, words):
    with pytest.raises(ValueError, match=words):
        sync.moments(torch.zeros(2, 2), dims, layer="moments")


def test_the_module_is_there_once_the_front_is_imported():
    """And it may be imported first."""
    for line in ("import syncbn.torch", "import syncbn.functional"):
        assert "batch_norm" in processes.run(f"{line}; print(syncbn.functional.batch_norm, syncbn.torch.functional.moments)", 1)[0]
