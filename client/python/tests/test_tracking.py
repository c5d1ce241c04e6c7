"""Running statistics that are absent or switched off after construction: what torch's own layer does, in every combination."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn.torch import compat

SEED = 6161
CHANNELS = 3
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SUBSETS = [names for size in range(4) for names in itertools.combinations(BUFFERS, size)]
# Constructed with tracking, what is set afterwards (None: nothing), momentum, the buffers that become None.
COMBINATIONS = list(itertools.product((True, False), (None, True, False), (0.3, None), SUBSETS))


def changed(layer, tracks, absent):
    if tracks is not None:
        layer.track_running_stats = tracks
    for name in absent:
        setattr(layer, name, None)
    return layer


def outcome(call, layer, batches):
    """Returns the state after each of two steps of training and an evaluation, or the error that ends them."""
    found = []
    for training, x in zip((True, True, False), batches):
        layer.train(training)
        try:
            found.append(call(layer, x).detach())
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    return found + [getattr(layer, name) for name in BUFFERS]


def close(found, expected):
    if isinstance(expected[0], str):  # Newer torch refuses one of the two alone, but in its synchronized layer.
        assert "both be None or neither" in expected[0] and isinstance(found[0], torch.Tensor)
        return
    for one, other in zip(found, expected):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other)
        else:
            assert one == other, (found, expected)


def of_ours(tracked, momentum):
    return sync.SyncBatchNorm(CHANNELS, momentum=momentum, track_running_stats=tracked)


def converted(tracked, momentum):
    layer = torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, track_running_stats=tracked)
    return sync.convert_sync_batchnorm(torch.nn.Sequential(layer))[0]


def converted_subclass(tracked, momentum):
    class Own(torch.nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input)

    return sync.convert_sync_batchnorm(torch.nn.Sequential(Own(CHANNELS, momentum=momentum, track_running_stats=tracked)))[0]


def masked(layer, x):
    return layer(x, mask=torch.ones(len(x), dtype=torch.bool))


PLAIN = torch.nn.Module.__call__


@pytest.mark.parametrize(
    "make, call", [(of_ours, PLAIN), (converted, PLAIN), (converted_subclass, PLAIN), (of_ours, masked)]
)
def test_as_torchs_layer(group, make, call):
    generator = torch.Generator().manual_seed(SEED)
    print("seed", SEED)
    batches = torch.randn(3, 8, CHANNELS, generator=generator, dtype=torch.float32)

    def run(worker):
        for tracked, tracks, momentum, absent in COMBINATIONS:
            theirs = torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, track_running_stats=tracked)
            expected = outcome(PLAIN, changed(theirs, tracks, absent), batches)
            ours = make(tracked, momentum)
            ours.worker = worker
            close(outcome(call, changed(ours, tracks, absent), batches), expected)

    group(1, run)


@pytest.mark.parametrize("make", [of_ours, converted, converted_subclass])
def test_replicas_as_torchs_layer(group, make):
    batches = torch.randn(3, 8, CHANNELS, generator=torch.Generator().manual_seed(SEED))

    def run(worker):
        for tracked, tracks, momentum, absent in COMBINATIONS[::3]:
            theirs = torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, track_running_stats=tracked)
            expected = outcome(PLAIN, changed(theirs, tracks, absent), batches)
            ours = make(tracked, momentum)
            ours.worker = worker
            together = compat.DataParallelWithCallback(torch.nn.Sequential(changed(ours, tracks, absent)), replicas=2)
            close(outcome(lambda layer, x: together.train(layer.training)(x), ours, batches), expected)

    group(1, run)


@pytest.mark.parametrize("make", [of_ours, converted_subclass])
def test_a_batch_that_is_not_taken_is_not_counted_where_there_are_no_statistics(group, make):
    def run(worker):
        layer = changed(make(True, 0.3), None, ["running_mean", "running_var"])
        layer.worker = worker
        layer(torch.zeros(0, CHANNELS))
        assert int(layer.num_batches_tracked) == 0
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(torch.zeros(1, CHANNELS))
        assert int(layer.num_batches_tracked) == 0
        layer(torch.zeros(2, CHANNELS))
        assert int(layer.num_batches_tracked) == 1

    group(1, run)


def test_an_epsilon_of_zero_and_one_below(group):
    def run(worker):
        x = torch.tensor([[1.0], [3.0]])
        assert sync.SyncBatchNorm(1, eps=0.0, worker=worker)(x).tolist() == [[-1.0], [1.0]]
        layer = sync.SyncBatchNorm(1, eps=-1e-3, worker=worker)
        for call in (PLAIN, masked):
            with pytest.raises(ValueError, match="eps is -0.001; it has to be at least 0"):
                call(layer, x)
        with pytest.raises(ValueError, match="eps is -0.001; it has to be at least 0"):
            sync.functional.batch_norm(x, None, None, training=True, eps=-1e-3, layer="below", worker=worker)
        assert int(layer.num_batches_tracked) == 0

    group(1, run)


@pytest.mark.parametrize(
    "number", [True, False, 1, np.float32(0.3), np.float16(0.25), np.int64(1), np.array(0.3), torch.tensor(0.3)], ids=repr
)
@pytest.mark.parametrize("make", [of_ours, converted, converted_subclass])
def test_numbers_of_any_type(group, make, number):
    """True is 1 and False 0, as for torch's layer."""

    def run(worker):
        layer = make(True, number).double()
        layer.worker = worker
        expected = torch.nn.BatchNorm1d(CHANNELS, momentum=float(number)).double()
        for seed in range(2):
            x = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3
            torch.testing.assert_close(layer(x), expected(x), rtol=1e-11, atol=1e-11)
        for name in BUFFERS:
            torch.testing.assert_close(getattr(layer, name), getattr(expected, name), rtol=1e-6, atol=1e-6)

    group(1, run)


@pytest.mark.parametrize("eps", [True, np.float32(0.5)])
def test_an_epsilon_of_any_type(group, eps):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, eps=eps, worker=worker)
        x = torch.randn(4, CHANNELS)
        torch.testing.assert_close(layer(x), torch.nn.BatchNorm1d(CHANNELS, eps=float(eps))(x))
        torch.testing.assert_close(layer.eval()(x[:0]), x[:0])

    group(1, run)
