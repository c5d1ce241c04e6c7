"""Masks over positions in the NumPy and PyTorch fronts, and in mixed groups, against the whole batch in float64."""

import os
import pathlib
import subprocess

import numpy as np
import pytest

import masked_oracle
import syncbn
import syncbn.numpy

try:
    import torch
    import torch.utils.checkpoint

    import syncbn.torch
except ImportError:  # An environment of NumPy and JAX alone.
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")

SEED = 808
SIZES = (2, 0, 3)
C = 3
PLACES = np.cumsum(SIZES)[:-1]


def problem(shape=(5,), seed=SEED):
    """x, dy [N, C, *shape], weight, bias, mask [N, 1, *shape]; rank 0 has no position that counts."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(1.5, 2.0, (sum(SIZES), C, *shape)), rng.normal(size=(sum(SIZES), C, *shape))
    x[:, 1] = 1.0 + x[:, 1] * 0.01  # A channel that a clamp holds.
    mask = rng.uniform(size=(sum(SIZES), 1, *shape)) < 0.6
    mask[: SIZES[0]] = False
    mask[-1] = True
    return x, dy, rng.normal(size=C), rng.normal(size=C), mask


def near(actual, wanted, tolerance=1e-11):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), wanted, rtol=tolerance, atol=tolerance * max(1.0, np.abs(wanted).max(initial=0))
    )


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_numpy(group, mode, biased, channels_last):
    x, dy, weight, bias, mask = problem()
    wanted = masked_oracle.expected(x, weight, bias, mask, dy, mode == "clamp")
    give = lambda v: np.moveaxis(v, 1, -1) if channels_last else v
    back = lambda v: np.moveaxis(v, -1, 1) if channels_last else v
    parts = [np.split(v, PLACES) for v in (x, dy, mask)]

    def run(worker):
        own_x, own_dy, own_mask = (part[worker.rank] for part in parts)
        running = np.zeros(C), np.ones(C)
        y, state = syncbn.numpy.forward(
            worker, "bn", give(own_x), weight, bias, running_mean=running[0], running_var=running[1], momentum=0.25,
            eps=masked_oracle.EPS, eps_mode=mode, channels_last=channels_last, mask=give(own_mask),
            biased_running_variance=biased,
        )
        assert state.count == wanted["count"]
        near(state.mean, wanted["mean"]), near(state.var, wanted["var"])
        first, second = state.backward(give(own_dy)), state.backward(give(2 * own_dy))
        near(second.dx, 2 * first.dx)
        return back(y), back(first.dx), first.d_weight, first.d_bias, running

    results = group(len(SIZES), run)
    near(np.concatenate([r[0] for r in results]), wanted["y"])
    near(np.concatenate([r[1] for r in results]), wanted["dx"])
    near(sum(r[2] for r in results), wanted["dw"]), near(sum(r[3] for r in results), wanted["db"])
    n = wanted["count"]
    for *_, (mean, var) in results:
        near(mean, 0.25 * wanted["mean"])
        near(var, 0.75 + 0.25 * wanted["var"] * (1 if biased else n / (n - 1)))


def test_numpy_with_a_residual_and_a_relu(group):
    x, dy, weight, bias, mask = problem()
    residual = np.random.default_rng(SEED + 1).normal(size=x.shape)
    plain = masked_oracle.normalize(x, weight, bias, mask)[0] + residual
    gated = dy * (plain > 0)
    wanted = masked_oracle.expected(x, weight, bias, mask, gated)
    parts = [np.split(v, PLACES) for v in (x, dy, mask, residual)]

    def run(worker):
        own_x, own_dy, own_mask, own_residual = (part[worker.rank] for part in parts)
        y, state = syncbn.numpy.forward(
            worker, "bn", own_x, weight, bias, eps=masked_oracle.EPS, mask=own_mask, residual=own_residual, relu=True
        )
        return y, state.backward(own_dy)

    results = group(len(SIZES), run)
    near(np.concatenate([y for y, _ in results]), np.maximum(plain, 0))
    near(np.concatenate([g.dx for _, g in results]), wanted["dx"])
    near(np.concatenate([g.d_residual for _, g in results]), gated)
    near(sum(g.d_weight for _, g in results), wanted["dw"])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_running_variance_without_a_mask(group, biased, fused):
    x = problem()[0]
    parts = np.split(x, PLACES)

    def run(worker):
        mean, var = np.zeros(C), np.ones(C)
        options = dict(residual=parts[worker.rank], relu=True) if fused else {}
        syncbn.numpy.forward(
            worker, "bn", parts[worker.rank], running_mean=mean, running_var=var, momentum=0.5, backward=False,
            biased_running_variance=biased, **options,
        )
        return var

    for var in group(len(SIZES), run):
        near(var, 0.5 + 0.5 * x.var((0, 2), ddof=0 if biased else 1))


def test_a_single_value_has_a_biased_variance(group):
    """M2/1 is 0, where M2/0 has no value and changes nothing."""
    for biased, mask, wanted in ((True, None, 0.5), (False, None, 1.0), (True, True, 0.5), (False, True, 1.0)):

        def run(worker):
            var = np.ones(2)
            syncbn.numpy.forward(
                worker, "bn", np.ones((1, 2)), running_mean=np.zeros(2), running_var=var, momentum=0.5, backward=False,
                biased_running_variance=biased, mask=mask,
            )
            return var

        near(group(1, run)[0], [wanted, wanted])


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "float32", "one row", "no channel axis", "all channels", "scalar"])
def test_forms_of_masks(group, kind):
    x, _, weight, bias, mask = problem()
    given = {
        "one row": np.array([True, False, True, True, False]),
        "no channel axis": mask[:, 0],
        "all channels": np.broadcast_to(mask, x.shape),
        "scalar": True,
    }.get(kind)
    given = mask.astype(kind) if given is None else given
    whole = np.broadcast_to(given if kind != "no channel axis" else given[:, None], x.shape)[:, :1]
    wanted = masked_oracle.normalize(x, weight, bias, whole)[0]
    forward = lambda worker: syncbn.numpy.forward(
        worker, "bn", x, weight, bias, eps=masked_oracle.EPS, mask=given, backward=False
    )[0]
    near(group(1, forward)[0], wanted)
    if torch is None:
        return

    def layer(worker):
        made = syncbn.torch.SyncBatchNorm(C, masked_oracle.EPS, affine=False, worker=worker, layer="bn", dtype=torch.float64)
        return made(torch.from_numpy(x), torch.from_numpy(np.array(given)))

    plain = masked_oracle.normalize(x, np.ones(C), np.zeros(C), whole)[0]
    near(group(1, layer)[0].numpy(), plain)


WRONG = [
    (np.ones((2, C, 5), bool) & (np.arange(C) > 0)[:, None], ValueError, "differs by channel"),
    (np.ones((2, 1, 4), bool), ValueError, "does not fit"),
    (np.ones((2, 2, 5), bool), ValueError, "does not fit"),
    (np.ones((1, 2, 1, 5), bool), ValueError, "does not fit"),
    (np.full((2, 5), 2), ValueError, "the value 2"),
    (np.full((2, 5), -1e9), ValueError, "the value -1"),
    (np.full((2, 5), np.nan), ValueError, "the value nan"),
    (np.ones((2, 5), complex), TypeError, "complex"),
    (np.zeros((2, 5), bool), ValueError, "leave no position"),
]


@pytest.mark.parametrize("mask,error,text", WRONG)
def test_wrong_masks(group, mask, error, text):
    x = np.random.default_rng(SEED).normal(size=(2, C, 5))

    def run(worker):
        with pytest.raises(error, match=text):
            syncbn.numpy.forward(worker, "bn", x, mask=mask)
        return syncbn.numpy.forward(worker, "bn", x, backward=False)[0]  # Nothing is left hanging.

    group(1, run)
    if torch is None:
        return

    def layer(worker):
        made = syncbn.torch.SyncBatchNorm(C, worker=worker, layer="bn", dtype=torch.float64)
        with pytest.raises(error, match=text):
            made(torch.from_numpy(x), torch.from_numpy(mask))
        assert int(made.num_batches_tracked) == 0 and float(made.running_mean.abs().sum()) == 0.0

    group(1, layer)


def test_masks_without_any_position_at_all_workers(group):
    """A mask without positions is an error at every worker, in each front; a batch without positions is not."""
    x = np.ones((2, C, 5))

    def run(worker):
        with pytest.raises(ValueError, match="leave no position"):
            syncbn.numpy.forward(worker, "bn", x, mask=np.zeros((2, 5), bool))
        y, state = syncbn.numpy.forward(worker, "bn", x[:0], mask=np.zeros((0, 5), bool))
        assert y.shape == (0, C, 5) and state.count == 0

    group(2, run)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e300])
def test_what_is_masked_out_may_be_anything(group, garbage):
    """Padding that the loss does not see either reaches neither statistics nor gradients."""
    x, dy, weight, bias, mask = problem()
    dy = dy * mask
    wanted = masked_oracle.expected(x, weight, bias, mask, dy)
    dirty, everywhere = np.where(mask, x, garbage), np.broadcast_to(mask, x.shape)

    def run(worker):
        y, state = syncbn.numpy.forward(worker, "bn", dirty, weight, bias, eps=masked_oracle.EPS, mask=mask)
        return y, state.backward(dy)

    def layer(worker):
        made = torch_layer(worker)
        with torch.no_grad():
            made.weight.copy_(torch.from_numpy(weight)), made.bias.copy_(torch.from_numpy(bias))
        leaf = torch.from_numpy(dirty.copy()).requires_grad_()
        y = made(leaf, torch.from_numpy(mask))
        dx, dw, db = torch.autograd.grad(y, (leaf, made.weight, made.bias), torch.from_numpy(dy))
        return y.detach().numpy(), syncbn.numpy.Gradients(dx.numpy(), dw.numpy(), db.numpy(), None)

    for function in (run, layer)[: 1 if torch is None else 2]:
        y, gradients = group(1, function)[0]
        near(y[everywhere], wanted["y"][everywhere])
        near(gradients.dx, wanted["dx"]), near(gradients.d_weight, wanted["dw"]), near(gradients.d_bias, wanted["db"])


def test_the_master_keeps_the_same_running_variance(group):
    """The option is part of a layer's declaration: two workers that differ in it get an error."""

    def run(worker):
        with pytest.raises(syncbn.Error) as caught:
            for _ in range(2):
                syncbn.numpy.forward(
                    worker, "bn", np.ones((2, C)), backward=False, biased_running_variance=worker.rank == 1
                )
        assert isinstance(caught.value, (syncbn.LayerMismatch, syncbn.WorkerLost))
        return type(caught.value)

    try:
        assert syncbn.LayerMismatch in group(2, run)
    except syncbn.WorkerLost:
        pass


