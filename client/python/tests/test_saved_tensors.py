"""Tensors that autograd passes to a backward pass: from saved-tensor hooks, formulas that expand, negate and zero, and
other machinery. The oracle is torch's own layer under the same conditions."""

import threading

import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync

SEED = 977
CHANNELS = 3


class Subclass(torch.Tensor):
    """A tensor that keeps its class, as MONAI's MetaTensor does."""


def every_second(x):
    wide = torch.full(x.shape + (2,), float("nan"), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def reversed_memory(x):
    """Dense, with the dimensions in memory from last to first."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.clone()


def offset(x):
    memory = torch.full((x.numel() + 7,), float("nan"), dtype=x.dtype)
    memory[7:] = x.reshape(-1)
    return memory[7:].view(x.shape)


def negated(x):
    return torch._neg_view(-x)


HOOKS = {
    "same": lambda x: x,
    "strided": every_second,
    "reversed": reversed_memory,
    "channels_last": channels_last,
    "contiguous": lambda x: x.contiguous().clone(),
    "offset": offset,
    "subclass": lambda x: x.clone().as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "negated": negated,
    "sparse": lambda x: x.to_sparse(),
    "recording": lambda x: x.clone().requires_grad_() * 1,
}


def batch(dtype, layout, needs=True):
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((6, CHANNELS, 4, 5), generator=generator, dtype=torch.float64) * 2 + 1
    dy = torch.randn((6, CHANNELS, 4, 5), generator=generator, dtype=torch.float64)
    x, dy = x.to(dtype), dy.to(dtype)
    return (channels_last(x) if layout == "channels_last" else x).requires_grad_(needs), dy


def step(layer, x, dy, unpack, pack=lambda x: x):
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, CHANNELS + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    y.backward(dy)
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saved_tensors_in_another_form(group, hook, layout, dtype):
    x, dy = batch(dtype, layout)
    whole = torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    expected = step(whole, x.detach().double().requires_grad_(), dy.double(), lambda x: x)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=dtype)
        own, part = (v.detach().split([2, 4])[worker.rank].clone(memory_format=torch.preserve_format) for v in (x, dy))
        return step(layer, own.requires_grad_(), part, HOOKS[hook])

    results = group(2, run)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    actual = torch.cat([r[0] for r in results]), sum(r[1] for r in results), sum(r[2] for r in results)
    for mine, wanted in zip(actual, expected):
        assert type(mine) is torch.Tensor
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance * 10, check_stride=False)


def test_an_expanded_saved_tensor(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        whole = torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
        x, dy = batch(torch.float64, "contiguous")
        x = x.detach()[:, :, :, :1].expand(6, CHANNELS, 4, 5)
        again = lambda saved: saved[:, :, :, :1].clone().expand(saved.shape) if saved.dim() == 4 else saved
        mine = step(layer, x.clone().requires_grad_(), dy, again)
        return all(
            torch.allclose(a, b, rtol=1e-10, atol=1e-10)
            for a, b in zip(mine, step(whole, x.clone().requires_grad_(), dy, lambda x: x))
        )

    assert group(1, run) == [True]


WRONG = {
    "type": lambda x: x.double(),
    "half": lambda x: x.half(),
    "shorter": lambda x: x[:1],
    "longer": lambda x: torch.cat([x, x]),
    "reshaped": lambda x: x.reshape(-1),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("hook", list(WRONG))
@pytest.mark.parametrize("which", [4, 1], ids=["input", "weight"])
def test_saved_tensors_of_another_kind_are_refused(group, hook, which):
    if which == 1 and hook == "reshaped":
        pytest.skip("the same")

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn")
        x, dy = batch(torch.float32, "contiguous")
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: WRONG[hook](x) if x.dim() == which else x):
            y = layer(x)
        with pytest.raises(RuntimeError, match="saved-tensor hook|where SyncBatchNorm saved"):
            y.backward(dy)

    group(1, run)


def test_saving_on_the_cpu_and_compression(group):
    expected = step(torch.nn.BatchNorm2d(CHANNELS), *batch(torch.float32, "contiguous"), lambda x: x)
    pack = lambda x: x.half() if x.dim() == 4 else x
    compressed = step(torch.nn.BatchNorm2d(CHANNELS), *batch(torch.float32, "contiguous"), lambda x: x.float(), pack)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn")
        x, dy = batch(torch.float32, "channels_last")
        with torch.autograd.graph.save_on_cpu():
            y = layer(x)
        y.backward(dy)
        other = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="other")
        return x.grad, step(other, *batch(torch.float32, "contiguous"), lambda x: x.float(), pack)

    for _, mine in group(1, run):
        for a, b in zip(mine, compressed):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert expected[0].shape == compressed[0].shape


GRADIENTS = {
    "expanded": lambda y: y.sum(),
    "expanded over rows": lambda y: (y * torch.arange(5.0, dtype=y.dtype)).sum(),
    "mean": lambda y: y.mean(),
    "imaginary": lambda y: torch.complex(y, y.detach()).conj().imag.sum(),
    "transposed": lambda y: (y.permute(3, 2, 1, 0) ** 2).sum(),
    "indexed": lambda y: y[1:, :, ::2].pow(2).sum() + y.flatten()[3],
    "relu in place": lambda y: y.relu_().pow(2).sum(),
    "added in place": lambda y: y.add_(1.0).pow(3).sum(),
}


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_gradients_in_any_memory(group, name):
    whole = torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    x, _ = batch(torch.float64, "contiguous")
    GRADIENTS[name](whole(x)).backward()

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        own, _ = batch(torch.float64, "channels_last")
        GRADIENTS[name](layer(own)).backward()
        return own.grad, layer.weight.grad, layer.bias.grad

    for mine, wanted in zip(group(1, run)[0], (x.grad, whole.weight.grad, whole.bias.grad)):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10, check_stride=False)


def test_a_zero_tensor_as_gradient(group):
    """torch's zero tensors have no memory at all."""

    class Zero(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return torch._efficientzerotensor(dy.shape, dtype=dy.dtype)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        x, _ = batch(torch.float64, "contiguous")
        Zero.apply(layer(x)).sum().backward()
        return float(x.grad.abs().sum()), layer.bias.grad.tolist()

    assert group(1, run) == [(0.0, [0.0] * CHANNELS)]


def test_hooks_that_change_the_gradient(group):
    def losses(layer, x, dy):
        y = layer(x)
        y.register_hook(lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) * 2)
        y.backward(dy)
        return x.grad

    wanted = losses(torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64), *batch(torch.float64, "contiguous"))

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        return losses(layer, *batch(torch.float64, "contiguous"))

    torch.testing.assert_close(group(1, run)[0], wanted, rtol=1e-10, atol=1e-10)


