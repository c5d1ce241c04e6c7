"""The activation and the addend of the JAX front, beside the NumPy front's."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync
import syncbn.numpy
from test_jax_masks import beside, near

SEED = 343
C = 3


@pytest.mark.parametrize("added", [False, True])
def test_training_is_that_of_the_whole_batch(master, added):
    rng = np.random.default_rng(SEED)
    x, z, dy = (rng.normal(size=(6, 4, C)).astype(np.float32) for _ in range(3))
    scale, bias = (rng.normal(size=C).astype(np.float32) for _ in range(2))

    def here(worker):
        def loss(x, scale, bias, z):
            y, _ = sync.sync_batch_norm(
                x, scale, bias, layer="bn", worker=worker, activation="relu", z=z if added else None
            )
            return (y * dy[:2]).sum(), y

        with sync.typed_errors():
            return jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(x[:2], scale, bias, z[:2]))

    def there(worker):
        y, state = syncbn.numpy.forward(
            worker, "bn", x[2:], scale, bias, channels_last=True, relu=True, residual=z[2:] if added else None
        )
        return y, state.backward(dy[2:])

    ((dx, dscale, dbias, dz), y), (other_y, other) = beside(master, f"jax activation {added}", here, there)
    exact, sums = x.astype(np.float64), (0, 1)
    invstd = 1 / np.sqrt(exact.var(sums) + 1e-5)
    hat = (exact - exact.mean(sums)) * invstd
    before = hat * scale + bias + (z if added else 0)
    gated = dy * (before > 0)
    near(np.concatenate([y, other_y]), np.maximum(before, 0))
    near(np.concatenate([dx, other.dx]), scale * invstd * (gated - gated.mean(sums) - hat * (gated * hat).mean(sums)))
    near(dscale + other.d_weight, (gated * hat).sum(sums))
    near(dbias + other.d_bias, gated.sum(sums))
    if added:
        near(np.concatenate([dz, other.d_residual]), gated)


def test_evaluation_has_them_too():
    statistics = sync.RunningStatistics(jnp.asarray([1.0]), jnp.asarray([4.0]))
    x, z = jnp.asarray([[3.0], [-3.0], [1.0]]), jnp.asarray([[-0.5], [1.0], [0.25]])
    y, _ = sync.sync_batch_norm(x, None, None, statistics, layer="bn", train=False, eps=0.0, activation="relu", z=z)
    np.testing.assert_allclose(y, [[0.5], [0.0], [0.25]], rtol=1e-6)


def test_a_narrow_result_is_rounded_once(master):
    x = jnp.asarray([[1.0], [3.0]], jnp.bfloat16)
    z = jnp.full_like(x, 2.0**-8)
    with syncbn.Worker(master.target, "jax activation bfloat16", 0, 1) as worker:
        y, _ = sync.sync_batch_norm(x, layer="bn", worker=worker, eps=0.01, z=z, activation="relu")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.asarray([[0.0], [1 / np.sqrt(1.01) + 2.0**-8]], jnp.bfloat16))


def test_arguments_that_are_refused():
    x = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match="activation is None or .relu., not 'gelu'"):
        sync.sync_batch_norm(x, layer="bn", activation="gelu")
    with pytest.raises(ValueError, match="z is float32\\[4, 2\\], and x float32\\[4, 3\\]"):
        sync.sync_batch_norm(x, layer="bn", z=jnp.zeros((4, 2)))
    with pytest.raises(TypeError, match="z is int32"):
        sync.sync_batch_norm(x, layer="bn", z=jnp.zeros((4, 3), jnp.int32))