# ---- PyTorch ----


def torch_layer(worker, dtype="float64", **options):
    if torch is None:
        return

    options = dict(dict(momentum=0.25, eps=masked_oracle.EPS), **options)
    return syncbn.torch.SyncBatchNorm(C, worker=worker, layer="bn", dtype=getattr(torch, dtype), **options)


@needs_torch
@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("shape,order", [((5,), "plain"), ((2, 3), "channels_last"), ((2, 3), "strided")])
@pytest.mark.parametrize("biased", [False, True])
def test_torch(group, mode, shape, order, biased):
    x, dy, weight, bias, mask = problem(shape)
    wanted = masked_oracle.expected(x, weight, bias, mask, dy, mode == "clamp")
    parts = [np.split(v, PLACES) for v in (x, dy, mask)]

    def run(worker):
        layer = torch_layer(worker, eps_mode=mode, biased_running_variance=biased)
        own_x, own_dy, own_mask = (torch.from_numpy(part[worker.rank].copy()) for part in parts)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight)), layer.bias.copy_(torch.from_numpy(bias))
        if order == "channels_last":
            own_x = own_x.contiguous(memory_format=torch.channels_last)
        elif order == "strided":
            own_x = own_x.transpose(2, 3).contiguous().transpose(2, 3)
        own_x.requires_grad_()
        y = layer(own_x, own_mask)
        first = torch.autograd.grad((y * own_dy).sum(), (own_x, layer.weight, layer.bias), retain_graph=True)
        again = torch.autograd.grad((y * own_dy).sum(), (own_x, layer.weight, layer.bias))
        assert all(torch.equal(one, other) for one, other in zip(first, again))
        return y.detach(), *first, layer.running_mean, layer.running_var, layer.num_batches_tracked

    results = group(len(SIZES), run)
    near(np.concatenate([r[0] for r in results]), wanted["y"])
    near(np.concatenate([r[1] for r in results]), wanted["dx"])
    near(sum(r[2] for r in results), wanted["dw"]), near(sum(r[3] for r in results), wanted["db"])
    n = wanted["count"]
    for *_, mean, var, batches in results:
        near(mean, 0.25 * wanted["mean"])
        near(var, 0.75 + 0.25 * wanted["var"] * (1 if biased else n / (n - 1)))
        assert int(batches) == 1


