"""JAX: `syncbn.jax.sync_batch_norm` in a function of one's own, under jit and grad.

    pip install syncbn jax
    python client/examples/jax/train.py
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import syncbn.jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import side_by_side  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


def normalize(x, scale, bias, worker):
    """Batch normalization: over all workers, or by plain JAX."""
    if worker is not None:
        return syncbn.jax.sync_batch_norm(x, scale, bias, layer="bn", worker=worker)[0]
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5) * scale + bias


def train(worker, batches):
    generator = np.random.default_rng(2)
    shapes = [(side_by_side.FEATURES, 8), (8,), (8,), (8,)]
    parameters = [jnp.asarray(generator.normal(size=shape)) for shape in shapes]

    def loss(parameters, x, targets):
        weight, scale, bias, last = parameters
        hidden = jax.nn.relu(normalize(x @ weight, scale, bias, worker))
        return jnp.square(hidden @ last - targets).sum() / sum(side_by_side.SIZES)

    step = jax.jit(jax.grad(loss))
    for x, targets in batches:
        gradients = side_by_side.sum_over_workers(worker, step(parameters, x, targets))
        parameters = [p - side_by_side.LEARNING_RATE * g for p, g in zip(parameters, gradients)]
    return [np.asarray(p) for p in parameters]


side_by_side.run(train, "JAX")
