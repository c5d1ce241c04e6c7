"""Conversion: layers stay whole, or nothing is changed; subclasses keep their class and their own forward."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
import torch.utils.checkpoint

SEED = 5150
CHANNELS = 3
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# ---- Subclasses, at the module's level so that pickles find them ----


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


@pytest.mark.parametrize("name", list(KINDS))
def test_subclasses_run_their_own_forward_synchronized(group, name):
    make = lambda: filled(torch.nn.Sequential(KINDS[name]())).train()
    kind = type(make()[0])
    for model in as_on_the_whole_batch(group, make):
        layer = model[0]
        assert isinstance(layer, kind) and type(layer).__name__ == kind.__name__ and layer.layer == "0"
        assert kind.__name__ in repr(model)
        sync.revert_sync_batchnorm(model)
        assert model[0] is layer and type(layer) is kind and not hasattr(layer, "layer")


def test_a_subclass_of_torchs_synchronized_layer(group):
    make = lambda: filled(torch.nn.Sequential(AroundTorchs(CHANNELS)))

    def local(model, x, dy):
        # torch's own refuses tensors on the CPU.
        if type(model[0]) is AroundTorchs:
            x = x.clone().requires_grad_()
            model[0].num_batches_tracked.add_(1)
            buffers = model[0].running_mean, model[0].running_var
            y = torch.tanh(torch.nn.functional.batch_norm(x, *buffers, model[0].weight, model[0].bias, True, 0.1, 1e-5))
            y.backward(dy)
            return y.detach(), x.grad
        return step(model, x, dy)

    for model in as_on_the_whole_batch(group, make, call=local):
        assert isinstance(model[0], torch.nn.SyncBatchNorm)


def test_an_empty_or_single_batch_at_one_worker(group):
    make = lambda: filled(torch.nn.Sequential(Activated(CHANNELS, 0.2, momentum=None)))
    as_on_the_whole_batch(group, make, sizes=(0, 5))
    as_on_the_whole_batch(group, make, sizes=(1, 1))


def test_a_batch_that_is_empty_everywhere_counts_nowhere(group):
    def run(worker):
        layer = sync.convert_sync_batchnorm(Activated(2, 0.1), worker)
        layer(torch.zeros(0, 2))
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(torch.zeros(1 - worker.rank, 2))
        return int(layer.num_batches_tracked), layer.running_var.tolist()

    assert group(2, run) == [(0, [1.0, 1.0])] * 2


def test_evaluation_is_the_classs_own():
    layer = filled(Activated(CHANNELS, 0.2)).eval()
    expected = layer(values((4, CHANNELS)))
    close(sync.convert_sync_batchnorm(layer)(values((4, CHANNELS))), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_and_synchronizes_once(group, reentrant):
    from torch.utils.checkpoint import checkpoint

    make = lambda: filled(torch.nn.Sequential(Activated(CHANNELS, 0.2, momentum=None)))

    def call(model, x, dy):
        if not hasattr(model[0], "layer"):
            return step(model, x, dy)
        x = x.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.backward(dy)
        return y.detach(), x.grad

    as_on_the_whole_batch(group, make, call=call)


class Frugal(Activated):
    """Keeps its input alone, and normalizes again during backward."""

    frugal = True

    def forward(self, x):
        if not (self.frugal and x.requires_grad):
            return super().forward(x)
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_checkpoints_a_part_of_itself(group, reentrant, patched):
    torch_has_a_place = reentrant or hasattr(torch.utils.checkpoint, "_CheckpointFrame")

    def make():
        layers = [Frugal(CHANNELS, 0.2, momentum=None), torch.nn.Linear(CHANNELS, CHANNELS)]
        model = filled(torch.nn.Sequential(*layers, Frugal(CHANNELS, 0.5)))
        for layer in (model[0], model[2]):
            layer.reentrant = reentrant
            if patched:
                layer.forward = functools.partial(Frugal.forward, layer)
        return model

    def call(model, x, dy):
        for layer in (model[0], model[2]):
            layer.frugal = hasattr(layer, "layer")  # The oracle would update its running statistics twice.
        return step(model, x, dy)

    if torch_has_a_place:
        as_on_the_whole_batch(group, make, call=call)
    else:
        with pytest.raises(RuntimeError, match="checkpoints a part of itself"):
            as_on_the_whole_batch(group, make, call=call)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        return torch.nn.functional.batch_norm(x, layer.running_mean, layer.running_var, training=True)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.nn.functional.batch_norm(x, None, None, training=True)
        return torch.autograd.grad(y, x, dy)[0], None


class OfAFunction(torch.nn.BatchNorm1d):
    def forward(self, x):
        return _Fused.apply(x, self)


class WithoutGradients(torch.nn.BatchNorm1d):
    """Normalizes for the running statistics alone."""

    def forward(self, x):
        with torch.no_grad():
            super().forward(x)
        return x * self.running_mean


def test_a_forward_with_a_backward_pass_of_its_own_is_refused(group):
    def run(worker):
        layer = sync.convert_sync_batchnorm(OfAFunction(CHANNELS), worker)
        with pytest.raises(RuntimeError, match="within a torch.autograd.Function"):
            layer(torch.ones(2, CHANNELS, requires_grad=True))
        assert worker.stats().rounds == 0
        with torch.no_grad():  # Without gradients there is no backward pass.
            return layer(values((2, CHANNELS), worker.rank).float())

    found = torch.cat(group(2, run))
    whole = torch.cat([values((2, CHANNELS), rank).float() for rank in range(2)])
    close(found, torch.nn.functional.batch_norm(whole, None, None, training=True), 1e-5)
    as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(WithoutGradients(CHANNELS))))


def test_a_forward_that_a_program_gives_torchs_class(group, monkeypatch):
    original = torch.nn.BatchNorm1d.forward

    @functools.wraps(original)
    def forward(self, x):
        return original(self, x.sin()) * 2

    monkeypatch.setattr(torch.nn.BatchNorm1d, "forward", forward, raising=False)
    models = as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS))))
    assert all(isinstance(model[0], torch.nn.BatchNorm1d) for model in models)


def test_autocast_reaches_the_subclass(group):
    def run(worker):
        model = torch.nn.Sequential(torch.nn.Linear(4, CHANNELS), Activated(CHANNELS, 0.1))
        sync.convert_sync_batchnorm(model, worker)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(torch.ones(2, 4) * worker.rank)
        y.float().sum().backward()
        return y.dtype, model[1].running_mean.dtype, model[1].weight.grad.dtype

    assert group(2, run) == [(torch.bfloat16, torch.float32, torch.float32)] * 2


def test_replicas_of_a_subclass_are_one_batch(group):
    from syncbn.torch import compat

    make = lambda: filled(torch.nn.Sequential(Activated(CHANNELS, 0.2, momentum=None)))

    def call(model, x, dy):
        converted = hasattr(model[0], "layer")
        return step(compat.DataParallelWithCallback(model, replicas=2) if converted else model, x, dy)

    as_on_the_whole_batch(group, make, sizes=(4, 3), call=call)


def test_threads_run_their_own_layers(group):
    """One class, two workers' layers at the same time on threads, and a plain call between."""
    x = values((8, CHANNELS))
    expected = Activated(CHANNELS, 0.3).double()(x)

    def run(worker):
        layer = sync.convert_sync_batchnorm(Activated(CHANNELS, 0.3).double(), worker)
        for _ in range(20):
            y = layer(x.split([3, 5])[worker.rank])
            alone = torch.nn.functional.batch_norm(torch.tensor([[-1.0], [1.0]]), None, None, training=True)
            assert alone.abs().max() < 1.0001
        return y

    close(torch.cat(group(2, run)), expected)


