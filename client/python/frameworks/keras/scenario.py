"""One backend of Keras ($KERAS_BACKEND): a worker of Keras beside one that speaks the rounds itself."""

import concurrent.futures
import sys

import keras
import numpy as np

import syncbn
import syncbn.keras

SEED = 646
EPS, MOMENTUM, HERE, C = 1e-3, 0.8, 3, 4
rng = np.random.default_rng(SEED)
X, DY = rng.normal(2.0, 3.0, (8, 2, C)), rng.normal(size=(8, 2, C))
GAMMA, MASK = rng.normal(size=C), rng.uniform(size=(8, 2)) < 0.6
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
BACKEND = keras.backend.backend()
# On the other backends Keras's layer computes in float32, whatever its inputs.
TOLERANCE = 1e-10 if BACKEND == "tensorflow" else 2e-5


def near(actual, wanted, tolerance=TOLERANCE):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def make(kind, **options):
    layer = kind(epsilon=EPS, momentum=MOMENTUM, **options)
    layer.build((None, 2, C))
    layer.gamma.assign(GAMMA)
    return layer


def step(layer, x, mask, dy, eagerly=False):
    """(y, dx, dgamma, moving mean, moving variance) of the loss sum(y * dy). `eagerly` is for TensorFlow."""
    if BACKEND == "tensorflow":
        found = tensorflow_step(layer, x, mask, dy, eagerly)
    else:
        found = {"torch": torch_step, "jax": jax_step}[BACKEND](layer, x, mask, dy)
    return [np.asarray(value) for value in found]


def torch_step(layer, x, mask, dy):
    import torch

    given = torch.from_numpy(x.copy()).requires_grad_()
    y = layer(given, training=True, mask=None if mask is None else torch.from_numpy(mask))
    (y * torch.from_numpy(dy)).sum().backward()
    moving = (layer.moving_mean.value.detach(), layer.moving_variance.value.detach())
    return y.detach(), given.grad, layer.gamma.value.grad, *moving


def jax_step(layer, x, mask, dy):
    import jax

    fixed = [v.value for v in layer.non_trainable_variables]

    def loss(trainable, x):
        y, new = layer.stateless_call(trainable, fixed, x, training=True, mask=mask)
        return (y * dy).sum(), (y, new)

    gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    ((dgamma, _), dx), (y, new) = gradients([v.value for v in layer.trainable_variables], x)
    return y, dx, dgamma, *new


def tensorflow_step(layer, x, mask, dy, eagerly):
    import tensorflow as tf

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=None if mask is None else tf.constant(mask))
            loss = tf.reduce_sum(y * dy)
        return y, *tape.gradient(loss, [x, layer.gamma.value])

    y, dx, dgamma = (run if eagerly else tf.function(run, autograph=False))(tf.constant(x))
    return y, dx, dgamma, layer.moving_mean.value, layer.moving_variance.value


def raw_worker(target, name, counts, required):
    """The other rows, by the rounds and NumPy. Returns: y and dx."""
    rows, dy, counts = X[HERE:].reshape(-1, C), DY[HERE:].reshape(-1, C), counts[HERE:].reshape(-1)
    mine = rows[counts]
    with syncbn.Worker(target, name, 1, 2, timeout=300) as worker:
        worker.declare_layer("bn", C, eps=0.0)
        center = mine.mean(0)
        merged = worker.synchronize("bn", len(mine), center, np.square(mine - center).sum(0), backward=required)
        invstd = 1 / np.sqrt(merged.var + EPS)
        of_mean = -(dy * GAMMA * invstd).sum(0)
        of_var = (dy * GAMMA * (rows - merged.mean)).sum(0) * -0.5 * invstd**3
        if merged.backward_required:
            sums = worker.start_synchronize_backward("bn", merged.sequence, of_mean, of_var).result()
            first, second = sums.sum_dy, sums.sum_dy_xmu
        else:
            first, second = np.split(worker.all_reduce("bn/gradients", np.concatenate([of_mean, of_var])), 2)
    through = counts[:, None] * (first + 2 * (rows - merged.mean) * second) / merged.count
    y, dx = (rows - merged.mean) * invstd * GAMMA, dy * GAMMA * invstd + through
    return y.reshape(-1, 2, C), dx.reshape(-1, 2, C)


