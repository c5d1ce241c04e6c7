"""jax.checkpoint, under which a round is not repeated, and forward mode, which is refused before any round."""

import concurrent.futures
import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

import syncbn
import syncbn.jax as sync

SEED = 909
POLICIES = {
    "default": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def block(worker, layer="bn"):
    """Something to compute again, a normalization, and something behind it."""

    def run(x, scale):
        y = sync.sync_batch_norm(jnp.sin(x) * 2, scale, layer=layer, worker=worker)[0]
        return jnp.tanh(y) * y

    return run


def block_of_one(x, scale):
    """The same over this batch alone, by JAX."""
    x = jnp.sin(x) * 2
    mean = x.mean((0, 1))
    y = (x - mean) / jnp.sqrt(jnp.square(x - mean).mean((0, 1)) + 1e-5) * scale
    return jnp.tanh(y) * y


def problem():
    rng = np.random.default_rng(SEED)
    return jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32), jnp.asarray([1.5, -0.5], jnp.float32)


@pytest.fixture
def worker(master, request):
    with syncbn.Worker(master.target, request.node.name, 0, 1, timeout=120) as worker, sync.typed_errors():
        yield worker


def rounds(worker, function, *arguments):
    """The result, and the numbers of forward rounds that it took, by layer."""
    counts = lambda: {layer: phases.get("forward", 0) for layer, phases in worker.state_dict()["next"].items()}
    before = counts()
    result = jax.block_until_ready(function(*arguments))
    return result, {layer: count - before.get(layer, 0) for layer, count in counts().items()}


def alike(found, expected):
    """Computed again, a value may be rounded otherwise."""
    for one, other in zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpointed_block(worker, compiled, policy):
    x, scale = problem()
    total = lambda f: lambda x, scale: jnp.square(f(x, scale)).sum()
    plain = jax.grad(total(block(worker)), (0, 1))
    kept = jax.grad(total(jax.checkpoint(block(worker), policy=POLICIES[policy])), (0, 1))
    if compiled:
        plain, kept = jax.jit(plain), jax.jit(kept)
    expected, wanted = rounds(worker, plain, x, scale)
    found, taken = rounds(worker, kept, x, scale)
    alike(found, expected)
    assert taken == wanted == {"bn": 1}


def test_checkpoints_within_checkpoints_and_loops(worker):
    """As networks have them: each block by itself, all of them in a loop, and that within another."""
    x, scale = problem()
    one, other = block(worker, "one"), block(worker, "other")

    def network(wrap):
        def step(carry, part):
            return wrap(lambda c, p: wrap(other)(wrap(one)(p, scale), scale) + c)(carry, part), None

        return lambda v: jnp.square(jax.lax.scan(wrap(step), jnp.zeros_like(v[0]), v)[0]).sum()

    expected, wanted = rounds(worker, jax.jit(jax.grad(network(lambda f: f))), x)
    found, taken = rounds(worker, jax.jit(jax.grad(network(jax.checkpoint))), x)
    alike(found, expected)
    assert taken == wanted == {"one": 3, "other": 3}


def test_moments_and_vmap_and_derivatives_of_derivatives(worker):
    x, scale = problem()
    moments = lambda v: jnp.square(sync.moments(jnp.sin(v), 0, layer="moments", worker=worker)[1]).sum()
    ensemble = lambda v: jnp.square(jax.vmap(block(worker), (0, None))(v, scale)).sum()
    penalty = lambda v: jnp.square(jax.grad(lambda u: jnp.square(block(worker)(u, scale)).sum())(v)).sum()
    for function in (moments, ensemble, penalty):
        alike(jax.grad(jax.checkpoint(function))(x), jax.grad(function)(x))