def test_a_child_that_normalizes_by_itself_stays_local(group):
    class Parent(torch.nn.BatchNorm1d):
        def __init__(self):
            super().__init__(1)
            self.helper = Nested.Helper()

        def forward(self, x):
            return super().forward(x), self.helper(x)

    def run(worker):
        layer = sync.convert_sync_batchnorm(Parent().double(), worker)
        both, alone = layer(torch.tensor([[0.0], [2.0]], dtype=DOUBLE) + 10 * worker.rank)
        return float(both.abs().max()), float(alone.abs().max())

    for both, alone in group(2, run):
        assert both > 1.1 and alone == pytest.approx(1.0, abs=1e-4)


# ---- Attributes, hooks and buffers ----


def test_layers_stay_the_same_objects_with_all_they_carry(group):
    def carrying():
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS), Activated(CHANNELS, 0.2))
        for layer in model:
            layer.note = {"tag": [1]}
            layer.register_buffer("temporary", torch.ones(2), persistent=False)
            layer.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
            layer.register_forward_hook(lambda module, args, y: y * module.note["tag"][0] * 3)
            layer._register_state_dict_hook(lambda module, state, prefix, metadata: state.update({prefix + "h": module.weight}))
            layer.weight.requires_grad_(False)
        model[1].eval()
        return filled(model)

    models = as_on_the_whole_batch(group, lambda: carrying())
    model = carrying()
    layers, before = list(model), [dict(vars(layer)) for layer in model]
    sync.convert_sync_batchnorm(model)
    assert all(layer is kept for layer, kept in zip(model, layers))
    sync.revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [torch.nn.BatchNorm1d, Activated]
    assert [vars(layer) for layer in model] == before
    assert [m[1].training for m in models] == [False, False]


