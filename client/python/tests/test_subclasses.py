"""Subclasses, and forwards that are assigned to a layer, run their own forward, and it is synchronized."""

import functools
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.utils.checkpoint

import syncbn.torch as sync
from conversions import CHANNELS, DOUBLE, KINDS, Activated, AroundSuper, AroundTorchs, Nested
from conversions import as_on_the_whole_batch, checkpointed, close, filled, step, values


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    make = lambda: filled(torch.nn.Sequential(Activated(CHANNELS, 0.2, momentum=None)))

    as_on_the_whole_batch(group, make, call=checkpointed(reentrant))


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

    with pytest.warns(RuntimeWarning, match="layer 'batch_norm': in the forward of .*Parent, the output depends on other rows"):
        results = group(2, run)
    for both, alone in results:
        assert both > 1.1 and alone == pytest.approx(1.0, abs=1e-4)


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
