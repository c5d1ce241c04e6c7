"""syncbn.flax, beside a NumPy worker, against Flax's own layers on the whole batch."""

import concurrent.futures

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import syncbn
import syncbn.flax
import syncbn.numpy

SEED = 272
HERE, C = 3, 4
BOUND = 1e-9


@pytest.fixture(scope="module")
def master():
    with syncbn.Master() as started:
        yield started


@pytest.fixture(autouse=True)
def double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def near(actual, wanted, tolerance=1e-10):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def problem():
    """x and dy [8, 2, C], and a mask of positions."""
    rng = np.random.default_rng(SEED)
    mask = rng.uniform(size=(8, 2, 1)) < 0.6
    return rng.normal(2.0, 3.0, (8, 2, C)), rng.normal(size=(8, 2, C)), mask


def beside(master, name, here, layer, mask, scale):
    """here(worker), and a NumPy worker with the other rows. Returns both results."""
    x, dy, _ = problem()

    def there():
        with syncbn.Worker(master.target, name, 1, 2, timeout=300) as worker:
            y, state = syncbn.numpy.forward(
                worker,
                layer,
                x[HERE:],
                scale,
                momentum=1 - 0.75,
                channels_last=True,
                mask=None if mask is None else mask[HERE:],
                biased_running_variance=True,
            )
            return y, state.backward(dy[HERE:]).dx

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun = pool.submit(there)
        with syncbn.Worker(master.target, name, 0, 2, timeout=300) as worker, syncbn.jax.typed_errors():
            found = jax.block_until_ready(here(worker))
        return found, begun.result()


@pytest.mark.parametrize("masked", [False, True])
def test_linen(master, masked):
    x, dy, mask = problem()
    options = dict(momentum=0.75, param_dtype=jnp.float64, name="norm")

    class Net(nn.Module):
        norm: type
        more: dict

        @nn.compact
        def __call__(self, x, mask, train):
            return self.norm(**options, **self.more)(x, use_running_average=not train, mask=mask)

    plain = Net(nn.BatchNorm, {})
    variables = plain.init(jax.random.key(0), x, None, True)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=C))
    variables["params"]["norm"]["scale"] = scale
    counts = mask if masked else None

    def step(model, x, counts, dy):
        def loss(x, parameters):
            y, new = model.apply({**variables, "params": parameters}, x, counts, True, mutable=["batch_stats"])
            return (y * dy).sum(), (y, new["batch_stats"]["norm"])

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, variables["params"])

    def here(worker):
        model = Net(syncbn.flax.BatchNorm, {"worker": worker})
        again = model.init(jax.random.key(0), x, None, True)
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)
        return step(model, x[:HERE], None if counts is None else counts[:HERE], dy[:HERE])

    found, (other_y, other_dx) = beside(master, f"linen {masked}", here, "norm", counts, np.asarray(scale))
    (dx, dparameters), (y, new) = found
    (wanted_dx, _), (wanted_y, wanted) = step(plain, x, counts, dy)
    near(np.concatenate([y, other_y]), wanted_y)
    near(np.concatenate([dx, other_dx]), wanted_dx)
    near(dparameters["norm"]["bias"], dy[:HERE].sum((0, 1)))
    assert new["mean"].dtype == new["var"].dtype == jnp.float32
    near(new["mean"], wanted["mean"], 1e-6)
    near(new["var"], wanted["var"], 1e-6)
    # A checkpoint of one fits the other; evaluation needs no worker.
    trained = {"params": variables["params"], "batch_stats": {"norm": new}}
    near(Net(syncbn.flax.BatchNorm, {}).apply(trained, x, None, False), plain.apply(trained, x, None, False))