def test_backward_hooks_go_on(group):
    def run(worker):
        model, seen = torch.nn.Sequential(torch.nn.BatchNorm1d(2), Activated(2, 0.1)), []
        for layer in model:
            layer.register_full_backward_hook(lambda module, before, after: seen.append(module))
        sync.convert_sync_batchnorm(model, worker)
        model(torch.ones(2, 2, requires_grad=True) * worker.rank).sum().backward()
        return seen == [model[1], model[0]]

    assert group(2, run) == [True, True]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_parametrizations(group, kind):
    def make():
        layer = filled(kind(CHANNELS))
        parametrize.register_parametrization(layer, "weight", Doubled())
        return torch.nn.Sequential(layer)

    for model in as_on_the_whole_batch(group, make):
        assert parametrize.is_parametrized(model[0], "weight") and isinstance(model[0], _BatchNorm)
        copy.deepcopy(model)
        parametrize.remove_parametrizations(model[0], "weight")
        assert not parametrize.is_parametrized(model[0]) and model[0].layer == "0"
        assert type(sync.revert_sync_batchnorm(model)[0]) is kind
    model = make()
    before = type(model[0])
    parametrized = sync.revert_sync_batchnorm(sync.convert_sync_batchnorm(model))[0]
    assert type(parametrized).__name__ == before.__name__ and type(parametrized).__bases__ == (kind,)
    parametrize.remove_parametrizations(parametrized, "weight")
    assert type(parametrized) is kind


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_pruning_and_weight_normalization(group, kind):
    def pruned():
        layer = filled(kind(CHANNELS))
        prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0.0, 1.0]))
        return torch.nn.Sequential(layer)

    def normed():
        return torch.nn.Sequential(torch.nn.utils.weight_norm(filled(kind(CHANNELS)), "weight", dim=0).double())

    for model in as_on_the_whole_batch(group, pruned):
        prune.remove(model[0], "weight")
        assert float(model[0].weight[1]) == 0.0
    as_on_the_whole_batch(group, normed)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_a_forward_assigned_to_the_layer(group, kind):
    def make():
        layer = filled(kind(CHANNELS))
        original = layer.forward
        layer.forward = lambda x: original(x * 2) + 1
        return torch.nn.Sequential(layer)

    as_on_the_whole_batch(group, make)
    model = make()
    patched = model[0].forward
    assert sync.revert_sync_batchnorm(sync.convert_sync_batchnorm(model))[0].forward is patched
    assert type(model[0]) is kind


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_a_forward_assigned_after_the_conversion(group, kind):
    """This includes a forward that was bound before, by libraries that wrap forward and unwrap it again."""

    def call(model, x, dy):
        original = model[0].forward
        model[0].forward = lambda x: original(x) * 2
        try:
            return step(model, x, dy)
        finally:
            model[0].forward = functools.partial(type(model[0]).forward, model[0])

    models = as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(kind(CHANNELS))), call=call, steps=2)
    assert type(sync.revert_sync_batchnorm(models[0])[0]) is kind