@needs_torch
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_torch_keeps_types(group, dtype, tolerance):
    x, dy, _, _, mask = problem()
    narrow = torch.from_numpy(x).to(getattr(torch, dtype))
    wanted = masked_oracle.expected(narrow.double().numpy(), np.ones(C), np.zeros(C), mask, dy)

    def run(worker):
        layer = torch_layer(worker, "float32")
        leaf = narrow.clone().requires_grad_()
        y = layer(leaf, torch.from_numpy(mask))
        y.backward(torch.from_numpy(dy).to(y.dtype))
        return y, leaf.grad

    y, dx = group(1, run)[0]
    assert y.dtype == dx.dtype == narrow.dtype
    near(y.detach().double(), wanted["y"], tolerance * 4), near(dx.double(), wanted["dx"], tolerance * 4)


@needs_torch
def test_torch_in_evaluation_and_without_running_statistics(group):
    x, _, _, _, mask = problem()

    def run(worker):
        layer = torch_layer(worker)
        tensor, counts = torch.from_numpy(x), torch.from_numpy(mask)
        layer(tensor, counts)
        layer.eval()
        assert torch.equal(layer(tensor, counts), layer(tensor))
        alone = torch_layer(worker, track_running_stats=False, affine=False)
        alone.eval()
        near(alone(tensor, counts).numpy(), masked_oracle.normalize(x, np.ones(C), np.zeros(C), mask)[0])

    group(1, run)


