"""Stream-ordered workers: the part of Python, without a GPU.

A stand-in plays the stream-ordered pass on the CPU: it is finished without a wait, its results are known after one.
"""

import threading
import warnings

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from syncbn import _library, _passes

CHANNELS = 4


class Late(_passes.ForwardPass):
    """A pass that claims to be stream-ordered; the host waits within `finish`, where the stream would."""

    waits = 0  # The number that the front made, in all passes.

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.stream_ordered = self._role != _library.BACKWARD_IF_REQUIRED

    def wait(self):
        self._count_wait()
        super().wait()

    def end(self, *arguments):
        self._count_wait()
        return super().end(*arguments)

    @staticmethod
    def _count_wait():
        with _lock:
            Late.waits += 1

    def finish(self, x, outputs):
        if not self._waited:
            with self.worker.handle():
                syncbn.core.wait(self.worker, _library.lib.syncbn_forward_wait, self.value)
        super().finish(x, outputs)

    def backward(self, inputs, outputs, **options):
        ordered, self.stream_ordered = self.stream_ordered, False
        try:
            super().backward(inputs, outputs, **options)
        finally:
            self.stream_ordered = ordered


_lock = threading.Lock()


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(_passes, "ForwardPass", Late)
    monkeypatch.setattr(Late, "waits", 0)


def data(seed=0, rows=6):
    return torch.randn(rows, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part_of(x, worker):
    return x.split([2, x.size(0) - 2])[worker.rank].clone().requires_grad_()


def oracle(x):
    whole = torch.nn.BatchNorm1d(CHANNELS).double()
    whole_x = x.clone().requires_grad_()
    return whole, whole_x, whole(whole_x)


def make_layer(worker):
    return sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)


def test_training_asks_a_late_pass_nothing(group, late):
    x = data()
    whole, whole_x, y = oracle(x)
    y.pow(3).sum().backward()

    def run(worker):
        layer, part = make_layer(worker), part_of(x, worker)
        layer(part).pow(3).sum().backward()
        return part.grad, layer

    results = group(2, run)
    assert Late.waits == 0
    torch.testing.assert_close(torch.cat([gradient for gradient, _ in results]), whole_x.grad)
    torch.testing.assert_close(sum(layer.weight.grad for _, layer in results), whole.weight.grad)
    for _, layer in results:
        torch.testing.assert_close(layer.running_var, whole.running_var)
        assert int(layer.num_batches_tracked) == 1


def test_a_cumulative_average_asks_the_device_nothing(group, late, monkeypatch):
    """Its weight is 1 / num_batches_tracked, which the GPU would have to be waited for to tell."""
    batches = [data(seed) for seed in range(3)]
    whole = torch.nn.BatchNorm1d(CHANNELS, momentum=None).double()
    for x in batches:
        whole(x)

    def run(worker):
        layer = make_layer(worker)
        layer.momentum = None
        for x in batches:
            layer(part_of(x, worker))
        return layer

    def forbidden(tensor):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("__float__", "__int__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, forbidden)
        layers = group(2, run)
    for layer in layers:
        assert int(layer.num_batches_tracked) == 3
        torch.testing.assert_close(layer.running_mean, whole.running_mean)
        torch.testing.assert_close(layer.running_var, whole.running_var)


class Counting(torch.nn.BatchNorm1d):
    """Has a forward of its own, which counts for itself."""

    def forward(self, input):
        self.num_batches_tracked += 1
        return torch.nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.25, self.eps
        )


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, Counting])
def test_the_library_knows_the_count_of_a_pass_that_may_fail_unseen(group, late, monkeypatch, kind):
    """It takes the batch back if the round fails, which nobody may have waited for."""
    counts = []
    finish = Late.finish

    def recording(self, x, outputs):
        counts.append(_library.ForwardOutputs.from_buffer_copy(outputs))
        finish(self, x, outputs)

    monkeypatch.setattr(Late, "finish", recording)

    def run(worker):
        layer = sync.convert_sync_batchnorm(kind(CHANNELS).double(), worker)
        layer(part_of(data(), worker))
        return layer

    addresses = sorted(layer.num_batches_tracked.data_ptr() for layer in group(2, run))
    assert sorted(given.batches for given in counts) == addresses
    assert all(given.cumulative == 0 for given in counts)


