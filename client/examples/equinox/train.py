"""Equinox: a layer of a few lines over `syncbn.jax.sync_batch_norm`; examples are mapped by vmap, as Equinox has it.

    pip install syncbn equinox
    python client/examples/equinox/train.py
"""

import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import syncbn.jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import side_by_side  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


class SyncBatchNorm(eqx.nn.StatefulLayer):
    """As eqx.nn.BatchNorm with mode="batch": [C, ...] of one example, and a state."""

    scale: jax.Array
    bias: jax.Array
    running: eqx.nn.StateIndex
    layer: str = eqx.field(static=True)

    def __init__(self, channels, layer):
        self.scale, self.bias, self.layer = jnp.ones(channels), jnp.zeros(channels), layer
        self.running = eqx.nn.StateIndex(syncbn.jax.init_statistics(channels, jnp.float64))

    def __call__(self, x, state, *, key=None, inference=False):
        y, new = syncbn.jax.sync_batch_norm(
            x, self.scale, self.bias, state.get(self.running), layer=self.layer, axis=0, axis_name="batch", train=not inference
        )
        return y, state.set(self.running, new)


class WholeBatchNorm(SyncBatchNorm):
    """Over the mapped axis alone, by plain JAX: what one process has."""

    def __call__(self, x, state, *, key=None, inference=False):
        mean = jax.lax.pmean(x, "batch")
        var = jax.lax.pmean(jnp.square(x - mean), "batch")
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale + self.bias, state


def train(worker, batches):
    norm = WholeBatchNorm if worker is None else SyncBatchNorm
    first, last = jax.random.split(jax.random.key(0))
    model, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(
            [
                eqx.nn.Linear(side_by_side.FEATURES, 8, key=first),
                norm(8, "bn"),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Linear(8, 1, key=last),
            ]
        )
    )()

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def step(model, state, x, targets):
        outputs, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return jnp.square(outputs[:, 0] - targets).sum() / sum(side_by_side.SIZES), state

    for x, targets in batches:
        gradients, state = step(model, state, x, targets)
        flat, tree = jax.tree.flatten(gradients)
        summed = jax.tree.unflatten(tree, side_by_side.sum_over_workers(worker, flat))
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -side_by_side.LEARNING_RATE * g, summed))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))]


side_by_side.run(train, "Equinox")
