"""Trials of forwards: what they find, when there is one, and that they leave nothing."""

import random
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import syncbn.torch as sync
from conversions import CHANNELS, as_on_the_whole_batch, checkpointed, close, converted, filled, step, values
from honest_forwards import Compact, Gated
from local_forwards import SUMS, formula


class Changing(Compact):
    """Changes what a forward can change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen, self.named, self.count = [], {"last": 0}, 0
        self.plain, self.generator = torch.zeros(()), torch.Generator()

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.seen.append(self.count)
        self.named["last"] = self.count
        self.count += 1
        noise = torch.rand(1) + random.random() + np.random.rand() + torch.rand(1, generator=self.generator)
        y = self.act(self.normalized(x))
        return y.flip(1) * self.slope + noise.to(y.dtype) * 0


def test_a_trial_leaves_nothing(group):
    """State, random numbers and rounds are those of the forwards that the program has called."""

    def run(worker):
        model, hooked = converted(Changing(), worker), []
        model[0].act.register_forward_hook(lambda *_: hooked.append(1))
        plain = torch.nn.Sequential(filled(Changing()))
        x = values((4, CHANNELS))
        found = []
        for layers in (plain, model):
            torch.manual_seed(1)
            random.seed(1)
            np.random.seed(1)
            layers(x.clone().requires_grad_())
            layers(x.clone().requires_grad_()).sum().backward()
            found.append([torch.rand(2).tolist(), random.random(), np.random.rand()])
        assert found[0] == found[1]
        layer = model[0]
        assert (layer.count, layer.seen, layer.named, int(layer.calls), float(layer.plain)) == (2, [0, 1], {"last": 1}, 2, 2.0)
        assert layer.generator.get_state().equal(plain[0].generator.get_state())
        assert int(layer.num_batches_tracked) == int(plain[0].num_batches_tracked)
        close(layer.running_mean, plain[0].running_mean)
        for ours, torchs in zip(model.parameters(), plain.parameters()):
            close(ours.grad, torchs.grad)
        assert len(hooked) == 2
        assert worker.stats().rounds == 3  # The first forward is without a backward pass.

    group(1, run)


def counted(module):
    """Counts the runs of its forward where a trial cannot put the number back."""
    runs = []
    original = module.forward

    def forward(x):
        runs.append(len(x))
        return original(x)

    module.forward = forward
    return runs


class Asserting(Compact):
    """The form of timm's, with an assertion and an activation in place."""

    def forward(self, x):
        torch._assert(x.ndim == 2, f"expected a 2D input (got {x.ndim}D input)")
        return F.silu(F.dropout(self.normalized(x), 0.5), inplace=True)


@pytest.mark.parametrize("kind", [Compact, Asserting])
def test_a_forward_of_the_usual_form_is_not_tried(group, kind):
    def run(worker):
        layer = kind()
        runs = counted(layer)
        model = converted(layer, worker)
        model(values((4, CHANNELS)).requires_grad_().clone())
        return runs

    assert group(1, run) == [[4]]


def test_a_way_through_the_forward_is_tried_once(group):
    class TwoWays(Compact):
        def forward(self, x):
            return self.normalized(x) if self.plain else self.normalized(x).flip(1)

    def run(worker):
        layer = TwoWays()
        runs = counted(layer)
        layer.plain = True
        model, x = converted(layer, worker), values((4, CHANNELS))
        numbers = []
        for layer.plain in (True, True, False, False, True, False):
            before = len(runs)
            model(x)
            numbers.append(len(runs) - before)
        return numbers

    (numbers,) = group(1, run)
    assert numbers[:2] == [1, 1] and numbers[2] > 1 and numbers[3:] == [1, 1, 1]


def test_another_way_is_tried_when_it_is_gone(group):
    """A forward that is synchronized at first, and local later."""

    def run(worker):
        layer = Compact()
        layer.warm = True
        original, local = layer.forward, formula(SUMS["einsum"])
        layer.forward = lambda x: original(x) if layer.warm else type(local).forward(local, x)
        model, x = converted(layer, worker), values((4, CHANNELS))
        model(x)
        layer.warm = False
        with pytest.raises(sync.NotSynchronized):
            model(x)

    group(1, run)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_trial_within_a_checkpointed_segment(group, reentrant):
    as_on_the_whole_batch(group, lambda: filled(torch.nn.Sequential(Gated())), call=checkpointed(reentrant))


def test_replicas_try_and_share_what_they_find(group):
    from syncbn.torch import compat

    runs = []

    class Counted(Gated):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    def run(worker):
        model = compat.DataParallelWithCallback(converted(Counted(), worker), replicas=2)
        model(values((6, CHANNELS)))
        first = len(runs)
        model(values((6, CHANNELS)))
        return len(runs) - first

    assert group(1, run) == [2]
    as_on_the_whole_batch(
        group,
        lambda: filled(torch.nn.Sequential(Gated())),
        call=lambda model, x, dy: step(
            compat.DataParallelWithCallback(model, replicas=2) if hasattr(model[0], "layer") else model, x, dy
        ),
    )


def test_a_forward_that_takes_a_batch_of_one_size(group):
    """A trial has the batch's own size."""

    class Fixed(Compact):
        def forward(self, x, rows):
            assert len(x) == len(rows) == 5
            return self.normalized(x) + rows.cumsum(1)

    def run(worker):
        layer = sync.convert_sync_batchnorm(filled(Fixed()), worker, prefix="fixed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return layer(values((5, CHANNELS)), rows=values((5, CHANNELS)))

    (found,) = group(1, run)
    close(found, filled(Fixed())(values((5, CHANNELS)), values((5, CHANNELS))))