def test_no_grad_asks_nothing(group, late):
    x = data()

    def run(worker):
        layer = make_layer(worker)
        with torch.no_grad():
            return layer(part_of(x, worker))

    torch.testing.assert_close(torch.cat(group(2, run)), oracle(x)[2].detach())
    assert Late.waits == 0


def test_an_input_without_gradient_is_host_driven(group, late):
    x = data()

    def run(worker):
        layer = make_layer(worker)
        layer(part_of(x, worker).detach()).pow(2).sum().backward()
        return layer.weight.grad

    group(2, run)
    assert Late.waits == 2


def test_a_second_backward_pass_runs_ahead_too(group, late):
    x = data()
    whole, whole_x, y = oracle(x)
    dys = [data(1), data(2)]
    expected = [torch.autograd.grad(y, whole_x, dy, retain_graph=True)[0] for dy in dys]

    def run(worker):
        layer, part = make_layer(worker), part_of(x, worker)
        y = layer(part)
        return [torch.autograd.grad(y, part, part_of(dy, worker).detach(), retain_graph=True)[0] for dy in dys]

    results = group(2, run)
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(torch.cat([result[index] for result in results]), gradient)
    assert Late.waits == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_finishes_a_late_pass_twice(group, late, reentrant):
    from torch.utils.checkpoint import checkpoint

    x = data()
    whole, whole_x, y = oracle(x)
    y.sin().pow(3).sum().backward()

    def run(worker):
        layer, part = make_layer(worker), part_of(x, worker)
        checkpoint(lambda value: layer(value).sin(), part, use_reentrant=reentrant).pow(3).sum().backward()
        return part.grad, layer

    results = group(2, run)
    assert Late.waits == 0
    torch.testing.assert_close(torch.cat([gradient for gradient, _ in results]), whole_x.grad)
    for _, layer in results:
        torch.testing.assert_close(layer.running_mean, whole.running_mean)
        assert int(layer.num_batches_tracked) == 1


def test_a_stream_ordered_worker_trains_on_the_cpu_as_ever(group):
    x = data()
    _, whole_x, y = oracle(x)
    y.pow(3).sum().backward()

    def run(worker):
        assert worker.stream_ordered
        layer, part = make_layer(worker), part_of(x, worker)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Nothing is said of tensors that are on no GPU.
            layer(part).pow(3).sum().backward()
        assert worker.settle(0.0) and worker.settle()
        return part.grad

    torch.testing.assert_close(torch.cat(group(2, run, stream_ordered=True)), whole_x.grad)


def test_want_of_support_is_told_once(master):
    with syncbn.Worker(master.target, "explain", 0, 1, stream_ordered=True) as worker:
        with pytest.warns(RuntimeWarning, match="the host drives them"):
            worker.explain_host_driven(1000)  # No machine has that many.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            worker.explain_host_driven(1000)


def test_what_a_worker_has_not_told_is_raised_once_it_has_left(master, monkeypatch):
    worker = syncbn.Worker(master.target, "leaving", 0, 1)
    failure = syncbn.DeadlineExceeded("late", 4)

    def settle(timeout=None):
        raise failure

    monkeypatch.setattr(worker, "settle", settle)
    with pytest.raises(syncbn.DeadlineExceeded) as raised:
        worker.leave()
    assert raised.value is failure
    assert worker.closed
    with syncbn.Worker(master.target, "leaving", 0, 1) as again:  # The rank is free: the first has left.
        assert again.wait_for_members(5.0)
