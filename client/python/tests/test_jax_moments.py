"""syncbn.jax.moments against formulas in float64, beside a worker that speaks the rounds itself."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync
from test_jax_masks import beside, near

SEED = 919

CASES = {
    "channels last": ((4, 3, 2), (0, 1), False, None),
    "kept dimensions": ((4, 2, 3), (0, -1), True, None),
    "two axes of channels": ((5, 2, 3), 0, False, None),
    "none of channels": ((4, 3), (0, 1), False, None),
    "a mask of rows": ((4, 3, 2), (0, 1), False, (4, 1, 1)),
    "a mask of positions": ((4, 2, 3), (0, 2), True, (4, 1, 3)),
    "a mask that counts nothing here": ((4, 3), 0, False, "none"),
}


@pytest.mark.parametrize("name", CASES)
def test_moments_and_their_gradient(master, name):
    shape, axes, keepdims, mask_shape = CASES[name]
    over = tuple(a % len(shape) for a in ((axes,) if isinstance(axes, int) else axes))
    kept = tuple(a for a in range(len(shape)) if a not in over)
    rng = np.random.default_rng(SEED)
    x = rng.normal(3.0, 2.0, shape).astype(np.float32)
    if mask_shape is None:
        mask = np.ones(shape, bool)
    elif mask_shape == "none":
        mask = np.zeros(shape, bool)
    else:
        mask = np.broadcast_to(rng.uniform(size=mask_shape) < 0.6, shape)
    first = tuple(slice(0, 1) if a in kept else slice(None) for a in range(len(shape)))
    given = None if mask_shape is None else mask[first]
    channels = int(np.prod([shape[a] for a in kept], dtype=int))
    other = rng.normal(2.0, 1.0, (6, channels))
    a, b, c, d = rng.normal(size=(4, channels))

    def here(worker):
        def loss(x):
            mean, var = sync.moments(x, axes, layer="m", worker=worker, keepdims=keepdims, mask=given)
            assert mean.shape == tuple(1 if i in over else n for i, n in enumerate(shape) if keepdims or i in kept)
            return (c * mean.ravel() + d * var.ravel()).sum(), (mean.ravel(), var.ravel())

        with sync.typed_errors():
            return jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(x))

    def there(worker):
        center = other.mean(0)
        worker.declare_layer("m", channels, eps=0.0)
        merged = worker.synchronize("m", 6, center, np.square(other - center).sum(0), backward=True)
        return merged.count, worker.start_synchronize_backward("m", merged.sequence, a, b).result()

    (dx, (mean, var)), (count, sums) = beside(master, f"jax moments {name}", here, there)
    rows = x.astype(np.float64).transpose(*over, *kept).reshape(-1, channels)
    counts = mask.transpose(*over, *kept).reshape(-1, channels)[:, :1]
    together = np.concatenate([rows[counts[:, 0]], other])
    near(mean, together.mean(0))
    near(var, together.var(0))
    assert count == len(together)
    near(sums.sum_dy, a + c)
    near(sums.sum_dy_xmu, b + d)
    wanted = counts * (a + c + 2 * (rows - together.mean(0)) * (b + d)) / count
    wanted = wanted.reshape([shape[i] for i in (*over, *kept)]).transpose(np.argsort((*over, *kept)))
    np.testing.assert_allclose(dx, wanted, rtol=3e-5, atol=3e-6)


@pytest.fixture
def worker(master, request):
    with syncbn.Worker(master.target, request.node.name, 0, 1, timeout=120) as made, sync.typed_errors():
        yield made


def test_derivatives_of_derivatives(worker):
    x = np.random.default_rng(SEED).normal(size=(4, 2)).astype(np.float32)
    ours = lambda v: sync.moments(v, 0, layer="m", worker=worker)
    plain = lambda v: (v.mean(0), v.var(0))

    def third(f):
        def loss(v):
            mean, var = f(v)
            return (((v - mean) * jax.lax.rsqrt(var + 0.5)) ** 3).sum() + (jnp.sin(mean) * var).sum()

        second = jax.grad(lambda v: jnp.square(jax.grad(loss)(v)).sum())
        return jax.grad(lambda v: jnp.square(second(v)).sum() * 1e-3)

    near(jax.jit(third(ours))(x), np.asarray(third(plain)(x), np.float64), 2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_type_of_moments(worker, dtype):
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(6, 2)), dtype)

    def loss(v):
        found = sync.moments(v, 0, layer="m", worker=worker)
        return sum(m.sum() for m in found), found

    gradient, (mean, var) = jax.grad(loss, has_aux=True)(x)
    assert (mean.dtype, var.dtype, gradient.dtype) == (jnp.float32, jnp.float32, x.dtype)
    exact = np.asarray(x, np.float64)
    near(mean, exact.mean(0))
    near(var, exact.var(0))


def test_moments_of_nothing_and_of_one_value(worker):
    for mean, var in (
        sync.moments(jnp.zeros((0, 3)), 0, layer="m", worker=worker),
        sync.moments(jnp.zeros((2, 3)), 0, layer="m", worker=worker, mask=np.zeros((2, 1))),
    ):
        assert np.isnan(mean).all() and np.isnan(var).all() and mean.shape == (3,)
    mean, var = sync.moments(jnp.asarray([[2.0, 3.0]]), 0, layer="n", worker=worker)
    np.testing.assert_array_equal(mean, [2.0, 3.0])
    np.testing.assert_array_equal(var, [0.0, 0.0])


@pytest.mark.parametrize(
    "axes, words",
    [(2, "axes has 2"), ((0, -3), "axes has -3"), ((), "at least one"), ((0, 0), "each once"), ((0, -2), "each once")],
)
def test_axes_that_an_array_has_not(axes, words):
    with pytest.raises(ValueError, match=words):
        sync.moments(jnp.zeros((2, 2)), axes, layer="m")


def test_masks_that_do_not_fit(worker):
    with pytest.raises(ValueError, match="does not broadcast"):
        sync.moments(jnp.zeros((2, 2)), 0, layer="m", worker=worker, mask=np.ones(3))
    mask = np.asarray([[1, 0], [1, 1]])
    with pytest.raises(ValueError, match="differs by channel"), sync.typed_errors():
        jax.block_until_ready(sync.moments(jnp.zeros((2, 2)), 0, layer="m", worker=worker, mask=mask))