def test_the_bias_may_change_between_forward_and_backward_and_the_weight_may_not(group):
    wanted = step(torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64), *batch(torch.float64, "contiguous"), lambda x: x)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, CHANNELS + 1))
        x, dy = batch(torch.float64, "contiguous")
        y = layer(x)
        with torch.no_grad():
            layer.bias.add_(5.0)
        y.backward(dy)
        again = layer(x)
        with torch.no_grad():
            layer.weight.add_(5.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward(dy)
        return x.grad, layer.bias.grad

    mine = group(1, run)[0]
    torch.testing.assert_close(mine[0], wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine[1], wanted[2], rtol=1e-10, atol=1e-10)


def test_weights_and_statistics_in_any_memory(group):
    """Parameters with the strides that a hypernetwork and functional_call produce."""
    generator = torch.Generator().manual_seed(SEED)
    table = torch.rand(CHANNELS, 4, generator=generator, dtype=torch.float64) + 0.5
    vectors = {
        "strided": lambda: [table.clone()[:, i].requires_grad_() for i in range(2)] + [table.clone()[:, i] for i in (2, 3)],
        "expanded": lambda: [table[0, i].clone().requires_grad_() for i in range(2)] + [table.clone()[:, 2], table.clone()[:, 3]],
    }

    def results(make, normalize):
        weight, bias, mean, var = make()
        x, dy = batch(torch.float64, "contiguous")
        w, b = (v if v.dim() else v.expand(CHANNELS) for v in (weight, bias))
        normalize(x, mean, var, w, b).backward(dy)
        return x.grad, weight.grad, bias.grad, mean, var

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)

        def normalize(x, mean, var, weight, bias):
            layer._parameters.update(weight=weight, bias=bias)
            layer._buffers.update(running_mean=mean, running_var=var)
            return layer(x)

        return [results(make, normalize) for make in vectors.values()]

    for mine, make in zip(group(1, run)[0], vectors.values()):
        wanted = results(make, lambda x, m, v, w, b: torch.nn.functional.batch_norm(x, m, v, w, b, True, 0.1))
        for a, b in zip(mine, wanted):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("convert", [False, True])
