"""`all_reduce_gradients`: every kind of gradient that a torch program has, against sums in float64."""

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from syncbn.torch import _tensors

WORKERS = 2


class Parameters(torch.nn.Module):
    def __init__(self, *tensors):
        super().__init__()
        self.p = torch.nn.ParameterList([torch.nn.Parameter(t) for t in tensors])


def reduced(group, make, weights=(1.0, 3.0)):
    """Reduces the gradients of the modules make(rank), and returns the gradients of each worker afterwards."""

    def run(worker):
        model = make(worker.rank)
        assert sync.all_reduce_gradients(model, worker, weights[worker.rank]) == sum(weights)
        return [p.grad for p in model.parameters()]

    return group(WORKERS, run)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(group, dtype):
    def make(rank):
        model = Parameters(torch.zeros(2, 3, dtype=dtype), torch.zeros(2))
        model.p[0].grad = torch.full((2, 3), 1.0 + rank - (2.0 + rank) * 1j, dtype=dtype)
        if rank == 1:
            model.p[0].grad = model.p[0].grad.conj().resolve_conj().conj()  # A lazily conjugated one.
        model.p[1].grad = torch.ones(2)
        return model

    for complex_gradient, real in reduced(group, make):
        assert complex_gradient.dtype == dtype
        torch.testing.assert_close(complex_gradient, torch.full((2, 3), 0.75 - 1.25j, dtype=dtype))
        assert real.tolist() == [0.5, 0.5]


def test_sparse_embeddings(group):
    rows = {0: [1, 3, 3], 1: [3, 4]}

    def make(rank):
        model = torch.nn.Sequential(torch.nn.Embedding(6, 2, sparse=True), torch.nn.Linear(2, 1))
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([[0.5, -1.5]]))
        model(torch.tensor(rows[rank])).sum().backward()
        assert model[0].weight.grad.is_sparse
        return model

    wanted = torch.zeros(6, 2)
    for rank in rows:
        wanted += make(rank)[0].weight.grad.to_dense() / 4
    for gradients in reduced(group, make):
        assert gradients[0].is_sparse
        torch.testing.assert_close(gradients[0].to_dense(), wanted)
        assert gradients[0].coalesce().indices().tolist() == [[1, 3, 4]]
        weight = torch.nn.Parameter(torch.zeros(6, 2))
        weight.grad = gradients[0]
        torch.optim.SparseAdam([weight]).step()


def test_sparse_here_and_missing_or_dense_there(group):
    def make(rank):
        model = Parameters(torch.zeros(3, 2), torch.zeros(3, 2))
        row = torch.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 0.0]])
        model.p[0].grad = row.to_sparse(1) if rank == 0 else None
        model.p[1].grad = row.to_sparse(1) if rank == 0 else row.clone()
        return model

    for first, second in reduced(group, make):
        assert first.is_sparse and not second.is_sparse
        assert first.to_dense().tolist() == [[0, 0], [0.5, 1], [0, 0]]
        assert second.tolist() == [[0, 0], [1, 2], [0, 0]]


def test_a_layout_that_cannot_be_sent_is_refused_before_the_round(group):
    def run(worker):
        model = Parameters(torch.eye(3).to_sparse_csr())
        model.p[0].grad = torch.eye(3).to_sparse_csr()
        with pytest.raises(TypeError, match="'p.0' is torch.sparse_csr"):
            sync.all_reduce_gradients(model, worker)
        return worker.all_reduce("after", [1.0]).tolist()

    assert group(WORKERS, run) == [[2.0]] * WORKERS


def test_memory_of_every_kind(group):
    """Non-contiguous, channels-last and expanded gradients; those that can be are changed in place."""

    def make(rank):
        model = Parameters(torch.zeros(4, 3), torch.zeros(2, 3, 2, 2), torch.zeros(3, 4), torch.zeros(5), torch.zeros(()))
        values = torch.arange(12.0) * (1 + rank)
        model.p[0].grad = values.view(3, 4).t()
        model.p[1].grad = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        model.p[2].grad = torch.tensor([1.0 + rank]).expand(3, 4)
        model.p[3].grad = (torch.arange(20.0) * (1 + rank))[::4]
        model.p[4].grad = torch.tensor(4.0)
        make.kept[rank] = [p.grad for p in model.parameters()]
        return model

    make.kept = {}
    wanted = [
        torch.arange(12.0).view(3, 4).t() * 0.75,
        torch.arange(24.0).view(2, 3, 2, 2) * 0.5,
        torch.full((3, 4), 0.75),
        torch.arange(20.0)[::4] * 0.75,
        torch.tensor(2.0),
    ]
    for rank, gradients in enumerate(reduced(group, make)):
        for index, (gradient, expected) in enumerate(zip(gradients, wanted)):
            torch.testing.assert_close(gradient, expected, check_stride=False)
            assert (gradient is make.kept[rank][index]) == (index != 2)


