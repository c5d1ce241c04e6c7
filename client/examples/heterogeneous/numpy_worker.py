"""A worker in plain NumPy."""

from typing import Any, Callable, Tuple

import numpy as np

import common
import syncbn.numpy


def make(worker: Any) -> Tuple[common.Gradient, Callable[[], np.ndarray]]:
    running = [np.zeros(common.HIDDEN), np.ones(common.HIDDEN), np.zeros(common.HIDDEN), np.ones(common.HIDDEN)]

    def hidden(x: np.ndarray, p: Any, index: int) -> Any:
        return syncbn.numpy.forward(
            worker,
            f"bn{index}",
            x @ p[f"w{index}"].T,
            p[f"gamma{index}"],
            p[f"beta{index}"],
            running_mean=running[2 * index - 2],
            running_var=running[2 * index - 1],
            momentum=common.MOMENTUM,
            eps=common.EPS,
            relu=True,
        )

    def gradient(parameters: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        p = common.unflatten(parameters)
        first, state1 = hidden(images, p, 1)
        second, state2 = hidden(first, p, 2)
        logits = second @ p["w3"].T + p["b3"]
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        d_logits = exponentials / exponentials.sum(1, keepdims=True)
        d_logits[np.arange(len(labels)), labels] -= 1.0
        back2 = state2.backward(d_logits @ p["w3"])
        back1 = state1.backward(back2.dx @ p["w2"])
        return common.flatten(
            {
                "w1": back1.dx.T @ images,
                "gamma1": back1.d_weight,
                "beta1": back1.d_bias,
                "w2": back2.dx.T @ first,
                "gamma2": back2.d_weight,
                "beta2": back2.d_bias,
                "w3": d_logits.T @ second,
                "b3": d_logits.sum(0),
            }
        )

    return gradient, lambda: np.concatenate(running)


if __name__ == "__main__":
    common.work(make)