def test_beside_a_worker_without_checkpoints(master):
    x, scale = problem()

    def run(rank, wrap):
        with syncbn.Worker(master.target, "jax checkpoints", rank, 2, timeout=120) as worker:
            total = lambda v: jnp.square(wrap(block(worker))(v, scale)).sum()
            return np.asarray(jax.grad(total)(x[rank : rank + 1]))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        mixed = [pool.submit(run, rank, wrap) for rank, wrap in enumerate((jax.checkpoint, lambda f: f))]
        found = [part.result() for part in mixed]
        plain = [pool.submit(run, rank, lambda f: f) for rank in range(2)]
        alike(found, [part.result() for part in plain])


def test_a_programs_own_callback_is_not_repeated_either():
    calls = []

    def told(x):
        io_callback(lambda v: calls.append(float(v)), None, jax.lax.stop_gradient(x), ordered=True)
        return jnp.sin(x)

    jax.block_until_ready(jax.jit(jax.grad(jax.checkpoint(told)))(1.0))
    jax.effects_barrier()
    assert calls == [1.0]


# ---- Forward mode ----


def _tangents(function):
    return lambda v: jax.jvp(function, (v,), (v,))


FORWARD = {
    "jvp": _tangents,
    "compiled within": lambda f: _tangents(jax.jit(f)),
    "compiled around": lambda f: jax.jit(_tangents(f)),
    "jacfwd": jax.jacfwd,
    "checkpoint": lambda f: _tangents(jax.checkpoint(f)),
    "loop": lambda f: _tangents(lambda v: jax.lax.scan(lambda c, _: (f(c), None), v, None, length=2)[0]),
    "vmap": lambda f: _tangents(lambda v: jax.vmap(f)(v)),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("operation", ["normalization", "scale", "moments"])
def test_forward_mode_is_refused_before_a_round(worker, way, operation):
    """Others would wait for the backward rounds of one that had begun."""
    x, scale = problem()

    def function(v):
        if operation == "moments":
            return v + sync.moments(v, tuple(range(v.ndim - 1)), layer="bn", worker=worker)[1]
        given = (v, scale) if operation == "normalization" else (jax.lax.stop_gradient(v), v.reshape(-1)[:2])
        return sync.sync_batch_norm(*given, layer="bn", worker=worker)[0]

    with pytest.raises(TypeError, match=r"forward mode .*Go back instead"):
        jax.block_until_ready(FORWARD[way](function)(x))
    assert "bn" not in worker.state_dict()["next"]


def test_a_linearized_function_cannot_go_forward(worker):
    x, scale = problem()
    _, forward = jax.linearize(functools.partial(block(worker), scale=scale), x)
    with pytest.raises(TypeError, match="forward mode"):
        forward(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linearized_function_can_be_gone_back_through(worker, compiled):
    """The reason why jax.linearize begins its round: up to here it is what jax.vjp is, also after a call was refused."""
    x, scale = problem()
    function, plain = functools.partial(block(worker), scale=scale), functools.partial(block_of_one, scale=scale)
    function = jax.jit(function) if compiled else function
    (y, forward), first = rounds(worker, lambda: jax.linearize(function, x))
    with pytest.raises(TypeError, match="jax.linear_transpose"):
        forward(x)
    (dx,), second = rounds(worker, lambda: jax.linear_transpose(forward, x)(y))
    alike(dx, jax.vjp(plain, x)[1](y)[0])
    assert (first, second) == ({"bn": 1}, {"bn": 0})
    assert worker.state_dict()["next"]["bn"] == {"forward": 1, "backward": 1, "sum": 0}


def test_gradients_go_forward_with_regard_to_anything(worker):
    """Forward over reverse, also for a value that the gradient is not taken of."""
    x, scale = problem()
    total = lambda x, scale: jnp.square(block(worker)(x, scale)).sum()
    for inner, outer in ((0, 0), (0, 1), (1, 0), (1, 1)):
        forward = jax.jacfwd(jax.grad(total, inner), outer)(x, scale)
        alike(forward, jax.jacrev(jax.grad(total, inner), outer)(x, scale))
