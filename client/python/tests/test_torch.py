"""SyncBatchNorm of several workers against torch's own BatchNorm, in float64, on the whole batch."""

import concurrent.futures
import contextlib
import copy
import inspect
import io
import itertools
import os
import pickle
import shutil
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync

SEED = 8731
CHANNELS = 5
SPATIAL = {2: (), 3: (6,), 4: (4, 3), 5: (2, 3, 4)}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Whole(torch.nn.modules.batchnorm._BatchNorm):
    """torch's batch normalization for any rank: the oracle."""

    def _check_input_dim(self, input):
        pass


class WholeClamped(Whole):
    """The same with invstd = 1/sqrt(max(var, eps))."""

    def forward(self, x):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        with torch.no_grad():
            n = x.numel() / x.size(1)
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        y = (x - mean.view(shape)) / var.view(shape).clamp(min=self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def close(actual, expected, dtype=torch.float64):
    tolerance = TOLERANCE[dtype]
    expected = expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double(), expected, rtol=tolerance, atol=tolerance * scale, check_stride=False
    )


def lay_out(x, layout):
    """x with the same values in other memory."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.zeros(x.shape[:-1] + (2 * x.shape[-1],), dtype=x.dtype)  # "strided": every second element.
    wide[..., ::2] = x
    return wide[..., ::2]


def split(x, sizes):
    return [part.clone() for part in x.split(list(sizes))]


def initialise(module, generator):
    with torch.no_grad():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)


def random(shape, generator, dtype=torch.float64):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def check(group, sizes, shape=(4, 3), dtype=torch.float64, layout="contiguous", parameters=None, mode="add", **options):
    """Two training steps and an evaluation: outputs, gradients and running statistics."""
    parameters = parameters or (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    whole = (Whole if mode == "add" else WholeClamped)(CHANNELS, **options)
    initialise(whole, generator)
    whole = whole.to(parameters)
    state = copy.deepcopy(whole.state_dict())
    whole = whole.double()
    batches = [
        (
            random((sum(sizes), CHANNELS) + shape, generator, dtype),
            random((sum(sizes), CHANNELS) + shape, generator, dtype),
        )
        for _ in range(2)
    ]

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", eps_mode=mode, dtype=parameters, **options)
        layer.load_state_dict(state)
        steps = []
        for x, dy in batches:
            x = lay_out(split(x, sizes)[worker.rank], layout).requires_grad_()
            y = layer(x)
            y.backward(lay_out(split(dy, sizes)[worker.rank], "strided" if layout == "strided" else "contiguous"))
            assert y.dtype == dtype and y.shape == x.shape
            if layout == "channels_last" and y.numel():
                assert y.movedim(1, -1).is_contiguous() and x.grad.shape == x.shape
            steps.append((y, x.grad, copy.deepcopy(layer.state_dict())))
        layer.eval()
        return steps, layer(split(batches[0][0], sizes)[worker.rank]), layer

    results = group(len(sizes), run)
    for index, (x, dy) in enumerate(batches):
        x = x.double().requires_grad_()
        y = whole(x)
        y.backward(dy.double())
        close(torch.cat([steps[index][0] for steps, _, _ in results]), y, dtype)
        close(torch.cat([steps[index][1] for steps, _, _ in results]), x.grad, dtype)
        for steps, _, _ in results:
            for name, expected in whole.state_dict().items():
                close(steps[index][2][name], expected, parameters)
    for name, parameter in whole.named_parameters():
        total = sum(dict(layer.named_parameters())[name].grad.double() for _, _, layer in results)
        close(total, parameter.grad, max(dtype, parameters, key=TOLERANCE.get))
    whole.eval()
    expected = Whole.forward(whole, batches[0][0].double())  # It adds epsilon in either mode.
    close(torch.cat([evaluated for _, evaluated, _ in results]), expected, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rank", list(SPATIAL))
def test_ranks_types_and_layouts(group, rank, dtype, layout):
    if rank == 2 and layout == "channels_last":
        pytest.skip("a matrix has one layout")
    check(group, (1, 3, 2), SPATIAL[rank], dtype, layout)


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_with_parameters_of_another_type(group, dtype, parameters):
    if {dtype, parameters} == {torch.float16, torch.bfloat16}:
        pytest.skip("no model mixes the two")
    check(group, (2, 3), dtype=dtype, parameters=parameters)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_options(group, affine, tracked, momentum):
    if not tracked:
        # Evaluation then takes the local batch's statistics, which another test checks.
        check_without_tracking(group, affine, momentum)
    else:
        check(group, (2, 1), affine=affine, momentum=momentum)


def check_without_tracking(group, affine, momentum):
    generator = torch.Generator().manual_seed(SEED)
    x = random((5, CHANNELS, 3), generator)
    options = dict(affine=affine, track_running_stats=False, momentum=momentum, dtype=torch.float64)
    whole = Whole(CHANNELS, **options)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", **options)
        part = split(x, (2, 3))[worker.rank]
        trained = layer(part)
        assert layer.running_mean is None and layer.num_batches_tracked is None
        return trained, layer.eval()(part)

    results = group(2, run)
    close(torch.cat([trained for trained, _ in results]), whole(x))
    for (_, evaluated), part in zip(results, split(x, (2, 3))):
        close(evaluated, whole.eval()(part))


@pytest.mark.parametrize("sizes", [(4,), (1, 2, 5, 8), (0, 3), (3, 0, 0, 1), (1, 1)])
@pytest.mark.parametrize("rank", [2, 4])
def test_uneven_and_empty_batches(group, sizes, rank):
    check(group, sizes, SPATIAL[rank])


@pytest.mark.parametrize("eps", [1e-5, 2.0, 1e3])
def test_clamped_epsilon(group, eps):
    check(group, (1, 2, 3), mode="clamp", eps=eps)


def test_clamped_evaluation_adds_epsilon(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, eps=0.5, worker=worker, eps_mode="clamp").double().eval()
        return layer(torch.ones(1, 2, dtype=torch.float64))

    close(group(1, run)[0], torch.full((1, 2), 1.5, dtype=torch.float64).rsqrt())


def test_far_from_zero(group):
    """|mean| / std of 10,000 in float32 leaves the output right to the rounding of the input."""
    generator = torch.Generator().manual_seed(SEED)
    x = (torch.randn((16, 3, 32), generator=generator, dtype=torch.float64) + 1e4).float()
    whole = Whole(3).double()

    def run(worker):
        return sync.SyncBatchNorm(3, worker=worker, layer="bn")(split(x, (3, 13))[worker.rank])

    actual = torch.cat(group(2, run)).double()
    torch.testing.assert_close(actual, whole(x.double()), rtol=0, atol=5e-6 * 4)


def test_a_single_value_in_all_raises_everywhere_and_changes_nothing(group):
    def run(worker):
        layer = sync.SyncBatchNorm(3, worker=worker, layer="bn")
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(torch.ones(1 if worker.rank == 0 else 0, 3))
        return int(layer.num_batches_tracked), layer.running_mean.tolist()

    assert group(2, run) == [(0, [0.0] * 3)] * 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_round_that_fails_counts_no_batch(group, momentum):
    def run(worker):
        layer = sync.SyncBatchNorm(3, momentum=momentum, worker=worker, layer="bn")
        x = torch.arange(12.0).view(4, 3)
        with pytest.raises(syncbn.Error, match="NaN|nan"):
            layer(x * float("nan") if worker.rank == 0 else x)
        after_failure = int(layer.num_batches_tracked), layer.running_mean.tolist()
        layer(x)
        return after_failure, int(layer.num_batches_tracked), layer.running_mean.tolist()

    rate = 1.0 if momentum is None else momentum
    expected = (0, [0.0] * 3), 1, pytest.approx([rate * mean for mean in (4.5, 5.5, 6.5)])
    assert group(2, run) == [expected] * 2


def test_a_single_value_here_is_fine_if_there_are_others(group):
    check(group, (1, 1, 1), ())


def test_no_value_anywhere(group):
    def run(worker):
        layer = sync.SyncBatchNorm(3, worker=worker, layer="bn", momentum=None)
        x = torch.zeros(0, 3, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 3, 2)
        assert layer.weight.grad.tolist() == [0.0] * 3
        return int(layer.num_batches_tracked), layer.running_mean.tolist(), layer.running_var.tolist()

    assert group(2, run) == [(0, [0.0] * 3, [1.0] * 3)] * 2


@pytest.mark.parametrize("shape,error", [((3,), "at least 2D"), ((2, 0), "non-zero"), ((2, 4), "channels")])
def test_wrong_shapes(shape, error):
    with pytest.raises(ValueError, match=error):
        sync.SyncBatchNorm(3)(torch.zeros(shape))


def test_wrong_types_and_process_groups(master):
    with syncbn.Worker(master.target, "types", 0, 1) as worker:
        with pytest.raises(TypeError, match="int64"):
            sync.SyncBatchNorm(3, worker=worker)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="process_group"):
        sync.SyncBatchNorm(3, process_group=object())
    with pytest.raises(ValueError, match="eps_mode"):
        sync.SyncBatchNorm(3, eps_mode="max")


def test_training_without_a_worker_is_an_error_and_not_silently_local(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(syncbn.FailedPrecondition, match="no worker"):
        sync.SyncBatchNorm(3)(torch.zeros(2, 3))


def test_evaluation_needs_no_worker():
    layer = sync.SyncBatchNorm(3).eval()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(SEED))
    close(layer(x), torch.nn.BatchNorm1d(3).eval()(x), torch.float32)


def test_evaluation_gradients_with_half_inputs():
    generator = torch.Generator().manual_seed(SEED)
    x, dy = random((4, 3, 5), generator, torch.bfloat16), random((4, 3, 5), generator, torch.bfloat16)
    layer, whole = sync.SyncBatchNorm(3), Whole(3)
    initialise(layer, generator)
    whole.load_state_dict(layer.state_dict())
    layer.eval(), whole.double().eval()
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    layer(mine).backward(dy)
    whole(theirs).backward(dy.double())
    close(mine.grad, theirs.grad, torch.bfloat16)
    close(layer.weight.grad, whole.weight.grad, torch.float32)
    close(layer.bias.grad, whole.bias.grad, torch.float32)


# ---- Participation in backward rounds ----


def test_no_grad_in_training_updates_statistics_and_needs_no_backward(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        with torch.no_grad():
            y = layer(torch.full((2, 2), float(worker.rank)))
        return y.requires_grad, layer.running_mean.tolist()

    for requires_grad, mean in group(2, run):
        assert not requires_grad
        np.testing.assert_allclose(mean, [0.05, 0.05], rtol=1e-6)


def test_the_first_layer_has_no_backward_round(group):
    """Its input needs no gradient at any worker, so a worker that never calls backward blocks nobody."""

    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        y = layer(torch.arange(4.0).reshape(2, 2) + worker.rank)
        if worker.rank == 0:
            y.sum().backward()
        worker.all_reduce("end", [0.0])
        return layer.bias.grad

    assert group(2, run)[0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("parameters_frozen", [True, False])
def test_a_worker_whose_input_needs_no_gradient_serves_those_who_need_it(group, parameters_frozen):
    generator = torch.Generator().manual_seed(SEED)
    x, dy = random((5, CHANNELS), generator), random((5, CHANNELS), generator)
    whole_x = x.clone().requires_grad_()
    Whole(CHANNELS).double()(whole_x).backward(dy)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        layer.requires_grad_(not parameters_frozen)
        part = split(x, (2, 3))[worker.rank].requires_grad_(worker.rank == 0)
        y = layer(part)
        assert y.requires_grad
        y.backward(split(dy, (2, 3))[worker.rank])
        return part.grad

    results = group(2, run)
    assert results[1] is None
    close(results[0], whole_x.grad[:2])


def test_frozen_everywhere_builds_no_graph(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn").requires_grad_(False)
        return layer(torch.ones(2, 2)).requires_grad

    assert group(2, run) == [False, False]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_frozen_parameter(group, frozen):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn", dtype=torch.float64)
        getattr(layer, frozen).requires_grad_(False)
        x = (torch.arange(6.0, dtype=torch.float64).reshape(3, 2) * (1 + worker.rank)).requires_grad_()
        layer(x).pow(2).sum().backward()
        return layer.weight.grad is None, layer.bias.grad is None

    assert group(2, run) == [(frozen == "weight", frozen == "bias")] * 2


def test_a_second_backward_pass_through_one_forward(group):
    generator = torch.Generator().manual_seed(SEED)
    x = random((5, CHANNELS, 2), generator)
    dys = [random((5, CHANNELS, 2), generator) for _ in range(3)]
    whole, expected = Whole(CHANNELS).double(), []
    whole_x = x.clone().requires_grad_()
    y = whole(whole_x)
    for dy in dys:
        expected.append(torch.autograd.grad(y, (whole_x, whole.weight), dy, retain_graph=True))

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        part = split(x, (2, 3))[worker.rank].requires_grad_()
        y = layer(part)
        return [
            torch.autograd.grad(y, (part, layer.weight), split(dy, (2, 3))[worker.rank], retain_graph=True)
            for dy in dys
        ]

    results = group(2, run)
    for index in range(3):
        close(torch.cat([r[index][0] for r in results]), expected[index][0])
        close(sum(r[index][1] for r in results), expected[index][1])


# ---- Models ----


def make_model(seed=SEED):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 3, stride=2, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 9, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Linear(8, 3),
    ).double()


def train(model, x, targets, steps=3, worker=None, runner=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    runner = runner or model
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(runner(x), targets, reduction="sum")
        (loss / len(x) if worker is None else loss).backward()
        if worker is not None:
            assert sync.all_reduce_gradients(model, worker, weight=len(x)) == 16
        optimizer.step()
    return model


def compare_models(model, whole):
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-9, atol=1e-11, msg=name)


def data(count=16):
    generator = torch.Generator().manual_seed(SEED)
    return random((count, 1, 8, 8), generator), torch.arange(count) % 3


@pytest.mark.parametrize("sizes", [(1, 2, 5, 8), (0, 16), (7, 9)])
def test_a_converted_model_trains_as_on_the_global_batch(group, sizes):
    x, targets = data()
    whole = train(make_model(), x, targets)
    models = threading.Lock()  # torch.manual_seed is one for the process.

    def run(worker):
        with models:
            model = make_model()
        model = sync.convert_sync_batchnorm(model, worker)
        return train(model, split(x, sizes)[worker.rank], split(targets, sizes)[worker.rank], worker=worker)

    for model in group(len(sizes), run):
        compare_models(model, whole)


class Checkpointed(torch.nn.Module):
    """A model whose parts run under activation checkpointing, one of them within another's segment."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x.requires_grad_()
        x = checkpoint(self.model[:3], x, use_reentrant=self.reentrant)
        return checkpoint(self._rest, x, use_reentrant=self.reentrant)

    def _rest(self, x):
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.model[3:6], x, use_reentrant=self.reentrant)
        return self.model[6:](x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_one_round_and_one_update(group, reentrant):
    x, targets = data()
    whole = train(make_model(), x, targets)
    models = threading.Lock()

    def run(worker):
        with models:
            model = sync.convert_sync_batchnorm(make_model(), worker)
        # Only some workers checkpoint: the others would wait in vain for a second round, or have one too many.
        runner = Checkpointed(model, reentrant) if worker.rank != 1 else None
        part, labels = split(x, (4, 5, 7))[worker.rank], split(targets, (4, 5, 7))[worker.rank]
        return train(model, part, labels, worker=worker, runner=runner)

    for model in group(3, run):
        compare_models(model, whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_called_twice_in_a_checkpointed_segment(group, reentrant):
    from torch.utils.checkpoint import checkpoint

    generator = torch.Generator().manual_seed(SEED)
    x = random((6, CHANNELS), generator)
    whole, whole_x = Whole(CHANNELS).double(), x.clone().requires_grad_()
    twice = lambda layer: lambda value: layer(layer(value).sin() * 3)
    twice(whole)(twice(whole)(whole_x)).pow(3).sum().backward()

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        part = split(x, (2, 4))[worker.rank].requires_grad_()
        y = checkpoint(twice(layer), part, use_reentrant=reentrant)
        checkpoint(twice(layer), y, use_reentrant=reentrant).pow(3).sum().backward()
        return part.grad, layer

    results = group(2, run)
    close(torch.cat([gradient for gradient, _ in results]), whole_x.grad)
    for _, layer in results:
        assert int(layer.num_batches_tracked) == 4
        close(layer.running_var, whole.running_var)


def test_branches_may_run_in_any_order(group):
    generator = torch.Generator().manual_seed(SEED)
    x = random((6, CHANNELS), generator)
    whole_x = x.clone().requires_grad_()
    wholes = Whole(CHANNELS).double(), Whole(CHANNELS).double()
    (wholes[0](whole_x).pow(3) + wholes[1](whole_x.pow(2)).sin()).sum().backward()

    def run(worker):
        layers = [sync.SyncBatchNorm(CHANNELS, worker=worker, layer=n, dtype=torch.float64) for n in "ab"]
        part = split(x, (2, 4))[worker.rank].requires_grad_()
        (layers[0](part).pow(3) + layers[1](part.pow(2)).sin()).sum().backward()
        return part.grad

    close(torch.cat(group(2, run)), whole_x.grad)


def test_autocast(group):
    def run(worker):
        generator = torch.Generator().manual_seed(worker.rank)
        linear = torch.nn.Linear(4, 3)
        layer = sync.SyncBatchNorm(3, worker=worker, layer="bn")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = linear(torch.randn((5 + worker.rank, 4), generator=generator)).detach()
            y = layer(x)
        y.float().pow(2).sum().backward()
        assert (x.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (layer.weight.grad.dtype, layer.running_mean.dtype) == (torch.float32, torch.float32)
        return x, y.detach(), layer.weight.grad, layer.running_mean

    results = group(2, run)
    whole = torch.cat([x for x, _, _, _ in results]).double()
    mean, var = whole.mean(0), whole.var(0, unbiased=False)
    for x, y, grad, running_mean in results:
        expected = (x.double() - mean) / (var + 1e-5).sqrt()
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-12)
        torch.testing.assert_close(grad.double(), 2 * (y.double() * expected).sum(0), rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(running_mean.double(), 0.1 * mean, rtol=1e-6, atol=1e-7)


def test_gradients_that_some_workers_lack(group):
    def run(worker):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)])
        if worker.rank == 0:
            model[0].grad = torch.tensor([1.0, 2.0])
        model[1].grad = torch.tensor([1.0, 0.0]) * (1 + worker.rank)
        sync.all_reduce_gradients(model, worker, weight=1.0 + 2 * worker.rank)
        return [None if p.grad is None else p.grad.tolist() for p in model]

    for first, second, third in group(2, run):
        assert first == [0.25, 0.5] and second == [0.75, 0.0] and third is None