def test_functional_calls(group, momentum, convert):
    """Given parameters and buffers take the place of the layer's, which stay as they are: torch 1.13 puts a class over the
    layer's for the time of the call, and later versions exchange them.
    """
    functional_call = getattr(torch, "func", torch.nn.utils.stateless).functional_call
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(4, CHANNELS, 2, generator=generator, dtype=torch.float64)

    def results(layer, x):
        given = {name: parameter.detach() + 0.5 for name, parameter in layer.named_parameters()}
        given.update((name, buffer.clone()) for name, buffer in layer.named_buffers())
        given = {name: value.requires_grad_(value.is_floating_point() and "running" not in name) for name, value in given.items()}
        before = [value.clone() for value in layer.state_dict().values()]
        y = functional_call(layer, given, (x,))
        y.pow(3).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, layer.state_dict().values()))
        assert layer.weight.grad is None
        return [y.detach(), given["weight"].grad, given["bias"].grad, *(given[name] for name, _ in layer.named_buffers())]

    def run(worker):
        if not convert:
            layer = sync.SyncBatchNorm(CHANNELS, momentum=momentum, worker=worker, dtype=torch.float64)
        else:
            layer = torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
            sync.convert_sync_batchnorm(layer, worker)
        return results(layer, x[2 * worker.rank :][:2])

    first, second = group(2, run)
    wanted = results(torch.nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64), x)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), wanted[0])
    for index in (1, 2):
        torch.testing.assert_close(first[index] + second[index], wanted[index])
    for found in (first, second):
        for a, b in zip(found[3:], wanted[3:]):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs", ["input", "weight", "bias", "two"])
def test_a_subset_of_the_gradients(group, needs):
    def gradients(layer):
        x, dy = batch(torch.float64, "contiguous", needs in ("input", "two"))
        layer.weight.requires_grad_(needs in ("weight", "two"))
        layer.bias.requires_grad_(needs == "bias")
        inputs = [v for v in (x, layer.weight, layer.bias) if v.requires_grad]
        return torch.autograd.grad(layer(x), inputs, dy)

    wanted = gradients(torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64))

    def run(worker):
        return gradients(sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64))

    for a, b in zip(group(1, run)[0], wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_backward_on_another_thread(group):
    wanted = step(torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64), *batch(torch.float64, "contiguous"), lambda x: x)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, CHANNELS + 1))
        x, dy = batch(torch.float64, "contiguous")
        y = layer(x)
        thread = threading.Thread(target=y.backward, args=(dy,))
        thread.start()
        thread.join()
        return x.grad

    torch.testing.assert_close(group(1, run)[0], wanted[0], rtol=1e-10, atol=1e-10)


# ---- Tensors that cannot be synchronized are refused before any round ----


def refused(master, name, function, match):
    with syncbn.Worker(master.target, name, 0, 1) as worker:
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn")
        with pytest.raises((TypeError, RuntimeError), match=match) as caught:
            function(layer)
        assert isinstance(caught.value, RuntimeError)  # As torch's own layers raise.
        layer(torch.randn(4, CHANNELS, 2))  # The layer goes on.


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_other_types(master, dtype):
    refused(master, f"type-{dtype}", lambda layer: layer(torch.ones(4, CHANNELS, dtype=dtype)), str(dtype))
    layer = sync.SyncBatchNorm(CHANNELS).eval()
    with pytest.raises(RuntimeError):
        layer(torch.ones(4, CHANNELS, dtype=dtype))


def test_meta_tensors(master):
    with syncbn.Worker(master.target, "meta", 0, 1) as worker:
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", device="meta")
        with pytest.raises(RuntimeError, match="meta tensor"):
            layer(torch.ones(4, CHANNELS, device="meta"))
        assert layer.eval()(torch.ones(4, CHANNELS, device="meta")).device.type == "meta"


def test_sparse_inputs(master):
    refused(master, "sparse", lambda layer: layer(torch.eye(CHANNELS).to_sparse()), "sparse")


def test_forward_mode(master):
    def forward_mode(layer):
        with torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(torch.randn(4, CHANNELS), torch.ones(4, CHANNELS)))

    refused(master, "jvp", forward_mode, "forward-mode")


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_forward_mode_of_a_parameter(master, which):
    def forward_mode(layer):
        kept = layer._parameters[which]
        try:
            with torch.autograd.forward_ad.dual_level():
                layer._parameters[which] = torch.autograd.forward_ad.make_dual(kept.detach(), torch.ones(CHANNELS))
                layer(torch.randn(4, CHANNELS))
        finally:
            layer._parameters[which] = kept

    refused(master, f"jvp-{which}", forward_mode, "forward-mode")


def test_parameters_of_other_types(master):
    def complex_weight(layer):
        kept = layer._parameters["weight"]
        try:
            layer._parameters["weight"] = torch.nn.Parameter(torch.ones(CHANNELS, dtype=torch.complex64))
            layer(torch.randn(4, CHANNELS))
        finally:
            layer._parameters["weight"] = kept

    refused(master, "complex-weight", complex_weight, "complex64")


