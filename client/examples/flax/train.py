"""Flax: `syncbn.flax.BatchNorm` in place of Linen's, and `syncbn.flax.nnx.convert_sync_batchnorm` (with --nnx).

    pip install syncbn flax
    python client/examples/flax/train.py
"""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import syncbn.flax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import side_by_side  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


class Network(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(8, param_dtype=jnp.float64)(x)
            x = nn.relu(self.norm(use_running_average=False, param_dtype=jnp.float64)(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x)[:, 0]


def mean_over_all(errors):
    return jnp.square(errors).sum() / sum(side_by_side.SIZES)


def train_linen(worker, batches):
    model = Network(nn.BatchNorm if worker is None else syncbn.flax.BatchNorm)
    variables = model.init(jax.random.key(0), jnp.zeros((2, side_by_side.FEATURES)))

    @jax.jit
    def step(variables, x, targets):
        def loss(parameters):
            outputs, new = model.apply({**variables, "params": parameters}, x, mutable=["batch_stats"])
            return mean_over_all(outputs - targets), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    for x, targets in batches:
        gradients, statistics = step(variables, x, targets)
        flat, tree = jax.tree.flatten(gradients)
        summed = jax.tree.unflatten(tree, side_by_side.sum_over_workers(worker, flat))
        parameters = jax.tree.map(lambda p, g: p - side_by_side.LEARNING_RATE * g, variables["params"], summed)
        variables = {"params": parameters, "batch_stats": statistics}
    return [np.asarray(leaf) for leaf in jax.tree.leaves(variables["params"])]


def train_nnx(worker, batches):
    rngs, f64 = nnx.Rngs(0), {"param_dtype": jnp.float64}
    model = nnx.Sequential(
        nnx.Linear(side_by_side.FEATURES, 8, rngs=rngs, **f64), nnx.BatchNorm(8, rngs=rngs, **f64), nnx.relu,
        nnx.Linear(8, 1, rngs=rngs, **f64),
    )
    if worker is not None:
        syncbn.flax.nnx.convert_sync_batchnorm(model)
    step = nnx.jit(nnx.grad(lambda model, x, targets: mean_over_all(model(x)[:, 0] - targets)))
    for x, targets in batches:
        flat, tree = jax.tree.flatten(step(model, x, targets))
        summed = jax.tree.unflatten(tree, side_by_side.sum_over_workers(worker, flat))
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - side_by_side.LEARNING_RATE * g, parameters, summed))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


if "--nnx" in sys.argv:
    side_by_side.run(train_nnx, "Flax NNX")
else:
    side_by_side.run(train_linen, "Flax Linen")
