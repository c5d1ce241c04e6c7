"""Layers over which torch has put a class at run time: fully_shard, replicate, and parametrizations beneath them."""

import pytest

torch = pytest.importorskip("torch")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    pytest.skip("torch has no public fully_shard before 2.6", allow_module_level=True)

import syncbn.torch as sync
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

CHANNELS = 3


class Activated(torch.nn.BatchNorm1d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.fixture(autouse=True)
def process_group():
    """Of this process alone: the workers are its threads."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def bare(layer):
    return layer


def trained(model, x):
    model(x).pow(3).sum().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def values(rows):
    return torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


@pytest.mark.parametrize("wrap", [fully_shard, replicate])
@pytest.mark.parametrize("prepare", [bare, parametrized])
@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm, Activated])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_layer_keeps_the_class_that_is_put_over_it(group, wrap, prepare, kind, wrapped_first):
    def run(worker):
        model = torch.nn.Sequential(prepare(kind(CHANNELS).double()))
        if not wrapped_first:
            sync.convert_sync_batchnorm(model, worker)
        wrap(model[0])
        over = type(model[0])
        if wrapped_first:
            sync.convert_sync_batchnorm(model, worker)
        found = trained(model, batches[worker.rank])
        assert type(model[0]).__bases__[0] is over.__bases__[0]

        sync.revert_sync_batchnorm(model)
        assert isinstance(model[0], kind)
        assert parametrize.is_parametrized(model[0]) is (prepare is parametrized)
        assert not isinstance(model[0], sync.SyncBatchNorm) and not hasattr(model[0], "layer")
        model.eval()(batches[0])
        assert type(model[0]).__bases__[0] is over.__bases__[0]
        return found

    batches = [values(2), values(5)]
    alone = torch.nn.BatchNorm1d if kind is torch.nn.SyncBatchNorm else kind
    expected = trained(prepare(alone(CHANNELS).double()), torch.cat(batches))
    for found in zip(expected, *group(2, run)):
        torch.testing.assert_close(found[1] + found[2], found[0], rtol=1e-11, atol=1e-11)
