"""Masked batch normalization of a whole batch in float64, with gradients by complex steps instead of formulas."""

from typing import Any, Dict

import numpy as np

EPS = 0.01
STEP = 1e-30


def _wide(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    return vector.reshape([1, -1] + [1] * (x.ndim - 2))


def normalize(x: Any, weight: Any, bias: Any, mask: Any, clamp: bool = False, eps: float = EPS) -> Any:
    """y, mean, var and count of x [N, C, ...] and a mask [N, 1, ...]; complex x, weight and bias pass through."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    count = int(mask.sum())
    mean = (x * mask).sum(axes) / count
    var = ((x - _wide(mean, x)) ** 2 * mask).sum(axes) / count
    floor = np.where(var.real < eps, eps, var) if clamp else var + eps
    y = (x - _wide(mean, x)) / _wide(np.sqrt(floor), x) * _wide(weight, x) + _wide(bias, x)
    return y, mean, var, count


def expected(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, mask: np.ndarray, dy: np.ndarray, clamp: bool = False,
             eps: float = EPS) -> Dict[str, Any]:
    """y, mean, var (biased), count, and the gradients of sum(dy * y)."""
    y, mean, var, count = normalize(x, weight, bias, mask, clamp, eps)
    found: Dict[str, Any] = dict(y=y, mean=mean, var=var, count=count)
    for place, name in enumerate(("dx", "dw", "db")):
        given = [x.astype(complex), weight.astype(complex), bias.astype(complex)]
        gradient = np.zeros(given[place].shape)
        for index in np.ndindex(gradient.shape):
            kept = given[place][index]
            given[place][index] = kept + 1j * STEP
            gradient[index] = (dy * normalize(*given, mask, clamp, eps)[0]).sum().imag / STEP
            given[place][index] = kept
        found[name] = gradient
    return found