# ---- Conversion, copies, state ----


def test_conversion_keeps_parameter_and_buffer_objects():
    model = make_model().eval()
    model[1].momentum, model[4].eps = None, 0.25
    before = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    converted = sync.convert_sync_batchnorm(model)
    after = dict(itertools.chain(converted.named_parameters(), converted.named_buffers()))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    layers = [m for m in converted.modules() if isinstance(m, sync.SyncBatchNorm)]
    assert [layer.layer for layer in layers] == ["1", "4", "8"]
    assert layers[0].momentum is None and layers[1].eps == 0.25 and not layers[2].training
    reverted = sync.revert_sync_batchnorm(converted)
    assert [type(reverted[i]) for i in (1, 4, 8)] == [torch.nn.BatchNorm2d, torch.nn.BatchNorm2d, torch.nn.BatchNorm1d]
    final = dict(itertools.chain(reverted.named_parameters(), reverted.named_buffers()))
    assert all(before[name] is final[name] for name in before)


def test_shared_modules_are_converted_once():
    shared = torch.nn.BatchNorm1d(3)
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared), "b": torch.nn.ModuleList([shared])})
    sync.convert_sync_batchnorm(model, prefix="generator.")
    assert model["a"][0] is model["b"][0]
    assert model["a"][0].layer == "generator.a.0"
    sync.revert_sync_batchnorm(model)
    assert model["a"][0] is model["b"][0] and type(model["a"][0]) is torch.nn.BatchNorm1d


