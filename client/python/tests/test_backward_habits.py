"""Programs around a backward pass: checkpoints, many passes, Jacobians, copies, odd batches. Against torch's own
layer on the whole batch."""

import copy
import threading

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint

import syncbn.torch as sync

SEED = 606
CHANNELS = 3


def batch(count=5, trailing=(2,)):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn((count, CHANNELS) + trailing, generator=generator, dtype=torch.float64) * 2 + 1


def make(worker=None, layer="bn", channels=CHANNELS, **options):
    if worker is None:
        return torch.nn.BatchNorm1d(channels, dtype=torch.float64, **options)
    return sync.SyncBatchNorm(channels, worker=worker, layer=layer, dtype=torch.float64, **options)


def compare(group, program, sizes=(2, 3), x=None, tolerance=1e-9, joined=True):
    """Checks that the workers' tensors program(layer, x), row by row, concatenate to those of the whole batch."""
    x = batch(sum(sizes)) if x is None else x
    wanted = program(make(), x.clone())

    def run(worker):
        return program(make(worker), x.split(list(sizes))[worker.rank].clone())

    results = group(len(sizes), run)
    for index, expected in enumerate(wanted):
        parts = [r[index].detach() for r in results]
        torch.testing.assert_close(torch.cat(parts), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_checkpoints_gone_back_through_several_times(group, reentrant, passes):
    def program(layer, x):
        x.requires_grad_()
        y = checkpoint(lambda v: layer(v.sin()).exp(), x, use_reentrant=reentrant)
        found = []
        for power in range(1, passes + 1):
            x.grad = None
            y.pow(power).sum().backward(retain_graph=True)
            found.append(x.grad.clone())
        return found

    compare(group, program)


def test_a_gradient_penalty_through_a_checkpoint(group):
    def program(layer, x):
        x.requires_grad_()
        y = checkpoint(lambda v: layer(v.sin()).exp(), x, use_reentrant=False)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum() + y.sum(), x)

    compare(group, program)


def test_many_passes_through_one_forward(group):
    """There are more passes than rounds of one name that the master remembers."""

    def program(layer, x):
        x.requires_grad_()
        y = layer(x).sin()
        return [torch.autograd.grad(y.pow(2).sum() * k, x, retain_graph=True)[0] for k in range(1, 151)]

    compare(group, program)


def test_many_calls_before_a_second_derivative(group):
    def program(layer, x):
        x.requires_grad_()
        y = x
        for _ in range(40):
            y = layer(y).sin() + 0.1 * x
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), x)

    compare(group, program, tolerance=1e-6)


def test_a_hessian_vector_product_of_autograd_functional(group):
    def run(worker):
        layer, whole, x = make(worker), make(), batch(4)
        results = []
        for norm in (layer, whole):
            loss = lambda v: norm(v).pow(3).sum()
            results.append(torch.autograd.functional.vhp(loss, x, torch.ones_like(x))[1])
            results.append(torch.autograd.functional.hessian(lambda v: norm(v.view(2, CHANNELS, 1)).pow(3).sum(), x[:2, :, :1].reshape(-1)))
        return [torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(results[:2], results[2:])]

    assert group(1, run) == [[True, True]]


def test_a_jacobian_row_by_row(group):
    def program(layer, x):
        x.requires_grad_()
        y = layer(x)[:, 0].sum(1)
        return [torch.autograd.grad(y.sum() * k + y.pow(2).sum(), x, retain_graph=True)[0] for k in range(4)]

    compare(group, program)


def test_a_copy_of_a_layer_goes_on_after_forward(group):
    def program(layer, x):
        x.requires_grad_()
        y = layer(x)
        copied = copy.deepcopy(layer)
        again = copied(x)
        return torch.autograd.grad((y.sin() + again.cos()).sum(), x)

    compare(group, program)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients(group, mode):
    def program(layer, x):
        with mode():
            y = layer(x)
        return [y.clone()]

    compare(group, program)


def test_one_channel_and_single_values(group):
    x = batch(4)[:, :1, 0]

    def run(worker):
        own = x.split([1, 3])[worker.rank].clone().requires_grad_()
        (g,) = torch.autograd.grad(make(worker, channels=1)(own).pow(3).sum(), own, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), own)
        return g.detach(), h

    whole_x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(make(channels=1)(whole_x).pow(3).sum(), whole_x, create_graph=True)
    (h,) = torch.autograd.grad(g.pow(2).sum(), whole_x)
    results = group(2, run)
    for index, expected in enumerate((g, h)):
        torch.testing.assert_close(torch.cat([r[index] for r in results]), expected.detach(), rtol=1e-8, atol=1e-8)