def normalized_in_a_function(layer, x):
    layer.num_batches_tracked.add_(1)
    vectors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return torch.nn.functional.batch_norm(x, *vectors, layer.training, 0.5, layer.eps) * 3


@pytest.mark.parametrize("layer", ["plain", "made as one"])
def test_a_forward_of_ones_own_assigned_to_a_synchronized_layer(group, layer):
    """The forward calls batch_norm itself, and must not stay local. Assigning the layer's own forward undoes it."""

    def call(model, x, dy):
        model[0].forward = functools.partial(normalized_in_a_function, model[0])
        first = step(model, x, dy)
        model[0].forward = type(model[0]).forward.__get__(model[0])
        return (*first, *step(model, x, dy))

    def make():
        made = sync.SyncBatchNorm(CHANNELS) if layer == "made as one" and threads else torch.nn.BatchNorm1d(CHANNELS)
        threads.append(1)
        return filled(torch.nn.Sequential(made))

    threads = []
    models = as_on_the_whole_batch(group, make, call=call)
    models[0][0].forward = functools.partial(normalized_in_a_function, models[0][0])
    models[0][0].worker = None
    other = pickle.loads(pickle.dumps(models[0]))
    x = values((4, CHANNELS))
    close(other.eval()(x), models[0].eval()(x))
    function = models[0][0].forward.function
    assert sync.revert_sync_batchnorm(models[0])[0].forward is function


def test_a_forward_assigned_to_a_synchronized_layer_that_takes_statistics_by_other_means(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker)
        layer.forward = lambda x: (x - x.mean(0)) / x.std(0)
        with pytest.raises(RuntimeError, match="cannot be synchronized"):
            layer(values((4, CHANNELS)))

    group(1, run)


