"""Derivatives through the JAX front beside the same function of plain jax.numpy: repeated, batched, and of any order."""

import concurrent.futures

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync
import syncbn.numpy

SEED = 707
EPS = 0.5  # A large one: derivatives of high order stay small beside float32's rounding.


def plain(x, scale, bias):
    mean = x.mean((0, 1))
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean((0, 1)) + EPS) * scale + bias


@pytest.fixture
def ours(master, request):
    with syncbn.Worker(master.target, request.node.name, 0, 1, timeout=120) as worker, sync.typed_errors():
        yield lambda x, scale, bias: sync.sync_batch_norm(x, scale, bias, layer="bn", worker=worker, eps=EPS)[0]


def problem():
    rng = np.random.default_rng(SEED)
    x, dy = (jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32) for _ in range(2))
    return x, jnp.asarray([1.5, -2.0]), jnp.asarray([0.1, 0.2]), dy


def near(actual, wanted, tolerance=2e-5):
    for one, other in zip(jax.tree_util.tree_leaves(actual), jax.tree_util.tree_leaves(wanted)):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * float(jnp.abs(other).max()))


def test_going_back_twice(ours):
    """jax.vjp's function may be called with several cotangents; the same ones give the same bits."""
    x, scale, bias, dy = problem()
    _, back = jax.vjp(ours, x, scale, bias)
    _, wanted = jax.vjp(plain, x, scale, bias)
    first = back(dy)
    for cotangent in (dy, 2 * dy, dy**2):
        near(back(cotangent), wanted(cotangent))
    assert all(bool((one == other).all()) for one, other in zip(first, back(dy)))


def test_going_back_twice_on_two_workers(master):
    """The other worker runs NumPy, and goes back through its state as often."""
    rng = np.random.default_rng(SEED)
    x, dys = rng.normal(size=(4, 3, 2)).astype(np.float32), rng.normal(size=(3, 4, 3, 2)).astype(np.float32)
    ones, zeros = jnp.ones(2), jnp.zeros(2)

    def there():
        with syncbn.Worker(master.target, "jax twice", 1, 2, timeout=120) as worker:
            _, state = syncbn.numpy.forward(worker, "bn", x[1:], channels_last=True, eps=EPS)
            return [state.backward(dy[1:]).dx for dy in dys]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun = pool.submit(there)
        with syncbn.Worker(master.target, "jax twice", 0, 2, timeout=120) as worker, sync.typed_errors():
            _, back = jax.vjp(lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker, eps=EPS)[0], x[:1])
            here = [back(dy[:1])[0] for dy in dys]
            jax.block_until_ready(here)
        other = begun.result()
    _, wanted = jax.vjp(lambda v: plain(v, ones, zeros), jnp.asarray(x))
    for dy, one, two in zip(dys, here, other):
        near(np.concatenate([one, two]), wanted(jnp.asarray(dy))[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_a_jacobian(ours, compiled):
    x, scale, bias, _ = problem()
    jacobian = lambda f: jax.jacrev(lambda v: f(v, scale, bias)[0, :2])
    found = jax.jit(jacobian(ours)) if compiled else jacobian(ours)
    near(found(x), jacobian(plain)(x))


def test_derivatives_of_derivatives(ours):
    x, scale, bias, dy = problem()
    loss = lambda f: lambda *given: (jnp.sin(f(*given)) * dy).sum()

    def penalty(f):
        return lambda *given: sum(jnp.square(g).sum() for g in jax.grad(loss(f), (0, 1, 2))(*given))

    def third(f):
        return lambda *given: sum(jnp.square(g).sum() for g in jax.grad(penalty(f), (0, 1, 2))(*given))

    for function in (penalty, third):
        near(jax.jit(jax.grad(function(ours), (0, 1, 2)))(x, scale, bias),
             jax.grad(function(plain), (0, 1, 2))(x, scale, bias), 2e-4)
    hessian = lambda f: jax.jacrev(jax.grad(lambda v: loss(f)(v, scale, bias)))
    near(jax.jit(hessian(ours))(x), hessian(plain)(x), 2e-4)
    # Forward over reverse: what comes back from the workers has a derivative forwards too.
    near(jax.hessian(lambda v: loss(ours)(v, scale, bias))(x), hessian(plain)(x), 2e-4)


_PENALTY = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, syncbn, syncbn.jax as sync
target, rank, world, inputs, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
given = np.load(inputs)
rows = slice(None) if world == 1 else (slice(0, 1), slice(1, 4))[rank]
x, dy, scale = jnp.asarray(given["x"][rows]), jnp.asarray(given["dy"][rows]), jnp.asarray(given["scale"])
with syncbn.Worker(target, f"jax penalty {world}", rank, world, timeout=120) as worker, sync.typed_errors():
    def loss(x, scale):
        y = sync.sync_batch_norm(x, scale, layer="bn", worker=worker, eps=0.5)[0]
        return (jnp.sin(y) * dy).sum()
    def penalty(x, scale):
        return jnp.square(jax.grad(loss)(x, scale)).sum()
    dx, ds = jax.jit(jax.grad(penalty, (0, 1)))(x, scale)
    np.savez(output, dx=dx, ds=ds)
"""


def test_a_gradient_penalty_on_two_workers(master, tmp_path):
    from test_jax import run_all

    rng = np.random.default_rng(SEED)
    inputs, outputs = tmp_path / "inputs.npz", [tmp_path / f"{rank}.npz" for rank in range(2)]
    x, dy, scale = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 2)), rng.normal(size=2)
    np.savez(inputs, x=x, dy=dy, scale=scale)
    run_all([[_PENALTY, master.target, str(rank), "2", inputs, outputs[rank]] for rank in range(2)])
    found = [np.load(output) for output in outputs]

    def penalty(x, scale):
        loss = lambda v: (jnp.sin(plain(v, scale, 0.0)) * dy).sum()
        return jnp.square(jax.grad(loss)(x)).sum()

    # float32 here, float64 there.
    wanted = jax.grad(penalty, (0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32))
    near(np.concatenate([f["dx"] for f in found]), wanted[0], 2e-4)
    near(sum(f["ds"] for f in found), wanted[1], 2e-4)


@pytest.mark.parametrize("turns", [129, 300])
def test_a_long_loop_under_grad(ours, turns):
    """Forward rounds that await a backward round are kept, however many there are."""
    _, scale, bias, _ = problem()
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(turns, 2, 1, 2)), jnp.float32)
    total = lambda f: lambda v: jax.lax.scan(lambda sum, part: (sum + (f(part, scale, bias) ** 3).sum(), None), 0.0, v)[0]
    near(jax.jit(jax.grad(total(ours)))(x), jax.grad(total(plain))(x), 1e-4)
