"""Masks, the biased running variance and numeric policies of the JAX front, beside a NumPy worker of the same group."""

import concurrent.futures
import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import masked_oracle
import syncbn
import syncbn.jax as sync
import syncbn.numpy

SEED = 606
C = 3


def problem():
    """x, dy [5, C, 4], weight, bias and a mask [5, 1, 4], in float32, rounded beforehand."""
    rng = np.random.default_rng(SEED)
    x, dy = rng.normal(1.5, 2.0, (5, C, 4)), rng.normal(size=(5, C, 4))
    x[:, 1] = 1.0 + x[:, 1] * 0.01  # A channel that a clamp holds.
    vectors = [v.astype(np.float32) for v in (x, dy, rng.normal(size=C), rng.normal(size=C))]
    return (*vectors, rng.uniform(size=(5, 1, 4)) < 0.6)


def near(actual, wanted, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def beside(master, name, here, there):
    """Calls here(worker 0) on this thread and there(worker 1) on another, and returns both results."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def run():
            with syncbn.Worker(master.target, name, 1, 2, timeout=60) as worker:
                return there(worker)

        begun = pool.submit(run)
        with syncbn.Worker(master.target, name, 0, 2, timeout=60) as worker:
            found = here(worker)
        return found, begun.result()


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("biased", [False, True])
def test_masks_of_two_fronts(master, mode, biased):
    x, dy, weight, bias, mask = problem()
    mask[3:] = False  # The NumPy worker has positions, and none that count.
    wanted = masked_oracle.expected(*(v.astype(np.float64) for v in (x, weight, bias)), mask, dy, mode == "clamp")
    options = dict(eps=masked_oracle.EPS, eps_mode=mode, momentum=0.25, biased_running_variance=biased)

    def here(worker):
        @jax.jit
        def step(x, weight, bias, mask, dy):
            def loss(x, weight, bias):
                statistics = sync.init_statistics(C)
                y, new = sync.sync_batch_norm(
                    x, weight, bias, statistics, layer="bn", worker=worker, axis=1, mask=mask, **options
                )
                return (y * dy).sum(), (y, new)

            return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weight, bias)

        with sync.typed_errors():
            return jax.block_until_ready(step(x[:3], weight, bias, mask[:3], dy[:3]))

    def there(worker):
        mean, var = np.zeros(C), np.ones(C)
        y, state = syncbn.numpy.forward(
            worker, "bn", x[3:], weight, bias, running_mean=mean, running_var=var, mask=mask[3:], **options
        )
        return y, state.backward(dy[3:]), mean, var

    ((_, (y, new)), (dx, dw, db)), (other_y, other, mean, var) = beside(master, f"jax masks {mode} {biased}", here, there)
    near(np.concatenate([y, other_y]), wanted["y"]), near(np.concatenate([dx, other.dx]), wanted["dx"])
    near(dw + other.d_weight, wanted["dw"]), near(db + other.d_bias, wanted["db"])
    n = wanted["count"]
    for running_mean, running_var in (new, (mean, var)):
        near(running_mean, 0.25 * wanted["mean"])
        near(running_var, 0.75 + 0.25 * wanted["var"] * (1 if biased else n / (n - 1)))


@pytest.mark.parametrize("kind", ["bool", "int32", "float32", "one row", "no channel axis", "all channels", "scalar"])
def test_forms_of_masks(master, kind):
    x, _, weight, bias, mask = problem()
    given = {
        "one row": np.array([True, False, True, True]),
        "no channel axis": mask[:, 0],
        "all channels": np.broadcast_to(mask, x.shape),
        "scalar": True,
    }.get(kind)
    given = mask.astype(kind) if given is None else given
    whole = np.broadcast_to(given[:, None] if kind == "no channel axis" else given, x.shape)[:, :1]
    wanted = masked_oracle.normalize(*(v.astype(np.float64) for v in (x, weight, bias)), whole)[0]
    with syncbn.Worker(master.target, f"jax forms {kind}", 0, 1) as worker, sync.typed_errors():
        normalize = jax.jit(
            lambda m: sync.sync_batch_norm(
                x, weight, bias, layer="bn", worker=worker, axis=1, eps=masked_oracle.EPS, mask=m
            )[0]
        )
        near(jax.block_until_ready(normalize(given)), wanted)


@pytest.mark.parametrize(
    "mask,error,text",
    [
        (np.ones((5, C, 4), bool) & (np.arange(C) > 0)[:, None], ValueError, "differs by channel"),
        (np.ones((5, 1, 3), bool), ValueError, "does not fit"),
        (np.ones((5, 2, 4), bool), ValueError, "does not fit"),
        (np.ones((1, 5, 1, 4), bool), ValueError, "does not fit"),
        (np.full((5, 4), 2), ValueError, "other than 0 and 1"),
        (np.full((5, 4), np.nan), ValueError, "other than 0 and 1"),
        (np.ones((5, 4), complex), TypeError, "complex"),
        ([True, False], TypeError, "list"),
        (np.zeros((5, 4), bool), ValueError, "leave no position"),
    ],
)
def test_wrong_masks(master, mask, error, text):
    x = problem()[0]
    with syncbn.Worker(master.target, "jax wrong masks", 0, 1) as worker:
        with pytest.raises(error, match=text), sync.typed_errors():
            jax.block_until_ready(sync.sync_batch_norm(x, layer="bn", worker=worker, axis=1, mask=mask))


def test_what_is_masked_out_may_be_anything(master):
    """Padding that the loss does not see either reaches neither statistics nor gradients."""
    x, dy, weight, bias, mask = problem()
    dy = dy * mask
    wanted = masked_oracle.expected(*(v.astype(np.float64) for v in (x, weight, bias)), mask, dy)
    everywhere = np.broadcast_to(mask, x.shape)
    for garbage in (np.nan, np.inf):
        with syncbn.Worker(master.target, f"jax dirty {garbage}", 0, 1) as worker, sync.typed_errors():
            normalize = lambda v, s, b: sync.sync_batch_norm(
                v, s, b, layer="bn", worker=worker, axis=1, mask=mask, eps=masked_oracle.EPS
            )[0]
            y, back = jax.vjp(normalize, *map(jnp.asarray, (np.where(mask, x, garbage).astype(np.float32), weight, bias)))
            dx, dw, db = back(jnp.asarray(dy, jnp.float32))
            near(np.asarray(y)[everywhere], wanted["y"][everywhere])
            near(dx, wanted["dx"]), near(dw, wanted["dw"]), near(db, wanted["db"])


def test_evaluation_takes_no_notice_of_a_mask():
    statistics = sync.RunningStatistics(jnp.asarray([1.0, 2.0]), jnp.asarray([4.0, 9.0]))
    evaluate = functools.partial(
        sync.sync_batch_norm, jnp.asarray([[3.0, 5.0]]), statistics=statistics, layer="bn", train=False, eps=0.0
    )
    np.testing.assert_array_equal(evaluate(mask=np.array([False]))[0], evaluate()[0])
    with pytest.raises(ValueError, match="does not fit"):
        evaluate(mask=np.ones(3, bool))


def test_biased_running_variance_without_a_mask(master):
    x = problem()[0]
    for biased in (False, True):
        with syncbn.Worker(master.target, f"jax biased {biased}", 0, 1) as worker:
            _, new = sync.sync_batch_norm(
                x, None, None, sync.init_statistics(C), layer="bn", worker=worker, axis=1, biased_running_variance=biased
            )
            near(new.var, 0.9 + 0.1 * x.astype(np.float64).var((0, 2), ddof=0 if biased else 1))