def test_mixed_and_shared_parameters(group):
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def make(rank):
        model = Parameters(*(torch.zeros(2, dtype=t) for t in types))
        model.again = model.p[0]
        for parameter in model.p:
            parameter.grad = torch.full((2,), 1.0 + rank, dtype=parameter.dtype)
        return model

    for gradients in reduced(group, make):
        assert [g.dtype for g in gradients] == list(types)
        assert all(g.tolist() == [0.75, 0.75] for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(dtype):
    """A float64 just above the middle of two neighbours goes up, though float32 puts it into the middle."""
    step = torch.finfo(dtype).eps
    up, middle = 1.0 + step, 1.0 + step / 2
    values = torch.tensor([middle + 1e-12, middle - 1e-12, middle, -middle - 1e-12, 1e300, -1e300, 0.0], dtype=torch.float64)
    assert _tensors.rounded(values, dtype).tolist() == [up, 1.0, 1.0, -up, float("inf"), -float("inf"), 0.0]
    assert _tensors.rounded(torch.tensor([float("nan"), float("inf")]).double(), dtype).isnan().tolist() == [True, False]
    numbers = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    torch.testing.assert_close(_tensors.rounded(numbers, dtype), numbers.to(dtype), rtol=0, atol=0)


def test_no_gradient_anywhere_and_frozen_parameters(group):
    def make(rank):
        model = Parameters(torch.zeros(2), torch.zeros(3), torch.zeros(1))
        model.p[1].requires_grad_(False)
        model.p[2].grad = torch.ones(1) if rank == 0 else None
        return model

    for first, frozen, last in reduced(group, make):
        assert first is None and frozen is None and last.tolist() == [0.25]


def test_weights_without_a_sum_are_an_error_at_every_worker(group):
    def run(worker):
        model = Parameters(torch.zeros(2))
        with pytest.raises(ValueError, match="weights sum up to 0"):
            sync.all_reduce_gradients(model, worker, 0.0)

    group(WORKERS, run)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), torch.tensor(-2)])
def test_a_weight_that_is_none_is_refused_before_the_round(group, weight):
    def run(worker):
        with pytest.raises(ValueError, match="weight is"):
            sync.all_reduce_gradients(Parameters(torch.zeros(2)), worker, weight)
        return worker.all_reduce("after", [1.0]).tolist()

    assert group(WORKERS, run) == [[2.0]] * WORKERS


def test_a_lazy_parameter_is_named(master):
    with syncbn.Worker(master.target, "lazy", 0, 1) as worker:
        with pytest.raises(ValueError, match="'weight' has no shape"):
            sync.all_reduce_gradients(torch.nn.LazyLinear(2), worker)


def test_a_layer_that_is_called_as_the_gradients_are(group):
    def run(worker):
        model = torch.nn.Module()
        model.gradients = torch.nn.BatchNorm1d(2, momentum=1.0)
        sync.convert_sync_batchnorm(model, worker)
        for step in range(3):
            model.gradients(torch.full((2, 2), float(step + 2 * worker.rank)).requires_grad_()).sum().backward()
            sync.all_reduce_gradients(model, worker)
        return model.gradients.running_mean.tolist()

    assert group(WORKERS, run) == [[3.0, 3.0]] * WORKERS


def test_a_backbone_that_is_unfrozen_at_the_same_step(group):
    def run(worker):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        model[0].requires_grad_(False)
        found = []
        for step in range(6):
            model[0].requires_grad_(step in (2, 3, 5))
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 + worker.rank) if parameter.requires_grad else None
            sync.all_reduce_gradients(model, worker)
            found.append([None if p.grad is None else float(p.grad.mean()) for p in model.parameters()])
        return found

    for found in group(WORKERS, run):
        for step, gradients in enumerate(found):
            assert gradients == [1.5 if step in (2, 3, 5) else None] * 2 + [1.5, 1.5]
