"""Haiku: a layer of a few lines over `syncbn.jax.sync_batch_norm`, whose running statistics are Haiku's state.

    pip install syncbn dm-haiku jax
    python client/examples/haiku/train.py
"""

import pathlib
import sys

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import syncbn.jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import side_by_side  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


class SyncBatchNorm(hk.Module):
    """Over the batches of all workers; the layer's name is the module's path."""

    def __call__(self, x, is_training):
        size = x.shape[-1:]
        scale = hk.get_parameter("scale", size, x.dtype, jnp.ones)
        offset = hk.get_parameter("offset", size, x.dtype, jnp.zeros)
        mean = hk.get_state("mean", size, x.dtype, jnp.zeros)
        var = hk.get_state("var", size, x.dtype, jnp.ones)
        if hk.running_init():
            return x
        running = syncbn.jax.RunningStatistics(mean, var)
        y, new = syncbn.jax.sync_batch_norm(x, scale, offset, running, layer=self.module_name, train=is_training)
        hk.set_state("mean", new.mean)
        hk.set_state("var", new.var)
        return y


class WholeBatchNorm(SyncBatchNorm):
    """Over this process's batch alone, by plain JAX."""

    def __call__(self, x, is_training):
        scale = hk.get_parameter("scale", x.shape[-1:], x.dtype, jnp.ones)
        offset = hk.get_parameter("offset", x.shape[-1:], x.dtype, jnp.zeros)
        return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5) * scale + offset


def train(worker, batches):
    norm = WholeBatchNorm if worker is None else SyncBatchNorm

    def network(x):
        hidden = jax.nn.relu(norm(name="bn")(hk.Linear(8)(x), is_training=True))
        return hk.Linear(1)(hidden)[:, 0]

    model = hk.without_apply_rng(hk.transform_with_state(network))
    parameters, state = model.init(jax.random.key(0), jnp.zeros((2, side_by_side.FEATURES)))

    @jax.jit
    def step(parameters, state, x, targets):
        def loss(parameters):
            outputs, new = model.apply(parameters, state, x)
            return jnp.square(outputs - targets).sum() / sum(side_by_side.SIZES), new

        return jax.grad(loss, has_aux=True)(parameters)

    for x, targets in batches:
        gradients, state = step(parameters, state, x, targets)
        flat, tree = jax.tree.flatten(gradients)
        summed = jax.tree.unflatten(tree, side_by_side.sum_over_workers(worker, flat))
        parameters = jax.tree.map(lambda p, g: p - side_by_side.LEARNING_RATE * g, parameters, summed)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parameters)]


side_by_side.run(train, "Haiku")
