"""Evaluation is local: any mix of types, traced, compiled, exported and differentiated like torch's own layer."""

import copy
import itertools
import warnings

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync

SEED = 55
TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
needs_compiler = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch has no compiler")


def make(parameters, statistics=None, **options):
    generator = torch.Generator().manual_seed(SEED)
    layer = sync.SyncBatchNorm(3, **options).eval()
    with torch.no_grad():
        for vector in itertools.chain(layer.parameters(), [layer.running_mean, layer.running_var]):
            if vector is not None:
                vector.copy_(torch.rand(3, generator=generator) + 0.5)
    layer.to(parameters)
    if statistics is not None:
        layer.running_mean, layer.running_var = layer.running_mean.to(statistics), layer.running_var.to(statistics)
    return layer


def whole_of(layer):
    whole = torch.nn.BatchNorm2d(3, layer.eps, affine=layer.affine, track_running_stats=layer.track_running_stats)
    whole = whole.double().eval()
    whole.load_state_dict(layer.state_dict())
    return whole


def batch(dtype):
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn((4, 3, 2, 5), generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def check(layer, dtype, tolerance):
    (x, dy), whole = batch(dtype), whole_of(layer)
    mine, theirs = x.clone().requires_grad_(), x.double().clone().requires_grad_()
    y, expected = layer(mine), whole(theirs)
    assert y.dtype == dtype
    y.backward(dy), expected.backward(dy.double())
    pairs = [(y, expected), (mine.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), whole.parameters())]
    for a, b in pairs:
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("parameters", list(TYPES), ids=str)
@pytest.mark.parametrize("statistics", list(TYPES), ids=str)
def test_every_mix_of_types(dtype, parameters, statistics):
    check(make(parameters, statistics), dtype, max(TYPES[dtype], TYPES[parameters], TYPES[statistics]))


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_options(dtype, affine, tracked):
    layer = make(torch.float32, affine=affine, track_running_stats=tracked)
    check(layer, dtype, max(TYPES[dtype], TYPES[torch.float32]))


def test_differentiated_twice():
    layer = make(torch.float64)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_traced_for_another_place(dtype):
    layer, (x, _) = make(torch.float32), batch(dtype)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_trace_has_no_warning_that_torchs_own_layer_has_not():
    x, _ = batch(torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch.jit itself.
        layer = sync.convert_sync_batchnorm(torch.nn.BatchNorm2d(3)).eval()
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))


def test_under_autocast():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), make(torch.float32)).eval()
    x, _ = batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=5e-2, atol=5e-2)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "the same"])
def test_compiled_in_one_graph(dtype, parameters):
    layer, (x, _) = make(parameters or dtype), batch(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_exported(dtype):
    model = torch.nn.Sequential(make(torch.float32)).eval()
    x, _ = batch(dtype)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


@needs_compiler
def test_compiled_under_autocast():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), make(torch.float32)).eval()
    x, _ = batch(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.skipif(not hasattr(torch, "func"), reason="torch has no torch.func")
def test_function_transforms_of_an_evaluated_layer():
    layer = make(torch.float64)
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_inference_mode_and_copies():
    layer, (x, _) = make(torch.float32), batch(torch.bfloat16)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y.clone())
