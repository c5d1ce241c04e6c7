"""Arguments that the JAX front refuses, with their errors, and the types that it takes."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync

X = np.arange(12.0, dtype=np.float32).reshape(4, 3) ** 1.5


@pytest.fixture(scope="module")
def worker(master):
    with syncbn.Worker(master.target, "jax arguments", 0, 1, timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    "x,name",
    [
        (X.astype(np.complex64), "complex64"),
        (X.astype(np.int32), "int32"),
        (X.astype(np.uint8), "uint8"),
        (X > 3, "bool"),
        (jnp.asarray(X, jnp.complex64), "complex64"),
        (X.astype(np.complex128), "complex128; a floating type"),
        (X.astype(np.int64), "int64"),
        (X.astype("datetime64[s]"), "datetime64"),
        (jax.random.split(jax.random.key(0), 12).reshape(4, 3), "key<"),
        (X.astype(object), "object"),
        (X.astype(np.longdouble), str(np.dtype(np.longdouble))),
        (X.tolist(), "list"),
        (np.array([["a", "b"]]), "U1"),
    ],
)
def test_types_that_are_refused(worker, x, name):
    for train in (True, False):
        statistics = sync.init_statistics(3)
        with pytest.raises(TypeError, match=name):
            sync.sync_batch_norm(x, None, None, statistics, layer="bn", worker=worker, train=train)
    with pytest.raises(TypeError):
        jax.jit(lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker)[0])(x)


@pytest.mark.parametrize("value", ["no", 2, None])
def test_a_switch_is_true_or_false(worker, value):
    with pytest.raises(TypeError, match="biased_running_variance is .*True or False"):
        sync.sync_batch_norm(X, layer="bn", worker=worker, biased_running_variance=value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_types_that_are_taken(worker, dtype):
    if not hasattr(jnp, dtype):
        pytest.skip(f"this JAX has no {dtype}")
    x = jnp.asarray(X, dtype)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    wanted = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}.get(dtype, 0.2)
    with sync.typed_errors():
        y, back = jax.vjp(lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker)[0], x)
        (dx,) = back(jnp.ones_like(y))
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y.astype(jnp.float32)), wanted, atol=tolerance)


def test_float64_of_numpy_without_x64(worker):
    """float64 is rounded to float32, as everywhere in JAX."""
    with sync.typed_errors():
        y = sync.sync_batch_norm(X.astype(np.float64), layer="bn", worker=worker)[0]
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), atol=1e-5)


@pytest.mark.parametrize(
    "change,error,text",
    [
        (dict(scale=np.ones(4, np.float32)), ValueError, "scale has shape"),
        (dict(scale=np.ones((3, 1), np.float32)), ValueError, "scale has shape"),
        (dict(scale=np.ones(3, np.int32)), TypeError, "scale is int32"),
        (dict(bias=np.ones(3, complex)), TypeError, "bias is complex"),
        (dict(bias=1.0), ValueError, "bias has shape"),
        (dict(statistics=(np.zeros(4, np.float32), np.ones(4, np.float32))), ValueError, "statistics.mean has shape"),
        (dict(statistics=(np.zeros(3, np.int32), np.ones(3, np.float32))), TypeError, "statistics.mean is int32"),
        (dict(statistics=np.zeros(3, np.float32)), TypeError, "it has to be RunningStatistics"),
        (dict(statistics=7), TypeError, "it has to be RunningStatistics"),
        (dict(axis=2), ValueError, "axis is 2"),
        (dict(axis=-3), ValueError, "axis is -3"),
        (dict(axis=1.0), TypeError, "axis is a whole number"),
        (dict(eps=-1.0), ValueError, "eps is -1"),
        (dict(eps=float("nan")), ValueError, "eps is nan"),
        (dict(eps=float("inf")), ValueError, "eps is inf"),
        (dict(eps="1e-5"), TypeError, "eps is .* it has to be a number"),
        (dict(momentum=1.5), ValueError, "momentum is 1.5"),
        (dict(momentum=None), TypeError, "momentum is None.* it has to be a number"),
        (dict(eps_mode="plus"), ValueError, "eps_mode is .plus.; it is one of"),
        (dict(numeric="ignore"), ValueError, "numeric is .ignore.; it is one of"),
        (dict(layer=""), ValueError, "layer is empty"),
        (dict(layer="a\0b"), ValueError, "NUL"),
        (dict(layer="é" * 128), ValueError, "256 bytes"),
        (dict(layer=7), TypeError, "layer is 7.* it has to be a string"),
        (dict(worker="127.0.0.1:50051"), TypeError, "it has to be a syncbn.Worker"),
        (dict(x=np.ones(3, np.float32)), ValueError, "expected"),
        (dict(x=np.ones((3, 0), np.float32)), ValueError, "no channels"),
    ],
)
def test_wrong_arguments(worker, change, error, text):
    arguments = dict(dict(x=X, layer="bn", worker=worker), **change)
    with pytest.raises(error, match=text):
        sync.sync_batch_norm(**arguments)


def test_only_shapes(worker):
    """jax.eval_shape traces without a round."""
    before = worker.synchronize("shapes", 2, np.zeros(3), np.ones(3)).sequence
    traced = jax.eval_shape(lambda v: sync.sync_batch_norm(v, layer="shapes", worker=worker)[0], X)
    assert traced.shape == X.shape and traced.dtype == jnp.float32
    assert worker.synchronize("shapes", 2, np.zeros(3), np.ones(3)).sequence == before + 1


def test_donated_buffers(worker):
    step = jax.jit(lambda v: sync.sync_batch_norm(v, layer="donated", worker=worker)[0], donate_argnums=0)
    with sync.typed_errors():
        y = step(jnp.asarray(X))
    np.testing.assert_allclose(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(master, bad):
    x = np.array(X)
    x[1, 1] = bad
    with syncbn.Worker(master.target, f"jax not finite {bad}", 0, 1) as worker:
        with pytest.raises(syncbn.NotFinite), sync.typed_errors():
            jax.block_until_ready(sync.sync_batch_norm(x, layer="refused", worker=worker))
        with sync.typed_errors():
            y, state = sync.sync_batch_norm(
                x, None, None, sync.init_statistics(3), layer="bn", worker=worker, numeric="propagate"
            )
            np.testing.assert_allclose(y[:, 0], (X[:, 0] - X[:, 0].mean()) / np.sqrt(X[:, 0].var() + 1e-5), atol=1e-5)
            assert np.isnan(y[:, 1]).all() and not np.isfinite(state.mean[1]) and np.isfinite(state.mean[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_flow(master, bad):
    """They are those of plain jax.numpy, whatever the policy for batches: a loss scaler has to see the overflow."""
    dy = np.random.default_rng(5).normal(size=X.shape).astype(np.float32)
    dy[2, 1] = bad
    plain = lambda v: (v - v.mean(0)) / jnp.sqrt(v.var(0) + 1e-5)
    with syncbn.Worker(master.target, f"jax gradients {bad}", 0, 1) as worker, sync.typed_errors():
        _, back = jax.vjp(lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker)[0], X)
        (dx,) = back(jnp.asarray(dy))
        _, wanted = jax.vjp(plain, jnp.asarray(X))
        np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(wanted(jnp.asarray(dy))[0]))
        np.testing.assert_allclose(dx[:, 0], wanted(jnp.asarray(dy))[0][:, 0], atol=1e-5)


def test_one_name_for_two_sizes(worker):
    """One after the other they may share a name; a step that goes back through both gets an error that says so."""
    normalize = lambda v: sync.sync_batch_norm(v, layer="shared", worker=worker)[0]
    with sync.typed_errors():
        for part in (X, X[:, :2], X):
            jax.block_until_ready(jax.grad(lambda v: (normalize(v) ** 3).sum())(jnp.asarray(part)))
    both = jax.grad(lambda v: (normalize(v) ** 3).sum() + (normalize(v[:, :2]) ** 3).sum())
    for step in (both, jax.jit(both)):
        with pytest.raises(ValueError, match="has 3 channels.*2 channels.*use another name"), sync.typed_errors():
            jax.block_until_ready(step(jnp.asarray(X)))