@needs_torch
def test_torch_lazy_and_checkpointed(group):
    x, dy, _, _, mask = problem()
    wanted = masked_oracle.expected(x, np.ones(C), np.zeros(C), mask, dy, eps=1e-5)

    def run(worker):
        for reentrant in (True, False):
            layer = syncbn.torch.LazySyncBatchNorm(
                worker=worker, layer=f"bn{reentrant}", dtype=torch.float64, biased_running_variance=True
            )
            leaf = torch.from_numpy(x).requires_grad_()
            y = torch.utils.checkpoint.checkpoint(layer, leaf, torch.from_numpy(mask), use_reentrant=reentrant)
            y.backward(torch.from_numpy(dy))
            near(y.detach(), wanted["y"]), near(leaf.grad, wanted["dx"])
            near(layer.running_var, 0.9 + 0.1 * wanted["var"])
            assert int(layer.num_batches_tracked) == 1

    group(1, run)


@needs_torch
def test_torch_running_variance_without_a_mask(group):
    x = problem()[0]
    parts = np.split(x, PLACES)

    def run(worker):
        layer = torch_layer(worker, momentum=None, biased_running_variance=True)
        layer(torch.from_numpy(parts[worker.rank]))
        return layer.running_var

    for var in group(len(SIZES), run):
        near(var, x.var((0, 2)))


# ---- Mixed ----

