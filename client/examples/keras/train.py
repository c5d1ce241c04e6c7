"""Keras 3: `syncbn.keras.BatchNormalization` in place of Keras's, here with PyTorch as the backend.

    pip install syncbn keras torch
    python client/examples/keras/train.py
"""

import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import syncbn.keras  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import side_by_side  # noqa: E402

keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
torch.set_num_threads(1)


def train(worker, batches):
    keras.utils.set_random_seed(3)
    norm = keras.layers.BatchNormalization if worker is None else syncbn.keras.BatchNormalization
    layers = [keras.layers.Dense(8), norm(name="bn"), keras.layers.ReLU(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((side_by_side.FEATURES,)), *layers])
    optimizer = keras.optimizers.SGD(side_by_side.LEARNING_RATE)
    for x, targets in batches:
        model.zero_grad()
        outputs = model(torch.from_numpy(x), training=True)[:, 0]
        ((outputs - torch.from_numpy(targets)) ** 2).sum().div(sum(side_by_side.SIZES)).backward()
        gradients = [weight.value.grad.numpy() for weight in model.trainable_weights]
        summed = side_by_side.sum_over_workers(worker, gradients)
        with torch.no_grad():
            optimizer.apply([torch.from_numpy(g) for g in summed], model.trainable_weights)
    return [np.asarray(weight) for weight in model.get_weights()]


# Keras's batch normalization computes in float32 here, whatever its inputs.
side_by_side.run(train, "Keras on PyTorch", bound=1e-5)
