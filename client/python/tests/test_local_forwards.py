"""No forward of a subclass goes on with statistics of the local batch, unless it says so; and none is refused for nothing."""

import secrets
import warnings

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import syncbn
import syncbn.torch as sync
from conversions import CHANNELS, as_on_the_whole_batch, close, converted, filled, values
from honest_forwards import HONEST, Enhanced, Halves
from local_forwards import LOCAL


@pytest.mark.parametrize("name", list(LOCAL))
def test_a_forward_with_statistics_of_the_local_batch_is_refused(group, name):
    def run(worker):
        model = converted(LOCAL[name](), worker)
        kind = type(model[0]).__qualname__
        for _ in range(2):
            with pytest.raises(sync.NotSynchronized, match=f"layer '0': the forward of .*{kind} normalizes"):
                model(values((4 + worker.rank, CHANNELS)))
        assert worker.stats().rounds == 0
        return model

    for model in group(2, run):
        assert type(sync.revert_sync_batchnorm(model)[0]) is type(LOCAL[name]())


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [(), (2, 4)])
def test_few_rows_show_it_too(group, rows, width):
    """Every worker refuses at the same call, whichever batch it has: otherwise the others would wait for it."""

    class Local(torch.nn.BatchNorm2d):
        def forward(self, x):
            return x - torch.einsum("nc...->c...", x) / max(1, len(x))

    def run(worker):
        with pytest.raises(sync.NotSynchronized):
            converted(Local(CHANNELS), worker)(values((rows, CHANNELS) + width))

    group(1, run)


@pytest.mark.skipif(torch.__version__ < "2", reason="torch.autograd.Function.setup_context is of torch 2")
def test_a_function_whose_forward_has_no_context(group):
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return F.batch_norm(x, None, None, training=True)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = F.batch_norm(x, None, None, training=True)
            return torch.autograd.grad(y, x, dy)[0]

    class OfAFunction(torch.nn.BatchNorm1d):
        def forward(self, x):
            return Fused.apply(x)

    def run(worker):
        model = converted(OfAFunction(CHANNELS), worker)
        with pytest.raises(sync.NotSynchronized, match="within a torch.autograd.Function"):
            model(values((4, CHANNELS)).requires_grad_())
        assert worker.stats().rounds == 0

    group(2, run)


class Beside(torch.nn.BatchNorm1d):
    """Synchronized, with a local part beside it."""

    def forward(self, x):
        return super().forward(x) + self.local(x)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy - dy.mean(0)


PARTS = {
    "mean": (lambda x: x - x.mean(0), "output"),
    "einsum": (lambda x: torch.einsum("nc->c", x), "output"),
    "item": (lambda x: x * x.mean().item(), "output"),
    "gradient": (Centred.apply, "gradient"),
}


@pytest.mark.parametrize("name", list(PARTS))
def test_a_local_part_beside_a_synchronized_one_is_told_once(group, name):
    function, part = PARTS[name]

    def run(worker):
        layer = Beside(CHANNELS)
        layer.local = function
        model, x = converted(layer, worker), values((4, CHANNELS))
        with pytest.warns(RuntimeWarning, match=f"layer '0': in the forward of .*Beside, the {part} depends on other rows"):
            model(x.clone().requires_grad_())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x.clone().requires_grad_())

    group(1, run)


def test_a_forward_that_no_trial_can_judge_says_so(group):
    class Noisy(torch.nn.BatchNorm1d):
        def forward(self, x):
            return x + secrets.randbelow(1 << 30)

    def run(worker):
        with pytest.warns(RuntimeWarning, match="could not be found out .two runs with the same input differ"):
            converted(Noisy(CHANNELS), worker)(values((4, CHANNELS)))

    group(1, run)


# ---- Subclasses that are as they should be ----


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", list(HONEST))
def test_honest_subclasses_are_neither_refused_nor_warned_of(group, name):
    def make():
        torch.manual_seed(0)
        return filled(torch.nn.Sequential(HONEST[name](), torch.nn.Linear(CHANNELS, CHANNELS)))

    as_on_the_whole_batch(group, make)
    as_on_the_whole_batch(group, make, sizes=(1, 4), steps=1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_honest_subclasses_of_images(group):
    as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(Enhanced(CHANNELS))), shape=(6, CHANNELS, 2, 4))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_batch_that_is_normalized_in_parts(group):
    """Each part has a round; the parts of a trial have the statistics of those of its first run."""

    def run(worker):
        return converted(Halves(), worker)(values((8, CHANNELS)).split(4)[worker.rank])

    first, second = group(2, run)
    x = values((8, CHANNELS))
    whole = filled(Halves())
    expected = [whole.normalized(torch.cat([x[i : i + 2], x[4 + i : 6 + i]])) for i in (0, 2)]
    close(torch.cat([first, second]), torch.cat([expected[0][:2], expected[1][:2], expected[0][2:], expected[1][2:]]))


class OwnMoments(torch.nn.BatchNorm1d):
    """Synchronizes by itself."""

    def forward(self, x):
        if not hasattr(self, "layer"):  # The oracle.
            mean, var = x.mean(0), x.var(0, unbiased=False)
        else:
            mean, var = sync.moments(x, 0, layer="moments", worker=self.worker)
        return (x - mean) * torch.rsqrt(var + self.eps)


class OwnFunction(torch.nn.BatchNorm1d):
    def forward(self, x):
        if not hasattr(self, "layer"):
            return F.batch_norm(x, None, None, self.weight, self.bias, True)
        return syncbn.functional.batch_norm(
            x, None, None, self.weight, self.bias, True, layer="function", worker=self.worker
        )


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", [OwnMoments, OwnFunction])
def test_a_forward_that_synchronizes_by_itself(group, kind):
    as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(kind(CHANNELS))))


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile is of torch 2")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_within_a_forward(group, backend):
    class Compiled(torch.nn.BatchNorm1d):
        def __init__(self):
            super().__init__(CHANNELS)
            self.function = torch.compile(
                lambda x, weight, bias: F.batch_norm(x.sin(), None, None, weight, bias, True) * 2, backend=backend
            )

        def forward(self, x):
            return self.function(x, self.weight, self.bias)

    as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(Compiled())))
