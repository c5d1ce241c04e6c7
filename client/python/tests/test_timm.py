"""The models of timm: every family with batch normalization converts, and trains on two workers as on one."""

import collections
import copy
import inspect
import re
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="timm is not installed: tools/build_wheel --test has an environment with it")

import timm
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn.torch as sync

SEED = 360
FAMILIES = 58  # The number in timm 1.0.31.


def families():
    """Returns, by family (a module of timm), the models that may have batch normalization, judging by its source."""
    entrypoint = timm.models.model_entrypoint
    names = collections.defaultdict(list)
    for name in timm.list_models():
        names[entrypoint(name).__module__].append(name)
    words = re.compile("BatchNorm|ConvNormAct|ConvBn|BNAct|batchnorm|EfficientNet|ResNet")
    return {m: n for m, n in sorted(names.items()) if words.search(inspect.getsource(sys.modules[m]))}


def normalizations(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def with_batch_normalization(names):
    """The first of some models that has batch normalization; without memory for its parameters."""
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        if normalizations(model):
            return model
    return None


def test_every_family_converts_and_reverts():
    converted = {}
    for family, names in families().items():
        model = with_batch_normalization(names)
        if model is None:
            continue
        before = {path: (module, type(module)) for path, module in normalizations(model).items()}
        state = list(model.state_dict())
        sync.convert_sync_batchnorm(model)
        after = dict(model.named_modules())
        for path, (module, kind) in before.items():
            assert after[path] is module and module.layer == path, f"{family}: {path}"
            plain = kind in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
            assert isinstance(module, sync.SyncBatchNorm if plain else kind), f"{family}: {path}"
        assert list(model.state_dict()) == state
        sync.revert_sync_batchnorm(model)
        assert {path: (m, type(m)) for path, m in normalizations(model).items()} == before
        converted[family] = len(before)
    print(f"timm {timm.__version__}: {converted}")
    assert len(converted) >= FAMILIES


def relative(actual, expected, scale=0.0):
    """Returns the largest error, relative to the largest expected value, or to a scale that is larger."""
    return float((actual - expected).abs().max()) / max(scale, float(expected.abs().max()))


def train(model, x, dy):
    y = model(x)
    y.backward(dy)
    return y.detach()


TRAINED = [
    ("efficientnet_b0", 1e-11, {"drop_path_rate": 0.0}),
    ("regnetv_040", 1e-11, {"drop_path_rate": 0.0}),
    ("densenet121", 1e-8, {}),
]


@pytest.mark.parametrize("name,tolerance,options", TRAINED)
def test_two_workers_train_as_one(group, name, tolerance, options):
    """Outputs, gradients and running statistics of a step on 2 + 3 images against the whole 5."""
    torch.manual_seed(SEED)
    whole = timm.create_model(name, num_classes=7, drop_rate=0.0, **options).double().train()
    models = [copy.deepcopy(whole) for _ in range(2)]
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    dy = torch.randn(5, 7, dtype=torch.float64)
    expected = train(whole, x, dy)
    started = threading.Barrier(2)

    def run(worker):
        model = sync.convert_sync_batchnorm(models[worker.rank], worker)
        started.wait(300)
        return train(model, x.split([2, 3])[worker.rank], dy.split([2, 3])[worker.rank])

    outputs = group(2, run, timeout=300.0)
    errors = {"output": relative(torch.cat(outputs), expected)}
    largest = max(float(parameter.grad.abs().max()) for parameter in whole.parameters())
    for key, parameter in whole.named_parameters():
        gradients = [dict(model.named_parameters())[key].grad for model in models]
        # The gradient of a bias before a linear layer and another normalization is zero but for rounding.
        errors[f"gradient of {key}"] = relative(sum(gradients), parameter.grad, 1e-3 * largest)
    buffers = dict(whole.named_buffers())
    for key, buffer in buffers.items():
        ours = [dict(model.named_buffers())[key].double() for model in models]
        # A mean that is zero but for rounding has the deviation of its values for a scale.
        scale = float(buffers[key.replace("_mean", "_var")].double().abs().max()) ** 0.5
        errors[key] = max(relative(own, buffer.double(), scale) for own in ours)
    worst = max(errors, key=errors.get)
    print(f"{name}, seed {SEED}: {worst} differs by {errors[worst]:.1e}")
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"
