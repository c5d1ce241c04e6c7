"""A worker in JAX: forward and backward are one compiled function, the rounds in the middle of it."""

from typing import Any, Callable, Tuple

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import common  # noqa: E402
import syncbn.jax  # noqa: E402


def make(worker: Any) -> Tuple[common.Gradient, Callable[[], np.ndarray]]:
    statistics = [syncbn.jax.init_statistics(common.HIDDEN, jnp.float64) for _ in range(2)]

    def loss(parameters: Any, images: Any, labels: Any, before: Any) -> Any:
        p, x, after = common.unflatten(parameters), images, []
        for index in (1, 2):
            x, new = syncbn.jax.sync_batch_norm(
                x @ p[f"w{index}"].T,
                p[f"gamma{index}"],
                p[f"beta{index}"],
                before[index - 1],
                layer=f"bn{index}",
                worker=worker,
                momentum=common.MOMENTUM,
                eps=common.EPS,
            )
            x = jax.nn.relu(x)
            after.append(new)
        logits = jax.nn.log_softmax(x @ p["w3"].T + p["b3"])
        return -jnp.take_along_axis(logits, labels[:, None], axis=1).sum(), after

    step = jax.jit(jax.grad(loss, has_aux=True))

    def gradient(parameters: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        with syncbn.jax.typed_errors():
            result, statistics[:] = step(parameters, images, labels, list(statistics))
            return np.asarray(result)

    return gradient, lambda: np.concatenate([np.asarray(v) for layer in statistics for v in layer])


if __name__ == "__main__":
    common.work(make)