def test_conversion_of_other_kinds():
    assert isinstance(sync.convert_sync_batchnorm(torch.nn.SyncBatchNorm(3)), sync.SyncBatchNorm)
    with pytest.raises(ValueError, match="process group"):
        sync.convert_sync_batchnorm(torch.nn.SyncBatchNorm(3, process_group=object()))
    plain = sync.convert_sync_batchnorm(torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    assert plain.weight is None and plain.running_mean is None and plain.layer == "batch_norm"
    assert isinstance(sync.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm3d(3)), sync.SyncBatchNorm)
    assert sync.revert_sync_batchnorm(sync.SyncBatchNorm(3))(torch.zeros(2, 3, 1, 1, 1)).shape == (2, 3, 1, 1, 1)


@pytest.mark.parametrize("affine,tracked", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind,rank", [("1d", 2), ("2d", 4), ("3d", 5)])
def test_lazy_layers_are_converted_before_their_first_input(group, kind, rank, affine, tracked):
    generator = torch.Generator().manual_seed(SEED)
    x = random((5, CHANNELS) + SPATIAL[rank], generator)
    options = dict(momentum=0.3, affine=affine, track_running_stats=tracked, dtype=torch.float64)
    whole = getattr(torch.nn, f"BatchNorm{kind}")(CHANNELS, **options)
    expected = whole(x)

    def run(worker):
        make = lambda: torch.nn.Sequential(getattr(torch.nn, f"LazyBatchNorm{kind}")(**options))
        again = sync.revert_sync_batchnorm(sync.convert_sync_batchnorm(make(), worker))
        assert type(again[0]) is type(make()[0])
        assert again(x).shape == x.shape and type(again[0]) is type(whole)
        model = sync.convert_sync_batchnorm(make(), worker)
        assert isinstance(model[0], sync.LazySyncBatchNorm) and type(model[0]).__name__ == f"LazySyncBatchNorm{kind}"
        assert isinstance(model[0], getattr(torch.nn, f"LazyBatchNorm{kind}")) and model[0].layer == "0"
        y = model(split(x, (2, 3))[worker.rank])
        assert isinstance(model[0], sync.SyncBatchNorm) and type(model[0]).__name__ == f"SyncBatchNorm{kind}"
        assert isinstance(model[0], type(whole)) and model[0].num_features == CHANNELS
        assert model[0].affine is affine and model[0].track_running_stats is tracked
        return y, model.state_dict(), sync.revert_sync_batchnorm(model)[0]

    results = group(2, run)
    close(torch.cat([y for y, _, _ in results]), expected)
    for _, state, reverted in results:
        assert type(reverted) is type(whole) and reverted.num_features == CHANNELS
        for name, wanted in whole.state_dict().items():
            close(state[f"0.{name}"], wanted)


def test_a_lazy_layer_takes_a_state_dict(group):
    full = sync.SyncBatchNorm(3)
    initialise(full, torch.Generator().manual_seed(SEED))

    def run(worker):
        lazy = sync.LazySyncBatchNorm(worker=worker, eps_mode="clamp", layer="bn")
        lazy.load_state_dict(full.state_dict())
        y = lazy(torch.ones(2, 3))
        assert type(lazy) is sync.SyncBatchNorm and (lazy.eps_mode, lazy.layer, lazy.worker) == ("clamp", "bn", worker)
        close(y, full.bias.expand(2, 3), torch.float32)
        return type(sync.revert_sync_batchnorm(sync.LazySyncBatchNorm())(torch.zeros(2, 3, 1, 1, 1))) is torch.Tensor

    assert group(1, run) == [True]
    loaded = sync.LazySyncBatchNorm()
    loaded.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match="expected 3 channels"):
        loaded(torch.ones(2, 4))
    with pytest.raises(ValueError, match="eps_mode"):
        sync.LazySyncBatchNorm(eps_mode="max")
    with pytest.raises(ValueError, match="at least 2D"):
        sync.LazySyncBatchNorm()(torch.zeros(3))