def test_no_value_anywhere_twice_differentiated(group):
    def run(worker):
        x = torch.zeros(0, CHANNELS, 2, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(make(worker)(x).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x)
        return g.shape, h.shape

    assert group(2, run) == [((0, CHANNELS, 2),) * 2] * 2


def test_passes_on_threads_of_ones_own(group):
    """Two layers whose backward passes run on two threads, in any order."""

    def program(layer, x):
        x.requires_grad_()
        layers = [layer, copy.deepcopy(layer)]
        if isinstance(layer, sync.SyncBatchNorm):
            layers[1].layer = "other"
        ys = [own(x * (1 + index)) for index, own in enumerate(layers)]
        grads = [None, None]

        def back(index):
            grads[index] = torch.autograd.grad(ys[index].pow(3).sum(), x)[0]

        threads = [threading.Thread(target=back, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return grads

    compare(group, program)


def test_the_gradient_of_another_layer_flows_on(group):
    """A worker whose loss does not depend on a second gradient still takes part, by a factor of zero."""

    def run(worker):
        layer = make(worker)
        x = batch(6).split([2, 4])[worker.rank].clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad((g.pow(2) * (1.0 - worker.rank)).sum(), x)[0]

    x = batch(6).requires_grad_()
    (g,) = torch.autograd.grad(make()(x).pow(3).sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(g[:2].pow(2).sum(), x)
    torch.testing.assert_close(torch.cat(group(2, run)), wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_parameters_alone_twice_differentiated(group):
    """No input needs a gradient, so there is neither a backward round nor one of second derivatives."""
    x, c = batch(5), batch(5).flip(0)

    def program(layer, x, c):
        c.requires_grad_()
        (g,) = torch.autograd.grad((layer(x) * c).sum(), layer.weight, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), c)
        return g.detach(), h

    def run(worker):
        parts = [v.split([2, 3])[worker.rank].clone() for v in (x, c)]
        if worker.rank == 0:
            return program(make(worker), *parts)
        make(worker)(parts[0])  # Does not go back at all.

    wanted = torch.nn.functional.batch_norm(x, None, None, training=True)[:2]
    g, h = group(2, run)[0]
    torch.testing.assert_close(g, (wanted * c[:2]).sum((0, 2)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(h, 2 * g.view(1, -1, 1) * wanted, rtol=1e-9, atol=1e-9)


def test_under_anomaly_detection(group):
    def program(layer, x):
        x.requires_grad_()
        (g,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), x)

    # Around the threads, not within them: the switch belongs to the process, and each block restores the value it found.
    with torch.autograd.detect_anomaly(check_nan=False) if torch.__version__ >= "2" else torch.autograd.detect_anomaly():
        compare(group, program)
    assert not torch.is_anomaly_enabled()


def test_batched_backward_passes_say_what_to_do(group):
    """torch runs the rows of a Jacobian as one batch by vmap, which a round does not support."""

    def run(worker):
        layer = make(worker)
        x = batch(4).requires_grad_()
        y = layer(x)
        with pytest.raises(RuntimeError, match="vmap.*one after another"):
            torch.autograd.grad(y, x, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True, retain_graph=True)
        return torch.autograd.grad(y.pow(2).sum(), x)[0].shape == x.shape

    assert group(1, run) == [True]


def test_inputs_in_any_memory(group):
    forms = {
        "expanded": lambda x: x[:, :, :1].expand(5, CHANNELS, 2),
        "negated": lambda x: torch._neg_view(x),
        "transposed": lambda x: x.permute(2, 1, 0),
        "imaginary": lambda x: torch.complex(x, x).conj().imag,
        "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    }

    def run(worker):
        layer, whole, found = make(worker), make(), []
        for name, form in forms.items():
            results = []
            for norm in (layer, whole):
                x = batch().requires_grad_()
                if name == "zero":
                    results.append(norm(form(x)))
                    continue
                (g,) = torch.autograd.grad(norm(form(x)).pow(3).sum(), x)
                results.append(g)
            found.append(torch.allclose(*results, rtol=1e-9, atol=1e-9))
        return found

    assert group(1, run) == [[True] * len(forms)]
