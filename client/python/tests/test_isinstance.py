"""Helpers that look for a class or its name still find converted layers."""

import pickle

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn.torch import compat

SEED = 811
KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
SHAPES = {"BatchNorm1d": (5, 3), "BatchNorm2d": (5, 3, 2, 4), "BatchNorm3d": (5, 3, 2, 1, 4)}
CONVERSIONS = {"convert_sync_batchnorm": sync.convert_sync_batchnorm, "convert_model": compat.convert_model}


def values(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64) * 2 + 3


class FrozenCopy(torch.nn.Module):
    """An affine map in place of a batch normalization, as detection and fine-tuning code has it."""

    def __init__(self, layer):
        super().__init__()
        invstd = (layer.running_var + layer.eps).rsqrt()
        self.scale = (layer.weight * invstd).detach()
        self.shift = (layer.bias - layer.running_mean * layer.weight * invstd).detach()

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


def replaced(module, kind):
    """The module with every layer of a class frozen: the walk of such code."""
    if isinstance(module, kind):
        return FrozenCopy(module)
    for name, child in module.named_children():
        setattr(module, name, replaced(child, kind))
    return module


def model_of(kind):
    return torch.nn.Sequential(torch.nn.Sequential(getattr(torch.nn, kind)(3)), torch.nn.ReLU()).double()


@pytest.mark.parametrize("convert", list(CONVERSIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_freeze_helper_finds_every_layer(group, kind, convert):
    x = values(SHAPES[kind])
    plain = getattr(torch.nn, kind)
    whole = model_of(kind)
    whole(x)
    expected = replaced(whole, plain)(x)

    def run(worker):
        model = CONVERSIONS[convert](model_of(kind), worker)
        if convert == "convert_model":
            model[0][0].eps_mode = "add"
        model(x.split([2, 3])[worker.rank])
        frozen = replaced(model, plain)
        assert not [m for m in frozen.modules() if isinstance(m, sync.SyncBatchNorm)]
        return frozen(x)

    for y in group(2, run):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convert", list(CONVERSIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_both_classes_in_copies_pickles_and_the_way_back(kind, convert):
    plain = getattr(torch.nn, kind)
    for make in (lambda: plain(3), lambda: getattr(torch.nn, f"Lazy{kind}")()):
        layer = CONVERSIONS[convert](make())
        for other in (layer, pickle.loads(pickle.dumps(layer))):
            assert isinstance(other, type(make())) and isinstance(other, sync.SyncBatchNorm)
            assert kind in type(other).__name__ and repr(other).startswith(type(other).__name__)
        assert type(CONVERSIONS[convert](layer)) is type(layer)
        layer.eval()(values(SHAPES[kind]).float())
        assert isinstance(layer, plain) and isinstance(layer, sync.SyncBatchNorm)
        assert type(sync.revert_sync_batchnorm(layer)) is plain


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_rank_are_refused_as_by_torch(kind):
    layer, x = getattr(torch.nn, kind)(3), torch.zeros(2, 3, 1, 1, 1, 1)
    with pytest.raises(ValueError) as expected:
        layer(x)
    with pytest.raises(ValueError) as actual:
        sync.convert_sync_batchnorm(layer)(x)
    assert str(actual.value) == str(expected.value)


def test_initialization_by_the_name_of_a_class():
    """The walk of image-to-image models: `apply` with a look at the class's name."""

    def initialize(module):
        if type(module).__name__.find("BatchNorm2d") != -1:
            torch.nn.init.constant_(module.weight, 0.5)

    model = sync.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)))
    model.apply(initialize)
    assert model[1].weight.tolist() == [0.5] * 3


def test_lazy_layers_of_the_original_follow_the_epsilon_mode():
    with compat.patch_sync_batchnorm():
        patched = torch.nn.LazyBatchNorm2d(eps=0.1)
    converted = compat.convert_model(torch.nn.LazyBatchNorm2d(eps=0.1))
    layers = [patched, converted]
    for layer in layers:
        assert type(layer) is compat.LazySynchronizedBatchNorm2d
        layer.eval()(torch.zeros(2, 3, 1, 1))
        assert type(layer) is compat.SynchronizedBatchNorm2d and layer.num_features == 3
    try:
        for mode, meant in (("plus", "add"), ("clamp", "clamp")):
            compat.set_sbn_eps_mode(mode)
            assert [layer.eps_mode for layer in layers] == [meant, meant]
    finally:
        compat.set_sbn_eps_mode("clamp")


def test_patched_names_take_torchs_arguments():
    with compat.patch_sync_batchnorm():
        layers = [torch.nn.BatchNorm1d(3, 0.1, 0.2, True, True, "cpu", torch.float64)]
        layers.append(torch.nn.LazyBatchNorm1d(0.1, 0.2, True, True, "cpu", torch.float64))
    for layer in layers:
        assert (layer.weight.dtype, layer.eps, layer.momentum) == (torch.float64, 0.1, 0.2)