def test_a_weight_without_a_bias(group):
    generator = torch.Generator().manual_seed(SEED)
    x, dy = random((5, CHANNELS), generator), random((5, CHANNELS), generator)
    whole, whole_x = Whole(CHANNELS).double(), x.clone().requires_grad_()
    with torch.no_grad():
        whole.weight.copy_(torch.arange(1.0, CHANNELS + 1))
    y = whole(whole_x)
    y.backward(dy)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, bias=False, worker=worker, layer="bn", dtype=torch.float64)
        assert layer.bias is None and list(dict(layer.named_parameters())) == ["weight"]
        with torch.no_grad():
            layer.weight.copy_(whole.weight)
        part = split(x, (2, 3))[worker.rank].requires_grad_()
        out = layer(part)
        out.backward(split(dy, (2, 3))[worker.rank])
        evaluated = layer.eval()(part.bfloat16()).dtype
        layer.reset_parameters()
        return out, part.grad, layer.weight.tolist(), evaluated, sync.revert_sync_batchnorm(layer).bias

    results = group(2, run)
    close(torch.cat([r[0] for r in results]), y)
    close(torch.cat([r[1] for r in results]), whole_x.grad)
    assert [r[2:] for r in results] == [([1.0] * CHANNELS, torch.bfloat16, None)] * 2


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch's batch normalization has no bias option")
def test_conversion_keeps_a_missing_bias():
    plain = torch.nn.BatchNorm1d(3, bias=False)
    converted = sync.convert_sync_batchnorm(plain)
    assert converted.bias is None and converted.weight is plain.weight
    assert sync.revert_sync_batchnorm(converted).bias is None


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_of_another_length_are_refused(master, name):
    with syncbn.Worker(master.target, "lengths", 0, 1) as worker:
        layer = sync.SyncBatchNorm(3, worker=worker, layer="bn")
        getattr(layer, name).data = torch.ones(2)
        with pytest.raises(ValueError, match=f"{name} has 2 elements, and the layer 3 channels"):
            layer(torch.ones(4, 3))