def check_two_workers(master, mask, required, eagerly):
    name = f"keras {mask is not None} {required} {eagerly}"
    counts = np.ones(X.shape[:2], bool) if mask is None else mask
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(raw_worker, master.target, name, counts, required)
        with syncbn.Worker(master.target, name, 0, 2, timeout=300) as worker:
            layer = make(syncbn.keras.BatchNormalization, worker=worker, name="bn")
            own = None if mask is None else mask[:HERE]
            y, dx, dgamma, mean, var = step(layer, X[:HERE], own, DY[:HERE], eagerly)
        other_y, other_dx = other.result()
    plain = make(keras.layers.BatchNormalization)
    wanted_y, wanted_dx, _, wanted_mean, wanted_var = step(plain, X, mask, DY)
    # Beside a mask, Keras divides by the number of positions + 1e-7.
    tolerance = TOLERANCE if mask is None else max(TOLERANCE, 1e-6)
    near(np.concatenate([y, other_y]), wanted_y, tolerance)
    near(np.concatenate([dx, other_dx]), wanted_dx, tolerance)
    near(dgamma, (DY[:HERE] * wanted_y[:HERE] / GAMMA).sum((0, 1)), tolerance)
    near(mean, wanted_mean, tolerance)
    near(var, wanted_var, tolerance)
    values = (layer(X, training=False), layer.moving_mean, layer.moving_variance)
    evaluated, moving_mean, moving_variance = map(keras.ops.convert_to_numpy, values)
    near(evaluated, (X - moving_mean) / np.sqrt(moving_variance + EPS) * GAMMA)


def check_fit(master):
    """Keras's own training loop, compiled as the backend does, with one worker."""

    def fitted(norm):
        keras.utils.set_random_seed(5)
        layers = [keras.layers.Dense(5), norm(), keras.layers.ReLU(), norm(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((C,)), *layers])
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        model.fit(X[:, 0], DY[:, 0, :1], batch_size=4, epochs=2, shuffle=False, verbose=0)
        return model

    with syncbn.Worker(master.target, "keras fit", 0, 1, timeout=300) as worker:
        ours = fitted(lambda: syncbn.keras.BatchNormalization(worker=worker))
        assert worker.stats().rounds >= 2 * 2 * 2
    for actual, wanted in zip(ours.get_weights(), fitted(keras.layers.BatchNormalization).get_weights()):
        # A bias before a normalization has no gradient but rounding.
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=10 * TOLERANCE)


def check_configuration():
    layer = syncbn.keras.BatchNormalization(layer="mine", momentum=0.7)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is syncbn.keras.BatchNormalization and (again.layer, again.momentum) == ("mine", 0.7)
    for options, words in (({"synchronized": True}, "synchronized is True"), ({"worker": 3}, "worker is 3")):
        try:
            syncbn.keras.BatchNormalization(**options)
        except (TypeError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{options} were taken")
    odd = syncbn.keras.BatchNormalization(axis=1)
    try:
        odd(X, training=True, mask=MASK)
    except ValueError as error:
        assert "axis is 1; it has to be the last one" in str(error), error
    else:
        raise AssertionError("a mask was taken beside another axis")


def main():
    with syncbn.Master() as master:
        for mask in (None, MASK):
            check_two_workers(master, mask, required=True, eagerly=False)
        if BACKEND == "tensorflow":
            check_two_workers(master, None, required=True, eagerly=True)
            # Workers of TensorFlow do not know beforehand whether a gradient follows.
            check_two_workers(master, None, required=None, eagerly=False)
        check_fit(master)
    check_configuration()
    print(f"passed on {BACKEND} (seed {SEED})")


if __name__ == "__main__":
    sys.exit(main())
