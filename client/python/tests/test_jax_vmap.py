"""The JAX front under vmap: elements that are calls of their own, and elements that are one batch."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync
import syncbn.numpy
from test_jax_masks import beside

SEED = 818
EPS = 0.1
C = 2


def normal(*size, seed=SEED):
    return np.random.default_rng(seed).normal(1.0, 2.0, size).astype(np.float32)


def near(actual, wanted, tolerance=3e-5):
    for one, other in zip(jax.tree_util.tree_leaves(actual), jax.tree_util.tree_leaves(wanted)):
        wanted = np.asarray(other, np.float64)
        np.testing.assert_allclose(np.asarray(one, np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def plain(x, scale, axes=(0,), where=None):
    """Over one batch, by JAX itself."""
    mean = jnp.mean(x, axes, where=where, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axes, where=where, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPS) * scale


@pytest.fixture
def worker(master, request):
    with syncbn.Worker(master.target, request.node.name, 0, 1, timeout=120) as made, sync.typed_errors():
        yield made


def sequence_after(worker, layer="bn"):
    """The number of rounds that the layer has had."""
    return worker.synchronize(layer, 2, np.zeros(C), np.ones(C)).sequence


def test_each_element_is_a_call(master):
    """Three models at once, beside a NumPy worker that has them one after the other."""
    x, dy, scale = normal(3, 7, C), normal(3, 7, C, seed=1), normal(3, C, seed=2)

    def here(worker):
        def loss(x, scale, dy):
            y, new = sync.sync_batch_norm(
                x, scale, None, sync.init_statistics(C), layer="bn", worker=worker, eps=EPS, momentum=0.25
            )
            return (y * dy).sum(), (y, new.var)

        step = jax.jit(jax.vmap(jax.grad(loss, (0, 1), has_aux=True)))
        with sync.typed_errors():
            return jax.block_until_ready(step(x[:, :3], scale, dy[:, :3]))

    def there(worker):
        options = dict(eps=EPS, momentum=0.25, channels_last=True)
        results = [syncbn.numpy.forward(worker, "bn", x[i, 3:], scale[i], **options) for i in range(3)]
        return [(y, state.backward(dy[i, 3:])) for i, (y, state) in enumerate(results)]

    ((dx, dscale), (y, var)), others = beside(master, "jax elements", here, there)
    for i, (other_y, other) in enumerate(others):
        wanted, back = jax.vjp(lambda v, s: plain(v, s), x[i], scale[i])
        wanted_dx, wanted_dscale = back(dy[i])
        near(np.concatenate([y[i], other_y]), wanted)
        near(np.concatenate([dx[i], other.dx]), wanted_dx)
        near(dscale[i] + other.d_weight, wanted_dscale)
        near(var[i], 0.75 + 0.25 * x[i].astype(np.float64).var(0, ddof=1))


def test_elements_with_masks_of_their_own(worker):
    x, mask = normal(3, 6, C), np.random.default_rng(SEED).uniform(size=(3, 6, 1)) < 0.5
    assert len(set(mask.sum((1, 2)))) > 1
    cube = lambda f: jax.vmap(jax.grad(lambda v, m: (f(v, m) ** 3).sum()))
    ours = lambda v, m: sync.sync_batch_norm(v, layer="bn", worker=worker, eps=EPS, mask=m)[0]
    near(cube(ours)(x, mask), cube(lambda v, m: plain(v, 1.0, where=m))(x, mask))
    assert sequence_after(worker) == 3


def test_jacobians_of_elements_and_elements_of_jacobians(worker):
    x = normal(2, 3, C)
    ours = lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker, eps=EPS)[0][0]
    wanted = lambda v: plain(v, 1.0)[0]
    each_jacobian, whole_jacobian = (lambda f: jax.vmap(jax.jacrev(f))), (lambda f: jax.jacrev(jax.vmap(f)))
    for combine in (each_jacobian, whole_jacobian, lambda f: jax.vmap(jax.hessian(f))):
        near(jax.jit(combine(ours))(x), combine(wanted)(x), 2e-4)


@pytest.mark.parametrize("spatial", [(), (3,)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_named_axis_is_the_batch(worker, spatial, masked):
    """As Equinox has it: examples [C, ...] under vmap, and one round for all of them."""
    x, dy, scale = normal(5, C, *spatial), normal(5, C, *spatial, seed=1), normal(C, seed=2)
    mask = np.asarray([1, 0, 1, 1, 0], bool) if masked else np.ones(5, bool)
    axes = (0, *range(2, 2 + len(spatial)))
    shape = (C,) + (1,) * len(spatial)
    statistics = sync.init_statistics(C)

    def ours(x, scale, counts):
        mask = jnp.broadcast_to(counts, spatial) if masked else None
        y, new = sync.sync_batch_norm(
            x, scale, None, statistics, layer="bn", worker=worker, eps=EPS, axis=0, axis_name="batch", mask=mask
        )
        return y, new.mean

    def loss(x, scale):
        y, mean = jax.vmap(ours, (0, None, 0), (0, None), axis_name="batch")(x, scale, mask)
        return (y * dy).sum(), mean

    def expected(x, scale):
        return (plain(x, scale.reshape(shape), axes, mask.reshape(-1, 1, *(1 for _ in spatial))) * dy).sum()

    found, mean = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, scale)
    near(found, jax.grad(expected, (0, 1))(x, scale))
    near(mean, 0.1 * x.astype(np.float64)[mask].mean(axes))
    assert sequence_after(worker) == 1


def test_gradients_inside_of_a_named_axis(worker):
    x, dy = normal(5, C), normal(5, C, seed=1)

    def loss(x, dy):
        y = sync.sync_batch_norm(x, layer="bn", worker=worker, eps=EPS, axis_name="batch")[0]
        return (y * dy).sum()

    near(jax.vmap(jax.grad(loss), axis_name="batch")(x, dy), jax.grad(lambda v: (plain(v, 1.0) * dy).sum())(x))


def test_an_example_that_all_elements_share(worker):
    """It counts once for each of them."""
    x, dy = normal(C), normal(4, C, seed=1)

    def loss(x):
        one = lambda dy: (sync.sync_batch_norm(x, layer="bn", worker=worker, eps=EPS, axis_name="batch")[0] * dy).sum()
        return jax.vmap(one, axis_name="batch")(dy).sum()

    near(jax.grad(loss)(x) + 1.0, np.ones(C))  # All values are alike, whatever x is.


def test_a_name_that_no_vmap_binds(worker):
    with pytest.raises(NameError, match="batch"):
        sync.sync_batch_norm(normal(4, C), layer="bn", worker=worker, axis_name="batch")


def test_moments_under_vmap(worker):
    x = normal(3, 4, C)
    loss = lambda mean, var: (jnp.sin(mean) + mean * var).sum()
    each = jax.vmap(jax.grad(lambda v: loss(*sync.moments(v, 0, layer="each", worker=worker))))
    near(each(x), jax.vmap(jax.grad(lambda v: loss(v.mean(0), v.var(0))))(x))

    def named(v):
        row = lambda r: sync.moments(r, (), layer="named", worker=worker, axis_name="batch")
        return loss(*jax.vmap(row, out_axes=None, axis_name="batch")(v))

    near(jax.jit(jax.grad(named))(x[0]), jax.grad(lambda v: loss(v.mean(0), v.var(0)))(x[0]))
    assert (sequence_after(worker, "each"), sequence_after(worker, "named")) == (3, 1)