@pytest.mark.parametrize("sizes", [(5, 3), (0, 8)])
def test_gradients_accumulate_over_small_batches(group, sizes):
    """Two batches, one optimizer step: each batch has its own statistics, and the gradients add up."""
    x, targets = data()
    whole = make_model()
    for first in (0, 8):
        loss = torch.nn.functional.cross_entropy(whole(x[first : first + 8]), targets[first : first + 8])
        (loss / 2).backward()
    models = threading.Lock()

    def run(worker):
        with models:
            model = sync.convert_sync_batchnorm(make_model(), worker)
        for first in (0, 8):
            part, labels = (split(v[first : first + 8], sizes)[worker.rank] for v in (x, targets))
            torch.nn.functional.cross_entropy(model(part), labels, reduction="sum").backward()
        sync.all_reduce_gradients(model, worker, weight=2 * sizes[worker.rank])
        return model

    for model in group(2, run):
        compare_models(model, whole)
        for mine, wanted in zip(model.parameters(), whole.parameters()):
            close(mine.grad, wanted.grad)


def test_a_layer_called_twice_in_a_step(group):
    """Weight sharing: each call is a round of its own, and the parameters' gradients add up."""
    generator = torch.Generator().manual_seed(SEED)
    x = random((6, CHANNELS), generator)
    whole, whole_x = Whole(CHANNELS).double(), x.clone().requires_grad_()
    whole(whole(whole_x).sin() * 3).pow(3).sum().backward()

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        part = split(x, (2, 4))[worker.rank].requires_grad_()
        layer(layer(part).sin() * 3).pow(3).sum().backward()
        return part.grad, layer

    results = group(2, run)
    close(torch.cat([gradient for gradient, _ in results]), whole_x.grad)
    close(sum(layer.weight.grad for _, layer in results), whole.weight.grad)
    for _, layer in results:
        assert int(layer.num_batches_tracked) == 2
        close(layer.running_var, whole.running_var)