def test_linen_with_a_named_axis_has_one_batch(master):
    x, _, _ = problem()
    with syncbn.Worker(master.target, "linen axis", 0, 1) as worker:
        ours, plain = (
            norm(use_running_average=False, axis_name="batch", **more)
            for norm, more in ((syncbn.flax.BatchNorm, {"worker": worker, "layer": "bn"}), (nn.BatchNorm, {}))
        )
        variables = plain.init(jax.random.key(0), x[0])
        each = lambda model: jax.vmap(
            lambda row: model.apply(variables, row, mutable=["batch_stats"])[0], axis_name="batch"
        )(x)
        near(each(ours), each(plain), 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_nnx(master, masked):
    x, dy, mask = problem()
    counts = mask if masked else None

    def make():
        rngs = nnx.Rngs(0)
        norm = nnx.BatchNorm(C, momentum=0.75, param_dtype=jnp.float64, rngs=rngs)
        norm.scale[...] = jnp.asarray(np.random.default_rng(1).normal(size=C))
        return nnx.Dict(norm=norm)

    def step(model, x, counts, dy):
        def loss(model, x):
            y = model.norm(x, mask=counts)
            return (y * dy).sum(), y

        gradients, y = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(model, x)
        return gradients[1], gradients[0]["norm"]["bias"][...], y

    def here(worker):
        model = syncbn.flax.nnx.convert_sync_batchnorm(make(), worker)
        assert type(model.norm) is syncbn.flax.nnx.BatchNorm
        dx, dbias, y = step(model, x[:HERE], None if counts is None else counts[:HERE], dy[:HERE])
        return dx, dbias, y, model.norm.mean[...], model.norm.var[...]

    plain = make()
    scale = np.asarray(plain.norm.scale[...])
    (dx, dbias, y, mean, var), (other_y, other_dx) = beside(master, f"nnx {masked}", here, "norm", counts, scale)
    wanted_dx, _, wanted_y = step(plain, x, counts, dy)
    near(np.concatenate([y, other_y]), wanted_y)
    near(np.concatenate([dx, other_dx]), wanted_dx)
    near(dbias, dy[:HERE].sum((0, 1)))
    near(mean, plain.norm.mean[...], 1e-6)
    near(var, plain.norm.var[...], 1e-6)


def test_nnx_evaluates_as_flax_does():
    x, _, _ = problem()
    ours, plain = (
        norm(C, rngs=nnx.Rngs(0), use_running_average=True) for norm in (syncbn.flax.nnx.BatchNorm, nnx.BatchNorm)
    )
    near(ours(x), plain(x))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(ours))) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(plain))
    )


def test_nnx_names():
    rngs = nnx.Rngs(0)
    one, two = (syncbn.flax.nnx.BatchNorm(C, rngs=rngs) for _ in range(2))
    assert one.layer != two.layer
    model = nnx.Dict(a=nnx.BatchNorm(C, rngs=rngs), b=one, c=syncbn.flax.nnx.BatchNorm(C, rngs=rngs, layer="mine"))
    syncbn.flax.nnx.convert_sync_batchnorm(model, prefix="net.")
    assert [model.a.layer, model.b.layer, model.c.layer] == ["net.a", "net.b", "mine"]


@pytest.mark.parametrize("momentum", [jnp.asarray(0.75), np.float32(0.75), 0, True], ids=repr)
def test_momentum_of_any_type(master, momentum):
    """An array too, in a function that JAX compiles."""
    x, _, _ = problem()
    name = f"momentum {momentum!r}"

    def updated(norm):
        variables = norm.init(jax.random.key(0), x)
        return jax.jit(lambda v: norm.apply(v, x, mutable=["batch_stats"])[1])(variables)["batch_stats"]

    wanted = updated(nn.BatchNorm(use_running_average=False, momentum=momentum))
    with syncbn.Worker(master.target, name, 0, 1, timeout=300) as worker, syncbn.jax.typed_errors():
        found = updated(syncbn.flax.BatchNorm(use_running_average=False, momentum=momentum, worker=worker, layer="norm"))
    for statistic in ("mean", "var"):
        near(found[statistic], wanted[statistic], 1e-6)


def test_what_is_refused():
    x = jnp.zeros((4, C))
    with pytest.raises(ValueError, match="axis_index_groups is .*has to be None"):
        syncbn.flax.BatchNorm(axis_index_groups=[[0]], use_running_average=False).apply({}, x)
    with pytest.raises(TypeError, match="axis is .*one channel axis"):
        syncbn.flax.BatchNorm(axis=(1, 2), use_running_average=False).apply({}, x)
    with pytest.raises(TypeError, match="worker is 'mine'"):
        syncbn.flax.nnx.BatchNorm(C, rngs=nnx.Rngs(0), worker="mine")

    class Other(nnx.BatchNorm):
        pass

    model = nnx.Dict(a=nnx.BatchNorm(C, rngs=nnx.Rngs(0)), b=Other(C, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="layer b is a .*Other, which adds"):
        syncbn.flax.nnx.convert_sync_batchnorm(model)
    assert type(model.a) is nnx.BatchNorm


def test_workers_train_as_one_process_on_the_whole_batch(example):
    for arguments in ([], ["--nnx"]):
        (difference,) = example("flax/train.py", *arguments)
        assert difference < BOUND
    (difference,) = example("jax/train.py")
    assert difference < BOUND