def test_copies_and_pickles_of_subclasses(group):
    makes = [KINDS[name] for name in KINDS if name != "slots"]

    def run(worker):
        for index, make in enumerate(makes):
            layer = sync.convert_sync_batchnorm(filled(torch.nn.Sequential(make())), worker, prefix=f"{index} ")[0]
            layer.note = "kept"
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            others = [copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            others += [pickle.loads(pickle.dumps(layer, protocol=0))]
            others += [torch.load(file, **({"weights_only": False} if torch.__version__ >= "2" else {}))]
            x = torch.full((2, CHANNELS), float(worker.rank), dtype=DOUBLE)
            with torch.no_grad():
                expected = layer(x)
                for other in others:
                    assert type(other) is type(layer) and other.note == "kept" and other.layer == layer.layer
                    assert other.worker is worker and not other.training == (not layer.training)
                    close(other(x), expected)
            assert type(sync.revert_sync_batchnorm(others[1])) is type(make())

    group(2, run)


def test_a_pickle_is_read_in_another_process(tmp_path):
    model = filled(torch.nn.Sequential(Activated(CHANNELS, 0.2), torch.nn.BatchNorm1d(CHANNELS)))
    expected = copy.deepcopy(model).eval()(values((4, CHANNELS)))
    torch.save(sync.convert_sync_batchnorm(model), tmp_path / "model")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
model = torch.load(sys.argv[1], **({"weights_only": False} if torch.__version__ >= "2" else {}))
import test_convert
assert isinstance(model[0], test_convert.Activated) and model[0].layer == "0" and model[0].worker is None
test_convert.close(model.eval()(test_convert.values((4, 3))), torch.load(sys.argv[3]))
assert type(test_convert.sync.revert_sync_batchnorm(model)[0]) is test_convert.Activated
"""
    torch.save(expected.detach(), tmp_path / "expected")
    folder = __file__.rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", folder, tmp_path / "expected"], check=True, timeout=120)


class LazyActivated(torch.nn.LazyBatchNorm1d):
    cls_to_become = Activated

    def __init__(self):
        super().__init__(dtype=DOUBLE)
        self.act = torch.nn.LeakyReLU(0.2)


def test_a_lazy_subclass_becomes_a_synchronized_one(group):
    make = lambda: torch.nn.Sequential(LazyActivated())
    for model in as_on_the_whole_batch(group, make):
        assert isinstance(model[0], Activated) and model[0].layer == "0"
        assert type(sync.revert_sync_batchnorm(model)[0]) is Activated
    lazy = sync.revert_sync_batchnorm(sync.convert_sync_batchnorm(make()))
    assert type(lazy[0]) is LazyActivated


# ---- Refusals ----


class Formula(torch.nn.BatchNorm1d):
    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt() * self.weight + self.bias


class OtherChannels(torch.nn.BatchNorm1d):
    """Ghost batch normalization: parts of the batch as channels of their own."""

    def forward(self, x):
        mean, var = self.running_mean.repeat(2), self.running_var.repeat(2)
        y = torch.nn.functional.batch_norm(x.view(-1, 2 * CHANNELS), mean, var, training=self.training)
        return y.view(x.shape) * self.running_mean.copy_(mean.view(2, -1).mean(0))


class NativeFormula(torch.nn.BatchNorm1d):
    """Names the operation of torch's that is below all others."""

    def forward(self, x):
        return torch.ops.aten.native_batch_norm.default(x, self.weight, self.bias, None, None, True, 0.0, self.eps)[0]


@pytest.mark.parametrize("kind", [Formula, OtherChannels, NativeFormula])
def test_a_forward_that_cannot_be_synchronized_says_so(group, kind):
    def run(worker):
        model = sync.convert_sync_batchnorm(torch.nn.Sequential(kind(CHANNELS)), worker)
        with pytest.raises(RuntimeError, match=f"layer '0': .*{kind.__name__} normalizes"):
            model(torch.ones(4, CHANNELS))
        sync.revert_sync_batchnorm(model)
        return model(torch.ones(4, CHANNELS)).shape == (4, CHANNELS)

    assert group(1, run) == [True]


@torch.jit.script
def scripted(x, mean, var):
    # type: (Tensor, Tensor, Tensor) -> Tensor
    return torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)


class Scripted(torch.nn.BatchNorm1d):
    def forward(self, x):
        return scripted(x, self.running_mean, self.running_var)


def traced():
    class Inlined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = AroundSuper(CHANNELS)

        def forward(self, x):
            return torch.nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    return torch.fx.symbolic_trace(Inlined())