def test_groups_side_by_side_in_one_model(master):
    """One model whose layers belong to different groups: one over all three workers, one over the last two."""
    generator = torch.Generator().manual_seed(SEED)
    x = random((6, CHANNELS), generator)
    over_all, over_two = Whole(CHANNELS).double(), Whole(CHANNELS).double()
    y = over_all(x)
    expected = torch.cat([y[:2], over_two(y[2:])])

    def run(rank):
        with contextlib.ExitStack() as stack:
            everyone = stack.enter_context(syncbn.Worker(master.target, "everyone", rank, 3, timeout=20.0))
            model = torch.nn.Sequential(torch.nn.BatchNorm1d(CHANNELS))
            model = sync.convert_sync_batchnorm(model.double(), everyone)
            if rank > 0:
                two = stack.enter_context(syncbn.Worker(master.target, "two", rank - 1, 2, timeout=20.0))
                model.append(sync.SyncBatchNorm(CHANNELS, worker=two, layer="second", dtype=torch.float64))
            return model(split(x, (2, 1, 3))[rank])

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        close(torch.cat(list(pool.map(run, range(3)))), expected)


def test_inference_mode_in_training_updates_statistics(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        with torch.inference_mode():
            layer(torch.full((2, 2), float(worker.rank)))
        return layer.running_mean.tolist()

    for mean in group(2, run):
        np.testing.assert_allclose(mean, [0.05, 0.05], rtol=1e-6)


def test_state_dicts_go_both_ways():
    generator = torch.Generator().manual_seed(SEED)
    theirs, mine = torch.nn.SyncBatchNorm(4), sync.SyncBatchNorm(4)
    initialise(theirs, generator)
    mine.load_state_dict(theirs.state_dict())
    assert list(mine.state_dict()) == list(theirs.state_dict())
    torch.nn.BatchNorm2d(4).load_state_dict(mine.state_dict())
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group"):
        assert getattr(mine, name) == getattr(theirs, name)


def test_copies_go_on_with_their_worker(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, **({"weights_only": False} if torch.__version__ >= "2" else {}))
        assert copied.worker is worker and pickled.worker is worker and loaded.worker is worker
        assert copied.weight is not layer.weight
        return [other(torch.full((1, 2), float(worker.rank))).tolist() for other in (layer, copied, pickled, loaded)]

    for outputs in group(2, run):
        assert outputs == [outputs[0]] * 4


def test_a_pickle_without_its_worker_takes_the_default(master):
    with syncbn.Worker(master.target, "gone", 0, 1) as worker:
        text = pickle.dumps(sync.SyncBatchNorm(2, worker=worker, layer="bn"))
    layer = pickle.loads(text)
    assert layer.worker is None
    with syncbn.Worker(master.target, "new", 0, 1):
        assert layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).shape == (2, 2)