def test_fake_tensors(master):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(layer):
        with FakeTensorMode() as mode:
            layer(mode.from_tensor(torch.randn(4, CHANNELS)))

    with syncbn.Worker(master.target, "fake", 0, 1) as worker:
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", affine=False, track_running_stats=False)
        with pytest.raises(RuntimeError, match="FakeTensor"):
            fake(layer)


@pytest.mark.skipif(not hasattr(torch, "func"), reason="torch has no torch.func")
def test_function_transforms(master):
    cases = {
        "vmap": lambda layer: torch.func.vmap(layer)(torch.randn(2, 4, CHANNELS)),
        "grad": lambda layer: torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, CHANNELS)),
        "of parameters": lambda layer: torch.func.grad(
            lambda parameters: torch.func.functional_call(layer, parameters, torch.randn(4, CHANNELS)).sum()
        )(dict(layer.named_parameters())),
        "functionalize": lambda layer: torch.func.functionalize(layer)(torch.randn(4, CHANNELS)),
        "jvp": lambda layer: torch.func.jvp(layer, (torch.randn(4, CHANNELS),), (torch.ones(4, CHANNELS),)),
    }
    for name, function in cases.items():
        refused(master, f"func-{name}", function, "torch.func|forward-mode")


class OwnForward(torch.nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Masked(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, mask=torch.ones(4, dtype=torch.bool))


def traced_by_jit(function, x):
    torch.jit.trace(function, x)


def traced_by_make_fx(function, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(function)(x)


@pytest.mark.parametrize("tracer, named", [(traced_by_jit, "torch.jit.trace"), (traced_by_make_fx, "make_fx")])
@pytest.mark.parametrize("kind", ["layer", "subclass", "moments", "masked"])
def test_traces_of_training(master, kind, tracer, named):
    """torch.jit.trace, which TensorBoard's add_graph and the older ONNX exporter use too. And make_fx, over tensors with values:
    its graph had uninitialized memory for the layer's output.
    """

    def trace(layer):
        traced = layer
        if kind == "subclass":
            traced = sync.convert_sync_batchnorm(OwnForward(CHANNELS), layer.worker, prefix="other")
        elif kind == "moments":

            def traced(x):
                return sync.moments(x, 0, worker=layer.worker, layer="moments")

        elif kind == "masked":
            traced = Masked(layer)

        tracer(traced, torch.randn(4, CHANNELS))

    refused(master, f"trace-{kind}-{named}", trace, named)
    model, x = sync.convert_sync_batchnorm(OwnForward(CHANNELS)).eval(), torch.randn(4, CHANNELS)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_a_trace_of_a_backward_pass_alone(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn")
        x = torch.randn(4, CHANNELS, requires_grad=True)
        y = layer(x)
        with pytest.raises(RuntimeError, match="make_fx"):
            traced_by_make_fx(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True), torch.ones(4, CHANNELS))
        y.sum().backward()

    group(1, run)


# ---- Subclasses of Tensor ----


@pytest.mark.parametrize("training", [True, False])
def test_subclasses_keep_their_class(group, training):
    wanted, (x, dy) = torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64).train(training), batch(torch.float64, "contiguous")
    y = wanted(x)
    y.backward(dy)

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64).train(training)
        leaf, dy = batch(torch.float64, "contiguous")
        out = layer(leaf.as_subclass(Subclass))
        assert type(out) is Subclass
        out.backward(dy)
        return out.as_subclass(torch.Tensor), leaf.grad.as_subclass(torch.Tensor)

    out, gradient = group(1, run)[0]
    torch.testing.assert_close(out, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-10)


def test_a_weight_of_a_subclass(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn")
        layer._parameters["weight"] = torch.ones(CHANNELS).as_subclass(Subclass).requires_grad_()
        y = layer(torch.randn(4, CHANNELS))
        y.sum().backward()
        return type(y) is type(torch.nn.functional.batch_norm(torch.randn(4, CHANNELS), None, None, layer.weight, None, True))

    assert group(1, run) == [True]


class Wrapped:
    """Something that is no tensor, and acts as one by __torch_function__."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.tensor if isinstance(a, Wrapped) else a for a in args]
        return Wrapped(function(*plain, **(kwargs or {})))


def test_what_acts_as_a_tensor(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        x, _ = batch(torch.float64, "contiguous")
        y = layer(Wrapped(x))
        return type(y) is Wrapped and y.tensor.shape == x.shape

    assert group(1, run) == [True]