REFUSED = {
    "scripted module": (lambda: torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS))), "bad.*TorchScript"),
    "traced module": (
        lambda: torch.jit.trace(torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS)), torch.ones(2, CHANNELS)),
        "bad.*TorchScript",
    ),
    "scripted helper": (lambda: Scripted(CHANNELS), "bad.*'scripted'.*TorchScript"),
    "graph": (traced, "bad.*torch.fx graph.*batch_norm"),
    "process group": (lambda: torch.nn.SyncBatchNorm(3, process_group=object()), "bad has a process group"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_nothing_is_changed_where_something_is_refused(name):
    make, message = REFUSED[name]
    model = torch.nn.ModuleDict({"good": torch.nn.BatchNorm1d(3), "subclass": AroundSuper(3), "bad": make()})
    before = {path: (type(m), dict(vars(m))) for path, m in model.named_modules() if path in ("good", "subclass")}
    with pytest.raises(ValueError, match=message):
        sync.convert_sync_batchnorm(model)
    assert {p: (type(m), dict(vars(m))) for p, m in model.named_modules() if p in before} == before


class Derived(sync.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_revert_is_all_or_nothing():
    model = torch.nn.Sequential(sync.SyncBatchNorm(3), Derived(3))
    with pytest.raises(ValueError, match="1 .*Derived.* was made from SyncBatchNorm"):
        sync.revert_sync_batchnorm(model)
    assert type(model[0]) is sync.SyncBatchNorm


def test_scripts_without_batch_normalization_and_quantized_layers_are_left_alone():
    from torch.ao.nn import quantized

    model = torch.nn.ModuleList([torch.jit.script(torch.nn.ReLU()), quantized.BatchNorm2d(3), torch.nn.BatchNorm2d(3)])
    kinds = [type(m) for m in sync.convert_sync_batchnorm(model)]
    assert kinds[1] is quantized.BatchNorm2d and issubclass(kinds[2], sync.SyncBatchNorm)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_scripting_says_what_to_do_and_a_reverted_copy_is_scripted(kind):
    model = sync.convert_sync_batchnorm(torch.nn.Sequential(filled(kind(CHANNELS)))).eval()
    with pytest.raises(RuntimeError, match="revert_sync_batchnorm"):
        torch.jit.script(model)
    assert isinstance(model[0], sync.SyncBatchNorm if kind is torch.nn.BatchNorm1d else AroundSuper)
    x = values((4, CHANNELS))
    close(torch.jit.trace(model, x)(x), model(x))
    if kind is torch.nn.BatchNorm1d:
        close(torch.jit.script(sync.revert_sync_batchnorm(copy.deepcopy(model)))(x), model(x))


def test_arguments_of_another_type():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))

    class ProcessGroup:
        pass

    for convert in (sync.convert_sync_batchnorm, sync.SyncBatchNorm.convert_sync_batchnorm):
        with pytest.raises(TypeError, match="ProcessGroup.*syncbn.Worker"):
            convert(model, ProcessGroup())
    with pytest.raises(TypeError, match="worker is a syncbn.Worker"):
        sync.SyncBatchNorm(3, worker=ProcessGroup())
    with pytest.raises(TypeError, match="module"):
        sync.convert_sync_batchnorm([model])
    with pytest.raises(TypeError, match="prefix"):
        sync.convert_sync_batchnorm(model, prefix=3)
    with pytest.raises(ValueError, match="eps_mode"):
        sync.convert_sync_batchnorm(model, eps_mode="max")
    with pytest.raises(ValueError, match="numeric"):
        sync.convert_sync_batchnorm(model, numeric="ignore")
    assert type(model[0]) is torch.nn.BatchNorm1d


# ---- Converting again ----


def test_converting_again_takes_what_is_given(master):
    with syncbn.Worker(master.target, "first", 0, 1) as first, syncbn.Worker(master.target, "second", 0, 1) as second:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), AroundSuper(3), sync.SyncBatchNorm(3, layer="own"))
        sync.convert_sync_batchnorm(model, first, eps_mode="clamp")
        sync.convert_sync_batchnorm(model)
        assert [(m.worker, m.eps_mode, m.numeric) for m in model] == [(first, "clamp", "refuse")] * 3
        assert [m.layer for m in model] == ["0", "1", "own"]
        for _ in range(2):
            sync.convert_sync_batchnorm(model, second, eps_mode="add", prefix="g.", numeric="propagate")
            assert [(m.worker, m.eps_mode, m.numeric) for m in model] == [(second, "add", "propagate")] * 3
            assert [m.layer for m in model] == ["g.0", "g.1", "g.own"]
        assert [type(m).__name__ for m in sync.revert_sync_batchnorm(model)] == ["BatchNorm1d", "AroundSuper", "BatchNorm"]