def test_layers_without_a_name_are_numbered_as_they_are_made(group):
    def run(worker):
        layers = [sync.SyncBatchNorm(2, worker=worker) for _ in range(3)]
        for index in (2, 0, 1):
            layers[index](torch.ones(2, 2))
        return [layer.layer for layer in layers]

    assert group(2, run) == [["sync_batch_norm_0", "sync_batch_norm_1", "sync_batch_norm_2"]] * 2


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch has no compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_train_as_on_the_global_batch(group, backend):
    """The parts between the layers are compiled, forward and backward; evaluation too."""
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C++ compiler")
    torch._dynamo.reset()
    x, targets = data()
    whole = train(make_model(), x, targets)
    models = [make_model() for _ in range(2)]  # The random state is the process's, and a compiler on another thread sets it.
    one_at_a_time = threading.Lock()

    def run(worker):
        with one_at_a_time:
            model = sync.convert_sync_batchnorm(models[worker.rank], worker)
            compiled = torch.compile(model, backend=backend)
        part, labels = split(x, (5, 11))[worker.rank], split(targets, (5, 11))[worker.rank]
        train(model, part, labels, worker=worker, runner=compiled)
        return model, compiled.eval()(x)

    for model, evaluated in group(2, run, timeout=300.0):
        compare_models(model, whole)
        close(evaluated, whole.eval()(x))
        whole.train()


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch has no compiler")
def test_a_graph_without_breaks_is_refused(group):
    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn")
        compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2), layer), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="waits for other workers|disable") as caught:
            compiled(torch.ones(2, 2))
        if "reason" in inspect.signature(torch.compiler.disable).parameters:
            assert "waits for other workers" in str(caught.value)

    group(1, run)