_JAX_WORKER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, syncbn, syncbn.jax as sync
target, inputs, output, eps = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
given = np.load(inputs)
with syncbn.Worker(target, "masks mixed", 2, 3, timeout=120) as worker, sync.typed_errors():
    def loss(x, scale, bias, mask, dy):
        y, new = sync.sync_batch_norm(x, scale, bias, sync.init_statistics(scale.size, jnp.float64), layer="bn",
            worker=worker, eps=eps, momentum=0.25, axis=1, mask=mask, biased_running_variance=True)
        return (y * dy).sum(), (y, new)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y, new)), (dx, dw, db) = step(*(jnp.asarray(given[name]) for name in ("x", "weight", "bias", "mask", "dy")))
    np.savez(output, y=y, dx=dx, dw=dw, db=db, mean=new.mean, var=new.var)
"""


@needs_torch
def test_a_mixed_group(master, tmp_path):
    """A NumPy, a PyTorch and a JAX worker, each with a mask, are one batch."""
    python = os.environ.get("SYNCBN_JAX_PYTHON", "")
    if not os.path.exists(python):
        pytest.skip("no interpreter with JAX: SYNCBN_JAX_PYTHON")
    import concurrent.futures

    sizes = (2, 1, 3)
    rng = np.random.default_rng(SEED)
    x, dy = rng.normal(1.5, 2.0, (6, C, 4)), rng.normal(size=(6, C, 4))
    weight, bias, mask = rng.normal(size=C), rng.normal(size=C), rng.uniform(size=(6, 1, 4)) < 0.6
    wanted = masked_oracle.expected(x, weight, bias, mask, dy)
    parts = [dict(zip(("x", "dy", "mask"), part)) for part in zip(*(np.split(v, np.cumsum(sizes)[:-1]) for v in (x, dy, mask)))]
    inputs, output = tmp_path / "inputs.npz", tmp_path / "output.npz"
    np.savez(inputs, weight=weight, bias=bias, **parts[2])
    environment = dict(os.environ, PYTHONPATH=str(pathlib.Path(syncbn.__file__).parent.parent))
    command = [python, "-c", _JAX_WORKER, master.target, inputs, output, str(masked_oracle.EPS)]
    options = dict(momentum=0.25, eps=masked_oracle.EPS, biased_running_variance=True)

    def numpy_worker():
        with syncbn.Worker(master.target, "masks mixed", 0, 3, timeout=120, join_timeout=120) as worker:
            mean, var, own = np.zeros(C), np.ones(C), parts[0]
            y, state = syncbn.numpy.forward(
                worker, "bn", own["x"], weight, bias, running_mean=mean, running_var=var, mask=own["mask"], **options
            )
            found = state.backward(own["dy"])
            return dict(y=y, dx=found.dx, dw=found.d_weight, db=found.d_bias, mean=mean, var=var)

    def torch_worker():
        with syncbn.Worker(master.target, "masks mixed", 1, 3, timeout=120, join_timeout=120) as worker:
            layer = torch_layer(worker, **options)
            own = {name: torch.from_numpy(value) for name, value in parts[1].items()}
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight)), layer.bias.copy_(torch.from_numpy(bias))
            leaf = own["x"].requires_grad_()
            y = layer(leaf, own["mask"])
            y.backward(own["dy"])
            return dict(y=y.detach(), dx=leaf.grad, dw=layer.weight.grad, db=layer.bias.grad,
                        mean=layer.running_mean, var=layer.running_var)

    process = subprocess.Popen(command, env=environment)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(function) for function in (numpy_worker, torch_worker)]
            results = [future.result() for future in begun]
        assert process.wait(180) == 0
    finally:
        process.kill()
        process.wait()
    results.append(dict(np.load(output)))
    for name in ("y", "dx"):
        near(np.concatenate([np.asarray(r[name]) for r in results]), wanted[name])
    for name in ("dw", "db"):
        near(sum(np.asarray(r[name]) for r in results), wanted[name])
    for r in results:
        near(r["mean"], 0.25 * wanted["mean"]), near(r["var"], 0.75 + 0.25 * wanted["var"])