def test_numeric_lets_nan_through_or_refuses_it(group):
    def run(worker):
        x = torch.tensor([[1.0], [float("nan")]])
        for numeric, kind in (("propagate", torch.nn.BatchNorm1d), ("propagate", AroundSuper)):
            layer = sync.convert_sync_batchnorm(kind(1), worker, numeric=numeric, prefix=f"{numeric} {kind.__name__} ")
            assert layer(x).isnan().all()
        assert sync.SyncBatchNorm(1, worker=worker, layer="made", numeric="propagate")(x).isnan().all()
        with pytest.raises(syncbn.NotFinite):
            sync.SyncBatchNorm(1, worker=worker, layer="refused")(x)

    group(1, run)


# ---- Sizes, as in torch ----


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_wrong_sizes_are_runtime_errors(group, name):
    def run(worker):
        layer = sync.SyncBatchNorm(3, worker=worker)
        getattr(layer, name).data = torch.ones(2)
        with pytest.raises(RuntimeError, match=f"{name} has 2 elements, and the layer 3 channels"):
            layer(torch.ones(4, 3))
        with pytest.raises(RuntimeError):
            layer.eval()(torch.ones(4, 3))

    group(1, run)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, AroundSuper])
def test_shorter_vectors_may_be_assigned(group, kind):
    """Network slimming: num_features keeps its old value."""

    def make():
        layer = kind(CHANNELS + 2).double()
        for name in ("weight", "bias"):
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach()[:CHANNELS].clone()))
        for name in ("running_mean", "running_var"):
            setattr(layer, name, getattr(layer, name)[:CHANNELS].clone())
        return torch.nn.Sequential(layer)

    as_on_the_whole_batch(group, make)


def test_a_missing_counter_without_momentum_leaves_running_statistics(group):
    def make():
        layer = torch.nn.BatchNorm1d(CHANNELS, momentum=None, dtype=DOUBLE)
        layer.num_batches_tracked = None
        return torch.nn.Sequential(layer)

    as_on_the_whole_batch(group, make)


# ---- torch.fx ----


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.act = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), AroundSuper(3)

    def forward(self, x):
        return self.act(self.bn(self.linear(x)).sin())


def test_layers_are_leaves_of_traces_and_go_on_in_them(group):
    """A model traced after its conversion is synchronized like any."""
    x, dy = values((6, 4)), values((6, CHANNELS), SEED + 1)
    whole = filled(Block())
    expected = step(whole, x, dy)
    # On one thread, since a trace patches torch.nn.Module for the whole process.
    models = [torch.fx.symbolic_trace(sync.convert_sync_batchnorm(filled(Block()))) for _ in range(2)]
    for model in models:
        nodes = {node.target for node in model.graph.nodes if node.op == "call_module"}
        assert nodes == {"linear", "bn", "act"}

    def run(worker):
        model = sync.convert_sync_batchnorm(models[worker.rank], worker)
        return step(model, x.split([2, 4])[worker.rank], dy.split([2, 4])[worker.rank])

    for actual, want in zip(zip(*group(2, run)), expected):
        close(torch.cat(actual), want)
    for model in models:
        for name, want in whole.state_dict().items():
            close(model.state_dict()[name], want)


def test_a_graph_of_plain_layers_is_converted(group):
    plain = filled(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)))
    traced = torch.fx.symbolic_trace(plain)
    for model in as_on_the_whole_batch(group, lambda: copy.deepcopy(traced)):
        assert isinstance(getattr(model, "1"), sync.SyncBatchNorm)
